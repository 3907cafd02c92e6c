package past_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/dormouse-sandbox/dormouse/guest/past"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// agentPort is one whose connections are spared.
const agentPort = 49983

const (
	machine4, peer4 = "10.9.0.2", "10.9.0.1"
	machine6, peer6 = "fd09::2", "fd09::1"
	nobody          = "10.9.0.77"
)

// world is a machine and a peer on one wire. What is opened within is in the
// machine's network, at the peer in his.
type world struct {
	machine, peer netns.NsHandle
}

// within runs a test on a thread that is in the machine's network, and is thrown
// away.
func within(t *testing.T, do func(w *world)) {
	t.Helper()
	testkit.Root(t)
	done := make(chan error, 1)
	go func() { // a fatal error of the test ends this goroutine, and with it the thread
		defer close(done)
		runtime.LockOSThread()
		w, err := newWorld()
		if err != nil {
			done <- err
			return
		}
		defer func() { _ = errors.Join(w.machine.Close(), w.peer.Close()) }() // nothing was written
		do(w)
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func newWorld() (*world, error) {
	w := &world{}
	var err error
	if w.peer, err = netns.New(); err != nil {
		return nil, err
	}
	if w.machine, err = netns.New(); err != nil {
		return nil, err
	}
	wire := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "peer0", PeerNamespace: netlink.NsFd(w.peer)}
	if err := netlink.LinkAdd(wire); err != nil {
		return nil, err
	}
	err = errors.Join(up("lo"), up("eth0", machine4+"/24", machine6+"/64"))
	return w, errors.Join(err, w.atPeer(func() error { return errors.Join(up("lo"), up("peer0", peer4+"/24", peer6+"/64")) }))
}

func up(name string, addresses ...string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, a := range addresses {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		addr.Flags = syscall.IFA_F_NODAD
		if err := netlink.AddrAdd(link, addr); err != nil {
			return err
		}
	}
	return netlink.LinkSetUp(link)
}

func (w *world) atPeer(do func() error) error {
	if err := netns.Set(w.peer); err != nil {
		return err
	}
	return errors.Join(do(), netns.Set(w.machine))
}

// listen serves and keeps what it accepts.
func listen(t *testing.T, address string) (accepted <-chan net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Error(err)
		runtime.Goexit()
	}
	conns := make(chan net.Conn, 16)
	t.Cleanup(func() { _ = l.Close() }) // nothing was written
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { _ = conn.Close() }) // likewise
			conns <- conn
		}
	}()
	return conns
}

func dial(t *testing.T, address string) net.Conn {
	t.Helper()
	conn, err := net.DialTimeout("tcp", address, 20*time.Second)
	if err != nil {
		t.Error(err)
		runtime.Goexit()
	}
	t.Cleanup(func() { _ = conn.Close() }) // nothing was written
	return conn
}

func aborted(conn net.Conn) error {
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second)) // a read says what is wrong with it
	_, err := conn.Read(make([]byte, 1))
	if !errors.Is(err, syscall.ECONNABORTED) {
		return fmt.Errorf("a read says %w", err)
	}
	return nil
}

// alive sends a byte through a connection and out of its other end.
func alive(a, b net.Conn) error {
	if _, err := a.Write([]byte{1}); err != nil {
		return err
	}
	_ = b.SetReadDeadline(time.Now().Add(20 * time.Second)) // likewise
	_, err := io.ReadFull(b, make([]byte, 1))
	return err
}

func TestConnectionsToOthersEndAndNothingElseDoes(t *testing.T) {
	within(t, func(w *world) {
		var atPeer4, atPeer6 <-chan net.Conn
		check(t, w.atPeer(func() error {
			atPeer4, atPeer6 = listen(t, peer4+":80"), listen(t, "["+peer6+"]:80")
			return nil
		}))
		local := listen(t, ":8080")
		agent := listen(t, fmt.Sprintf(":%d", agentPort))

		out4, out6 := dial(t, peer4+":80"), dial(t, "["+peer6+"]:80")
		var toLocal, toAgent net.Conn
		check(t, w.atPeer(func() error {
			toLocal, toAgent = dial(t, machine4+":8080"), dial(t, fmt.Sprintf("%s:%d", machine4, agentPort))
			return nil
		}))
		in, inAgent := <-local, <-agent
		inner := map[string][2]net.Conn{}
		for _, a := range []string{"127.0.0.1", machine4, "[::1]", "[" + machine6 + "]"} {
			conn := dial(t, a+":8080")
			inner[a] = [2]net.Conn{conn, <-local}
		}
		waiting := make(chan error, 1)
		go func() { waiting <- waits(w) }()
		testkit.Eventually(t, 20*time.Second, "in want of an answer", func() bool { return connecting(t) == 1 })

		dropped, err := past.EndConnections(agentPort)
		if err != nil || dropped != 4 {
			t.Errorf("%d ended, %v", dropped, err)
		}
		for name, conn := range map[string]net.Conn{"to a peer": out4, "to a peer by IPv6": out6, "from a peer": in} {
			if err := aborted(conn); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if err := <-waiting; !errors.Is(err, syscall.ECONNABORTED) {
			t.Errorf("one that waits for an answer: %v", err)
		}
		for name, ends := range inner {
			if err := errors.Join(alive(ends[0], ends[1]), alive(ends[1], ends[0])); err != nil {
				t.Errorf("from the machine to its own %s: %v", name, err)
			}
		}
		if err := alive(toAgent, inAgent); err != nil {
			t.Errorf("to the agent: %v", err)
		}
		// Who listens goes on.
		check(t, w.atPeer(func() error {
			toLocal = dial(t, machine4+":8080")
			return nil
		}))
		if err := alive(toLocal, <-local); err != nil {
			t.Errorf("a new one to who listens: %v", err)
		}
		_, _ = <-atPeer4, <-atPeer6
		if dropped, err := past.EndConnections(agentPort); err != nil || dropped != 1 {
			t.Errorf("the new one alone: %d ended, %v", dropped, err)
		}
	})
}

// TestOneConnectionIsEnough, of whatever kind: the quick look does not miss it.
func TestOneConnectionIsEnough(t *testing.T) {
	for what, open := range map[string]func(w *world){
		"to a peer":         func(*world) { dial(t, peer4+":80") },
		"to a peer by IPv6": func(*world) { dial(t, "["+peer6+"]:80") },
		"from a peer to one who listens for both": func(w *world) {
			local := listen(t, ":8080")
			check(t, w.atPeer(func() error { dial(t, machine4+":8080"); return nil }))
			<-local
		},
		"one that waits for an answer": func(w *world) {
			go func() { _ = waits(w) }() // it is ended
			testkit.Eventually(t, 20*time.Second, "in want of an answer", func() bool { return connecting(t) == 1 })
		},
	} {
		t.Run(what, func(t *testing.T) {
			within(t, func(w *world) {
				check(t, w.atPeer(func() error { listen(t, peer4+":80"); listen(t, "["+peer6+"]:80"); return nil }))
				agent := listen(t, fmt.Sprintf(":%d", agentPort))
				check(t, w.atPeer(func() error { dial(t, fmt.Sprintf("%s:%d", machine4, agentPort)); return nil }))
				<-agent
				dial(t, fmt.Sprintf("127.0.0.1:%d", agentPort))
				<-agent
				if dropped, err := past.EndConnections(agentPort); err != nil || dropped != 0 {
					t.Errorf("before: %d ended, %v", dropped, err)
				}
				open(w)
				if dropped, err := past.EndConnections(agentPort); err != nil || dropped != 1 {
					t.Errorf("%d ended, %v", dropped, err)
				}
			})
		})
	}
}

// waits connects to an address where nobody answers, not even that it is nobody's.
func waits(w *world) error {
	runtime.LockOSThread() // for good: the thread is thrown away
	if err := netns.Set(w.machine); err != nil {
		return err
	}
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	err = netlink.NeighSet(&netlink.Neigh{
		LinkIndex: link.Attrs().Index, IP: net.ParseIP(nobody), State: netlink.NUD_PERMANENT,
		HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 9},
	})
	if err != nil {
		return err
	}
	conn, err := net.DialTimeout("tcp", nobody+":80", time.Minute)
	if err == nil {
		_ = conn.Close() // nothing was written
	}
	return err
}

// connecting counts those in SYN_SENT.
func connecting(t *testing.T) (n int) {
	t.Helper()
	sockets, err := netlink.SocketDiagTCP(syscall.AF_INET)
	if err != nil {
		t.Error(err)
		runtime.Goexit()
	}
	for _, s := range sockets {
		if s.State == 2 {
			n++
		}
	}
	return n
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
		runtime.Goexit()
	}
}
