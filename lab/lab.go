package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/lab/wire"
)

// Results is the folder inside whose content comes back.
const Results = "/results"

const (
	portName = wire.Port
	// defaultBootLimit is a multiple of what a boot takes on a busy machine.
	defaultBootLimit = 60 * time.Second
	// closeLimit bounds powering off; what does not by then is killed.
	closeLimit = 15 * time.Second
)

// Config says what a lab is made of.
type Config struct {
	QEMU   []string // a program and its first arguments; empty is qemu-system-x86_64
	Kernel string   // ELF file or bzImage
	Initrd string   // with lab/init as /init
	Root   string   // raw ext4 with a distribution and the kernel's modules; never written to
	Disks  []Disk
	// Dir is a folder of this lab's own, for disks and logs. It stays.
	Dir string

	VCPUs      int // 2
	MemMiB     int // 4096
	ScratchMiB int // 20480, sparse
	ResultsMiB int // 4096, sparse

	BootLimit time.Duration // of one attempt; 60 s
	Attempts  int           // 4
	// Say gets a line for each thing that people should know, as fmt.Printf.
	Say func(format string, args ...any)
}

// Lab is a running lab. Close ends it.
type Lab struct {
	cfg    Config
	vm     *vm
	inside wire.Inside
	took   time.Duration
	tries  int

	close    sync.Once
	closeErr error
}

// Boot starts a lab and waits until it is complete. A boot that hangs, or whose
// kernel dies, is made again, cfg.Attempts times at most.
func Boot(ctx context.Context, cfg Config) (*Lab, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	tscKHz, err := kernel.TSCkHz()
	if err != nil {
		return nil, fmt.Errorf("boot lab: %w", err)
	}
	args, err := cfg.args(tscKHz)
	if err != nil {
		return nil, fmt.Errorf("boot lab: %w", err)
	}
	var failed error
	for try := 1; try <= cfg.Attempts; try++ {
		l, err := cfg.attempt(ctx, args)
		if err == nil {
			l.tries = try
			return l, nil
		}
		failed = errors.Join(failed, fmt.Errorf("attempt %d: %w", try, err))
		var hung *hungError
		if ctx.Err() != nil || !errors.As(err, &hung) {
			break
		}
		cfg.Say("lab: attempt %d did not get through: %v", try, err)
	}
	return nil, fmt.Errorf("boot lab: %w", failed)
}

// hungError is a boot that did not get through and may do so next time.
type hungError struct {
	why     string
	console string
}

func (e *hungError) Error() string {
	return e.why + "; the end of its console:\n" + e.console
}

func (c Config) attempt(ctx context.Context, args []string) (_ *Lab, err error) {
	begun := time.Now()
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run(ctx))
		}
	}()
	for name, size := range map[string]int{scratchName: c.ScratchMiB, resultsName: c.ResultsMiB} {
		if err := MakeDisk(ctx, filepath.Join(c.Dir, name), "", size); err != nil {
			return nil, fmt.Errorf("make disk: %w", err)
		}
	}
	v, err := startVM(c, args)
	if err != nil {
		return nil, err
	}
	u.PushClose("qemu", v.kill)
	l := &Lab{cfg: c, vm: v}
	if err := l.greet(ctx, c.BootLimit); err != nil {
		return nil, err
	}
	l.took = time.Since(begun)
	return l, nil
}

// greet tells the inside what it is to be, and waits until it is.
func (l *Lab) greet(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	// QEMU holds it back until the inside opens the port.
	if err := l.vm.conn.SendJSON(wire.Hello, wire.Setup{Time: time.Now(), Mounts: l.cfg.mounts()}); err != nil {
		return l.vm.lost(fmt.Errorf("greet: %w", err))
	}
	select {
	case f, ok := <-l.vm.frames:
		if !ok {
			return l.vm.hung("it ended before it was up")
		}
		return l.ready(f)
	case <-l.vm.stuck:
		return l.vm.hung("its kernel hangs")
	case <-ctx.Done():
		return l.vm.hung(fmt.Sprintf("not up after %v", limit))
	}
}

func (l *Lab) ready(f frame) error {
	switch f.kind {
	case wire.Fatal:
		return fmt.Errorf("the inside says: %s", f.payload)
	case wire.Ready:
		close(l.vm.up)
		return f.decode(&l.inside)
	}
	return fmt.Errorf("the first frame is a %q", f.kind)
}

// Inside is what the lab says about itself.
func (l *Lab) Inside() wire.Inside { return l.inside }

// Boot is how long the boot took that got through, and how many attempts it was.
func (l *Lab) Boot() (took time.Duration, attempts int) { return l.took, l.tries }

// Console is what the kernel said so far.
func (l *Lab) Console() string { return l.vm.console() }

// Close powers the lab off, kills what does not go, and copies what is in its
// results, and its console, into the folder to; an empty one leaves them.
func (l *Lab) Close(ctx context.Context, to string) error {
	l.close.Do(func() { l.closeErr = l.end(context.WithoutCancel(ctx), to) })
	return l.closeErr
}

func (l *Lab) end(ctx context.Context, to string) error {
	_ = l.vm.conn.Send(wire.Poweroff, nil) // it may be dead
	select {
	case <-l.vm.gone:
	case <-time.After(closeLimit):
		l.cfg.Say("lab: it does not power off; killing it")
	}
	errs := []error{l.vm.kill()}
	if to != "" {
		errs = append(errs, copyOut(ctx, filepath.Join(l.cfg.Dir, resultsName), to),
			os.WriteFile(filepath.Join(to, consoleName), []byte(l.Console()), 0o644))
	}
	for _, name := range []string{scratchName, resultsName} {
		errs = append(errs, os.Remove(filepath.Join(l.cfg.Dir, name)))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close lab: %w", err)
	}
	return nil
}
