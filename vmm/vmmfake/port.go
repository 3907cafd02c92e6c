package vmmfake

import (
	"errors"
	"net"
	"sync"
)

// port is where a guest listens. Closing it breaks the connections that it
// accepted, too: after the death of a machine nothing of it answers, not even
// a server that has yet to hear of it.
type port struct {
	*net.TCPListener

	mu     sync.Mutex
	closed bool
	open   map[*accepted]bool
}

// Accept remembers what it returns until that is closed.
func (p *port) Accept() (net.Conn, error) {
	conn, err := p.AcceptTCP()
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, errors.Join(net.ErrClosed, conn.Close())
	}
	if p.open == nil {
		p.open = map[*accepted]bool{}
	}
	a := &accepted{TCPConn: conn, port: p}
	p.open[a] = true
	return a, nil
}

// Close is final.
func (p *port) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	err := p.TCPListener.Close()
	for a := range p.open {
		_ = a.TCPConn.Close() // its other end hears of it, which is all that counts
	}
	p.open = nil
	return err
}

// accepted is one connection into a guest.
type accepted struct {
	*net.TCPConn
	port *port
}

func (a *accepted) Close() error {
	a.port.mu.Lock()
	delete(a.port.open, a)
	a.port.mu.Unlock()
	return a.TCPConn.Close()
}
