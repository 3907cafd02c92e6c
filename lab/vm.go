package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/dormouse-sandbox/dormouse/lab/wire"
)

// vm is one QEMU process and the connection to its inside.
type vm struct {
	dir    string
	cmd    *exec.Cmd
	port   *os.File
	conn   *wire.Conn
	frames chan frame    // closed at the end of the connection
	stuck  chan struct{} // closed when the console shows a kernel that will never come up
	up     chan struct{} // closed when nobody looks for that any more
	gone   chan struct{} // closed when the process has ended
	err    error         // how; after gone

	stop sync.Once
}

type frame struct {
	kind    wire.Type
	payload []byte
}

func (f frame) decode(v any) error {
	if err := json.Unmarshal(f.payload, v); err != nil {
		return fmt.Errorf("frame %q: %w", f.kind, err)
	}
	return nil
}

// startVM starts QEMU. It does not outlive this process.
func startVM(c Config, args []string) (*vm, error) {
	log, err := os.Create(filepath.Join(c.Dir, logName))
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }() // QEMU has its own
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket pair: %w", err)
	}
	if err := syscall.SetNonblock(pair[0], true); err != nil { // Close then ends a read
		return nil, err
	}
	near, far := os.NewFile(uintptr(pair[0]), "lab"), os.NewFile(uintptr(pair[1]), "lab, far end")
	defer func() { _ = far.Close() }() // QEMU has its own
	v := &vm{
		dir: c.Dir, port: near, conn: wire.New(near),
		frames: make(chan frame, 16), stuck: make(chan struct{}), up: make(chan struct{}), gone: make(chan struct{}),
	}
	v.cmd = exec.Command(c.QEMU[0], slices.Concat(c.QEMU[1:], args)...)
	v.cmd.Stdout, v.cmd.Stderr = log, log
	v.cmd.ExtraFiles = []*os.File{far}
	v.cmd.Env = append(os.Environ(), "TMPDIR="+c.Dir)
	v.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true} // Ctrl-C is for us
	started := make(chan error, 1)
	go v.wait(started)
	if err := <-started; err != nil {
		return nil, errors.Join(fmt.Errorf("start qemu: %w", err), near.Close())
	}
	go v.receive()
	go v.watch()
	return v, nil
}

// wait starts the process and waits for it on one thread, for Pdeathsig is about
// the thread that forks.
func (v *vm) wait(started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := v.cmd.Start(); err != nil {
		started <- err
		return
	}
	started <- nil
	v.err = v.cmd.Wait()
	close(v.gone)
}

func (v *vm) receive() {
	defer close(v.frames)
	for {
		kind, payload, err := v.conn.Receive()
		if err != nil {
			return // the end of QEMU, or of this vm
		}
		select {
		case v.frames <- frame{kind, payload}:
		case <-v.gone: // nobody takes them any more
			return
		}
	}
}

// hangs are lines after which a kernel never comes up.
var hangs = regexp.MustCompile(`APIC frequency too slow|Kernel panic - not syncing`)

// watch looks for them while the kernel boots.
func (v *vm) watch() {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-v.gone:
			return
		case <-v.up:
			return
		case <-tick.C:
		}
		if hangs.MatchString(v.console()) {
			close(v.stuck)
			return
		}
	}
}

func (v *vm) console() string {
	data, err := os.ReadFile(filepath.Join(v.dir, consoleName))
	if err != nil {
		return ""
	}
	return strings.ToValidUTF8(string(data), "?")
}

// kill ends the process and the connection.
func (v *vm) kill() error {
	var err error
	v.stop.Do(func() {
		_ = v.cmd.Process.Kill() // it may have ended
		<-v.gone
		err = v.port.Close()
	})
	return err
}

// hung describes a boot that did not get through.
func (v *vm) hung(why string) error {
	return &hungError{why: why, console: tail(v.console(), 12)}
}

// lost describes a connection that broke: by the end of QEMU, in all likelihood.
func (v *vm) lost(err error) error {
	select {
	case <-v.gone:
		log, _ := os.ReadFile(filepath.Join(v.dir, logName)) // it may say nothing
		return fmt.Errorf("%w; qemu ended (%v): %s; the end of its console:\n%s",
			err, v.err, strings.TrimSpace(string(log)), tail(v.console(), 20))
	case <-time.After(time.Second):
		return err
	}
}

// tail is the last lines of a text.
func tail(text string, most int) string {
	lines := strings.Split(strings.TrimRight(text, "\r\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-most):], "\n")
}
