package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// watchEvery is how often a forward looks whether its sandbox still is.
const watchEvery = 2 * time.Second

func newPortForwardCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "port-forward ID [LOCAL:]PORT…",
		Short: "Make ports of a sandbox ports of this machine",
		Long: `Listen on 127.0.0.1 and carry every TCP connection to a port of a sandbox.

LOCAL is the port here, by default the same; 0 takes any that is free. It goes on
until Ctrl-C, or until the sandbox ends, and then says why that was.`,
		Example:           "  dormouse port-forward 7kq2 8000\n  dormouse port-forward 7kq2 15432:5432 0:8080",
		Args:              args(cobra.MinimumNArgs(2)),
		ValidArgsFunction: completeIDs(1, false),
		RunE: func(cmd *cobra.Command, given []string) error {
			var list []forward
			for _, text := range given[1:] {
				f, err := parseForward(cmd, text)
				if err != nil {
					return err
				}
				list = append(list, f)
			}
			return idVerb(func(cmd *cobra.Command, c *client.Client, id string, _ []string) error {
				return portForward(cmd, c, id, list)
			})(cmd, given)
		},
	}
}

// forward is one port here and the one in the sandbox that it leads to.
type forward struct {
	Local  int `json:"local"`
	Remote int `json:"remote"`
}

func parseForward(cmd *cobra.Command, text string) (forward, error) {
	local, remote, both := strings.Cut(text, ":")
	if !both {
		remote = local
	}
	there, err := strconv.Atoi(remote)
	if err != nil || there < 1 || there > api.MaxPort {
		return forward{}, usage(cmd, "%q is not PORT or LOCAL:PORT, with ports from 1 to %d", text, api.MaxPort)
	}
	here, err := strconv.Atoi(local)
	if err != nil || here < 0 || here > api.MaxPort {
		return forward{}, usage(cmd, "%q is not PORT or LOCAL:PORT, with ports from 1 to %d", text, api.MaxPort)
	}
	return forward{here, there}, nil
}

// portForward listens, says where, and carries connections until the sandbox or
// the command ends.
func portForward(cmd *cobra.Command, c *client.Client, id string, list []forward) error {
	if err := runs(cmd.Context(), c, id); err != nil {
		return err
	}
	f := &forwarder{c: c, id: id, complaints: cmd.ErrOrStderr()}
	defer f.close()
	for i := range list {
		var err error
		if list[i].Local, err = f.listen(list[i]); err != nil {
			return err
		}
	}
	if asJSON(cmd) {
		if err := printJSON(cmd, map[string]any{"sandbox_id": id, "ports": list}); err != nil {
			return err
		}
	} else {
		for _, p := range list {
			if err := say(cmd.OutOrStdout(), "127.0.0.1:%d -> %d\n", p.Local, p.Remote); err != nil {
				return err
			}
		}
	}
	return f.run(cmd.Context())
}

// runs says why a sandbox cannot be connected to.
func runs(ctx context.Context, c *client.Client, id string) error {
	s, err := c.Get(ctx, id)
	if err != nil {
		return err
	}
	return goesOn(s)
}

func goesOn(s api.Sandbox) error {
	if sandbox.State(s.State).Ended() {
		return sandbox.Errorf(sandbox.KindConflict, "sandbox %s has ended: %s", s.ID, causeOf(s))
	}
	return nil
}

// forwarder carries connections to one sandbox.
type forwarder struct {
	c         *client.Client
	id        string
	listeners []forwarded

	mu         sync.Mutex
	complaints io.Writer
}

type forwarded struct {
	net.Listener
	remote int
}

// listen takes one port here and returns which.
func (f *forwarder) listen(p forward) (int, error) {
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(p.Local)))
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return 0, sandbox.Errorf(sandbox.KindConflict, "port %d is taken by another program; %d:%d takes any that is free", p.Local, 0, p.Remote)
	case errors.Is(err, syscall.EACCES):
		return 0, sandbox.Errorf(sandbox.KindInvalid, "port %d is for root only; choose another one: %d:%d", p.Local, 1024+p.Local, p.Remote)
	case err != nil:
		return 0, err
	}
	f.listeners = append(f.listeners, forwarded{l, p.Remote})
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(port)
}

func (f *forwarder) close() {
	for _, l := range f.listeners {
		_ = l.Close() // it may be closed already
	}
}

// run ends with ctx or the sandbox, and leaves no connection behind.
func (f *forwarder) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for _, l := range f.listeners {
		wg.Go(func() { f.accept(ctx, &wg, l) })
	}
	err := f.watch(ctx)
	cancel()
	f.close()
	wg.Wait()
	return err
}

// watch waits for the end of the sandbox. A server that is gone for a while is
// waited for: sandboxes outlive it.
func (f *forwarder) watch(ctx context.Context) error {
	for {
		if err := pause(ctx, watchEvery); err != nil {
			return err
		}
		err := runs(ctx, f.c, f.id)
		if err != nil && ctx.Err() == nil && !sandbox.Is(err, sandbox.KindTransient) {
			return err
		}
	}
}

func (f *forwarder) accept(ctx context.Context, wg *sync.WaitGroup, l forwarded) {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of descriptors, for now
			f.complain("accept a connection: %v", err)
			if pause(ctx, time.Second) != nil {
				return
			}
			continue
		}
		wg.Go(func() { f.serve(ctx, conn, l.remote) })
	}
}

// errHereGone is for a program on this machine that broke its connection off. That
// is its own affair.
var errHereGone = errors.New("the connection here is gone")

// hereConn is a connection of this machine whose errors are told from those of
// the other side.
type hereConn struct{ conn *net.TCPConn }

func (h hereConn) Read(p []byte) (int, error) {
	n, err := h.conn.Read(p)
	if err != nil && err != io.EOF {
		err = errHereGone
	}
	return n, err
}

func (h hereConn) Write(p []byte) (int, error) {
	n, err := h.conn.Write(p)
	if err != nil {
		err = errHereGone
	}
	return n, err
}

// serve carries one connection, and says why it broke before whoever made it sees
// that it did.
func (f *forwarder) serve(ctx context.Context, accepted net.Conn, port int) {
	defer func() { _ = accepted.Close() }() // nobody is left to be told
	tcp, ok := accepted.(*net.TCPConn)
	if !ok {
		f.complain("a %T has no halves", accepted)
		return
	}
	if err := f.carry(ctx, tcp, port); err != nil {
		if ctx.Err() == nil {
			f.complain("a connection to port %d: %v", port, err)
		}
		_ = tcp.SetLinger(0) // it is closed next
	}
}

// carry joins one connection here with one there. What fails there is a reset
// here, not an end like any other.
func (f *forwarder) carry(ctx context.Context, tcp *net.TCPConn, port int) error {
	there, err := f.c.DialPort(ctx, f.id, port)
	if err != nil {
		return err
	}
	defer func() { _ = there.Close() }() // it never fails
	stop := func() { _ = there.Close(); _ = tcp.SetReadDeadline(time.Now()) }
	defer context.AfterFunc(ctx, stop)()
	out := make(chan error, 1)
	go func() {
		_, err := io.Copy(there, hereConn{tcp})
		if err == nil {
			err = there.CloseWrite()
		}
		if err != nil {
			_ = there.Close() // lets go of the other direction
		}
		out <- err
	}()
	_, err = io.Copy(hereConn{tcp}, there)
	if err == nil {
		_ = tcp.CloseWrite() // whoever is gone needs no end
	} else {
		stop()
	}
	sent := <-out
	if errors.Is(sent, errHereGone) || errors.Is(err, errHereGone) {
		return nil
	}
	return errors.Join(err, sent)
}

// complain writes one line; several connections may have something to say.
func (f *forwarder) complain(format string, a ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, _ = fmt.Fprintln(f.complaints, "dormouse:", printable(fmt.Sprintf(format, a...))) // there is nowhere to report that to
}
