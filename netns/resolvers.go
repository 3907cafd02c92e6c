package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	resolvConf = "/etc/resolv.conf"
	// askTimeout bounds one resolver, so that the next one gets a turn.
	askTimeout = 2 * time.Second
)

// resolvers are the upstream DNS servers, asked from the host's namespace.
type resolvers struct {
	fixed []netip.AddrPort

	mu      sync.Mutex // guards what was read from resolvConf
	read    []netip.AddrPort
	changed time.Time
}

func newResolvers(fixed []netip.AddrPort) *resolvers { return &resolvers{fixed: fixed} }

// current reads resolvConf again when it has changed.
func (r *resolvers) current() ([]netip.AddrPort, error) {
	if len(r.fixed) > 0 {
		return r.fixed, nil
	}
	info, err := os.Stat(resolvConf)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.changed.Equal(info.ModTime()) {
		return r.read, nil
	}
	data, err := os.ReadFile(resolvConf)
	if err != nil {
		return nil, err
	}
	r.read, r.changed = ParseResolvers(string(data)), info.ModTime()
	return r.read, nil
}

// ParseResolvers reads the nameserver lines of a resolv.conf.
func ParseResolvers(text string) []netip.AddrPort {
	var found []netip.AddrPort
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if addr, err := netip.ParseAddr(fields[1]); err == nil {
			found = append(found, netip.AddrPortFrom(addr, 53))
		}
	}
	return found
}

// ask passes a question on, over the transport that the guest used: an answer
// that is cut short tells the guest itself to ask again over TCP.
func (r *resolvers) ask(ctx context.Context, network string, question *dns.Msg) (*dns.Msg, error) {
	servers, err := r.current()
	if err != nil {
		return nil, fmt.Errorf("read resolvers: %w", err)
	}
	errs := []error{errors.New("no resolver answers")}
	for _, server := range servers {
		reply, err := askOne(ctx, network, server.String(), question)
		if err == nil {
			return reply, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

func askOne(ctx context.Context, network, server string, question *dns.Msg) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, network, server)
	if err != nil {
		return nil, err
	}
	// Ends the exchange with the slot, not with its deadline only.
	hangUp := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer hangUp()
	defer func() { _ = conn.Close() }() // nothing is buffered
	upstream := question.Copy()
	upstream.Id = dns.Id() // the guest does not choose what a forger has to guess
	client := &dns.Client{Net: network, Timeout: askTimeout, UDPSize: dns.MaxMsgSize}
	reply, _, err := client.ExchangeWithConnContext(ctx, upstream, &dns.Conn{Conn: conn, UDPSize: dns.MaxMsgSize})
	if err != nil {
		return nil, err
	}
	reply.Id = question.Id
	return reply, nil
}
