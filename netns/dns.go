package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

const (
	dnsQuestions   = 64 // answered at the same time, for each slot
	dnsConnections = 16 // TCP connections at the same time, for each slot
	dnsTimeout     = 5 * time.Second
	dnsIdle        = 5 * time.Second
)

// dnsSockets listen at the gateway's port 53 inside a namespace.
type dnsSockets struct {
	udp net.PacketConn
	tcp net.Listener
}

// listenDNS makes the sockets, on a thread that is in the namespace.
func listenDNS(ctx context.Context) (s dnsSockets, err error) {
	address := netip.AddrPortFrom(gatewayPrefix.Addr(), 53).String()
	err = do(ctx, "dns-udp", "listen for DNS", func() (err error) {
		s.udp, err = (&net.ListenConfig{}).ListenPacket(ctx, "udp4", address)
		return err
	})
	if err != nil {
		return s, err
	}
	err = do(ctx, "dns-tcp", "listen for DNS", func() (err error) {
		s.tcp, err = (&net.ListenConfig{}).Listen(ctx, "tcp4", address)
		return err
	})
	if err != nil {
		return dnsSockets{}, errors.Join(err, s.udp.Close())
	}
	return s, nil
}

// forwarder passes a guest's questions on to the host's resolvers. It runs
// from newForwarder until close.
type forwarder struct {
	resolvers *resolvers
	allowed   atomic.Bool
	slots     chan struct{}
	servers   []*dns.Server
	sockets   dnsSockets
	done      chan struct{}
	closed    atomic.Bool
	live      context.Context // ends with close; a question does not outlive the slot
	stop      context.CancelFunc
}

func newForwarder(s dnsSockets, r *resolvers) *forwarder {
	f := &forwarder{resolvers: r, slots: make(chan struct{}, dnsQuestions), sockets: s, done: make(chan struct{}, 2)}
	f.live, f.stop = context.WithCancel(context.Background())
	idle := func() time.Duration { return dnsIdle }
	f.servers = []*dns.Server{
		{PacketConn: s.udp, Net: "udp", UDPSize: dns.DefaultMsgSize, Handler: f},
		{Listener: limit(s.tcp, dnsConnections), Net: "tcp", ReadTimeout: dnsIdle, WriteTimeout: dnsIdle, IdleTimeout: idle, Handler: f},
	}
	for _, server := range f.servers {
		started := make(chan struct{})
		server.NotifyStartedFunc = func() { close(started) }
		go func() {
			_ = server.ActivateAndServe() // ends with its socket, which close closes
			f.done <- struct{}{}
		}()
		<-started
	}
	return f
}

func (f *forwarder) allow(yes bool) { f.allowed.Store(yes) }

// close stops both servers and waits for them.
func (f *forwarder) close() error {
	if f.closed.Swap(true) {
		return nil
	}
	f.stop()
	var errs []error
	for _, server := range f.servers {
		if err := server.Shutdown(); err != nil {
			errs = append(errs, fmt.Errorf("stop DNS: %w", err))
		}
	}
	for range f.servers {
		<-f.done
	}
	return errors.Join(errs...)
}

// ServeDNS answers one question; dns.Server calls it on a goroutine of its own.
func (f *forwarder) ServeDNS(w dns.ResponseWriter, question *dns.Msg) {
	reply := f.answer(question, w.LocalAddr().Network())
	_ = w.WriteMsg(reply) // the guest asks again
}

func (f *forwarder) answer(question *dns.Msg, network string) *dns.Msg {
	fail := func(code int) *dns.Msg { return new(dns.Msg).SetRcode(question, code) }
	if !f.allowed.Load() {
		return fail(dns.RcodeRefused)
	}
	if question.Opcode != dns.OpcodeQuery || len(question.Question) != 1 {
		return fail(dns.RcodeNotImplemented)
	}
	select {
	case f.slots <- struct{}{}:
		defer func() { <-f.slots }()
	default:
		return fail(dns.RcodeServerFailure) // too many at once
	}
	ctx, cancel := context.WithTimeout(f.live, dnsTimeout)
	defer cancel()
	reply, err := f.resolvers.ask(ctx, network, question)
	if err != nil {
		return fail(dns.RcodeServerFailure)
	}
	return reply
}

// limit bounds the connections that are open at the same time.
func limit(l net.Listener, n int) net.Listener {
	return &limited{Listener: l, free: make(chan struct{}, n), closed: make(chan struct{})}
}

type limited struct {
	net.Listener
	free   chan struct{}
	closed chan struct{}
	once   atomic.Bool
}

func (l *limited) Accept() (net.Conn, error) {
	select {
	case l.free <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	conn, err := l.Listener.Accept()
	if err != nil {
		<-l.free
		return nil, err
	}
	return &limitedConn{Conn: conn, free: l.free}, nil
}

func (l *limited) Close() error {
	if !l.once.Swap(true) {
		close(l.closed)
	}
	return l.Listener.Close()
}

type limitedConn struct {
	net.Conn
	free   chan struct{}
	closed atomic.Bool
}

func (c *limitedConn) Close() error {
	if !c.closed.Swap(true) {
		<-c.free
	}
	return c.Conn.Close()
}
