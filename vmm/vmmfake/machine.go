package vmmfake

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"runtime/debug"
	"sync"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// consoleKeep is how much of a console the fake keeps, in bytes.
const consoleKeep = 64 << 10

// vm is one fake machine. Handles come and go; it stays until it ends.
type vm struct {
	driver   *Driver
	spec     vmm.Spec
	record   vmm.Record
	listener *port
	console  console
	memory   *Memory
	gate     gate
	done     chan struct{}
	stop     context.CancelFunc // of the guest's context, which lives as long as the machine

	once sync.Once
	exit vmm.Exit // set before done is closed

	mu   sync.Mutex
	disk string
}

func newVM(d *Driver, spec vmm.Spec, listener *port, stop context.CancelFunc) *vm {
	v := &vm{driver: d, spec: spec, listener: listener, stop: stop, disk: spec.DiskPath, done: make(chan struct{})}
	if spec.Restore != nil {
		_, _ = v.console.Write(spec.Restore.Console) // it never fails
	}
	v.spec.Restore = nil // its descriptor is the caller's
	return v
}

func (v *vm) diskPath() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.disk
}

func (v *vm) run(ctx context.Context, guest Guest) {
	v.gate.pass(ctx.Done()) // of a restored machine nothing runs before its first Thaw
	err := guest(ctx, Inside{
		Spec: v.spec, Console: gated{&v.console, &v.gate, v.done}, Listener: v.listener,
		Memory: v.memory, Restored: v.memory.base != nil, vm: v, pass: v.gate.pass,
	})
	exit := vmm.Exit{Cause: sandbox.CauseGuestExit, Detail: "fake: the guest powered off"}
	if err != nil {
		exit.Detail, exit.Reset = "fake: "+err.Error(), true
	}
	if errors.Is(err, ErrOutOfMemory) {
		exit.Cause = sandbox.CauseOOMGuest
	}
	v.end(exit) // without effect when it was killed
}

// end is the death of the machine; only the first one counts.
func (v *vm) end(exit vmm.Exit) {
	v.once.Do(func() {
		exit.At = time.Now()
		v.exit = exit
		v.stop()
		_ = v.listener.Close() // nobody dials a dead machine, and what is open breaks now
		v.driver.forget(v.record.PID)
		_ = v.memory.close() // it was only read
		close(v.done)
	})
	<-v.done
}

// machine is one handle on a vm.
type machine struct{ *vm }

func (m *machine) Record() vmm.Record    { return m.record }
func (m *machine) Done() <-chan struct{} { return m.done }
func (m *machine) Exit() vmm.Exit        { return m.exit }

func (m *machine) Release() error {
	m.driver.mu.Lock()
	defer m.driver.mu.Unlock()
	delete(m.driver.held, m)
	return nil
}

func (m *machine) Console(offset int64, limit int) ([]byte, int64, error) {
	return m.console.read(offset, limit)
}

func (m *machine) Kill(context.Context) error {
	m.end(vmm.Exit{Cause: sandbox.CauseUser, Detail: "fake: killed on request"})
	return nil
}

// console is the newest consoleKeep bytes of a stream.
type console struct {
	mu    sync.Mutex
	start int64 // offset of data[0]
	data  []byte
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.data = append(c.data, p...)
	if extra := len(c.data) - consoleKeep; extra > 0 {
		c.data = append([]byte(nil), c.data[extra:]...)
		c.start += int64(extra)
	}
	return len(p), nil
}

func (c *console) read(offset int64, limit int) ([]byte, int64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	end := c.start + int64(len(c.data))
	if offset < 0 {
		offset = end + offset
	}
	offset = min(max(offset, c.start), end)
	stop := min(end, offset+int64(max(limit, 0)))
	return append([]byte(nil), c.data[offset-c.start:stop-c.start]...), stop, nil
}

// strict ends the process when an agent's handler panics: net/http would only print
// it, and a test whose agent stops half-way may pass for the wrong reason.
func strict(handler http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			cause := recover()
			if err, ok := cause.(error); ok && errors.Is(err, http.ErrAbortHandler) {
				panic(cause) // it breaks its connection off on purpose
			}
			if cause != nil {
				go panic(fmt.Sprintf("fake: the agent panicked: %v\n%s", cause, debug.Stack()))
				select {} // the process ends
			}
		}()
		handler.ServeHTTP(w, r)
	})
}

// Serve is a guest whose agent is an http.Handler, reached with Driver.Dial.
func Serve(handler http.Handler) Guest {
	return func(ctx context.Context, m Inside) error {
		protocols := new(http.Protocols)
		protocols.SetHTTP1(true)
		protocols.SetUnencryptedHTTP2(true)
		server := &http.Server{Handler: behind(m.pass, strict(handler)), Protocols: protocols, ReadHeaderTimeout: time.Minute}
		stop := context.AfterFunc(ctx, func() { _ = server.Close() }) // breaks what is open, as a dead VM does
		defer stop()
		_, _ = m.Console.Write([]byte("fake: guest agent listens\n")) // the console never fails
		err := server.Serve(m.Listener)
		if ctx.Err() != nil || errors.Is(err, http.ErrServerClosed) || errors.Is(err, net.ErrClosed) {
			return nil
		}
		return err
	}
}
