package past

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// EndConnections aborts every TCP connection to another machine but those of a
// local port, and says how many. Who reads or writes one is told ECONNABORTED, and
// the peer, if it is still there, gets a reset. It tries all and joins what went
// wrong.
//
// It needs the kernel's tcp_diag (with CONFIG_INET_DIAG_DESTROY, Linux 4.5).
func EndConnections(spare uint16) (int, error) {
	if noneLeads(spare) {
		return 0, nil
	}
	ours := sync.OnceValues(ownAddresses) // few machines have anything that leads anywhere
	ended := 0
	var errs []error
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		sockets, err := list(family)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, s := range sockets {
			if !leads(s, spare) {
				continue
			}
			own, err := ours()
			if err != nil {
				return ended, errors.Join(append(errs, fmt.Errorf("list addresses: %w", err))...)
			}
			if own[destination(s)] {
				continue
			}
			err = destroy(s)
			switch {
			case err == nil:
				ended++
			case errors.Is(err, unix.ENOENT): // it has ended by itself
			default:
				errs = append(errs, fmt.Errorf("end the connection to port %d: %w", s.ID.DestinationPort, err))
			}
		}
	}
	return ended, errors.Join(errs...)
}

// list gives all TCP sockets. A dump that changes of the table have disturbed is
// made once more: nobody but the agent's own connections comes and goes.
func list(family uint8) ([]*netlink.Socket, error) {
	const tries = 3
	var sockets []*netlink.Socket
	var err error
	for range tries {
		sockets, err = netlink.SocketDiagTCP(family)
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if errors.Is(err, unix.ENOENT) {
		return nil, sandbox.Errorf(sandbox.KindUnsupported, "this kernel has no tcp_diag")
	}
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list connections: %w", err)
	}
	return sockets, nil
}

// States of net/tcp_states.h.
const (
	timeWait = 6
	closed   = 7
	listens  = 10
)

// over says that a socket in this state is no connection, or no process's any more.
func over(state uint8) bool { return state == timeWait || state == closed || state == listens }

// leads says that a socket is one end of a connection to another address. One in
// TIME_WAIT is no process's any more, and cannot be aborted.
func leads(s *netlink.Socket, spare uint16) bool {
	if over(s.State) || s.ID.SourcePort == spare {
		return false
	}
	to := destination(s)
	return to.IsValid() && !to.IsUnspecified() && !to.IsLoopback()
}

func destination(s *netlink.Socket) netip.Addr {
	to, _ := netip.AddrFromSlice(s.ID.Destination) // the zero Addr is not valid
	return to.Unmap()
}

func ownAddresses() (map[netip.Addr]bool, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	ours := map[netip.Addr]bool{}
	for _, a := range addrs {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil {
			ours[prefix.Addr().Unmap().WithZone("")] = true
		}
	}
	return ours, nil
}

// destroy aborts one socket, found by its cookie: a number of the kernel's that
// no other socket has had.
func destroy(s *netlink.Socket) error {
	req := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
	req.AddData(request{s})
	_, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
	return err
}

// request is struct inet_diag_req_v2 of linux/inet_diag.h.
type request struct{ s *netlink.Socket }

func (request) Len() int { return 56 }

func (r request) Serialize() []byte {
	id := r.s.ID
	out := []byte{r.s.Family, unix.IPPROTO_TCP, 0, 0}
	out = binary.NativeEndian.AppendUint32(out, ^uint32(0)) // of any state
	out = binary.BigEndian.AppendUint16(out, id.SourcePort)
	out = binary.BigEndian.AppendUint16(out, id.DestinationPort)
	for _, ip := range []net.IP{id.Source, id.Destination} {
		var field [16]byte
		if r.s.Family == unix.AF_INET {
			ip = ip.To4()
		}
		copy(field[:], ip)
		out = append(out, field[:]...)
	}
	out = binary.NativeEndian.AppendUint32(out, id.Interface)
	out = binary.NativeEndian.AppendUint32(out, id.Cookie[0])
	return binary.NativeEndian.AppendUint32(out, id.Cookie[1])
}
