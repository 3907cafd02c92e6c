package pager

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/pager/fuse"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// What a page server's process finds open.
const (
	DeviceFD = 3 // /dev/fuse, mounted and introduced
	SlotsFD  = 4 // see fuse.Slots
)

const (
	imagesDir  = "images"
	stateFile  = "pager.json"
	logFile    = "pager.log"
	maxState   = 4096
	maxLog     = 1 << 20
	stopLimit  = 5 * time.Second
	firstPause = 10 * time.Millisecond // before a server that died is started again
	longPause  = time.Second
)

// Config says how a page server is run.
type Config struct {
	// Dir is a folder of its own, on a file system that a boot empties. Everybody
	// passes through it, to the images whose names he knows, and nobody lists
	// anything: VMMs open the bases of their disks as users of their own. So names
	// should be ones that cannot be guessed, as digests are.
	Dir string
	// Command starts the server: a program that calls fuse.Serve with DeviceFD and
	// SlotsFD until the mount goes away.
	Command []string
	// UID and GID run it.
	UID, GID int
	Log      *slog.Logger
}

// Pager holds the page server of one host. It keeps duplicates of what the server
// works with, so that either of the two may be killed.
type Pager struct {
	cfg   Config
	log   *slog.Logger
	dev   *os.File
	slots *os.File

	stop context.CancelFunc // the watching, not the server
	wg   sync.WaitGroup

	mu      sync.Mutex
	process *kernel.PidFD
	closed  bool
}

// state is what finds a running server again.
type state struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"start_time"`
}

// Open takes a running server over, or mounts and starts one.
func Open(ctx context.Context, cfg Config) (_ *Pager, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("open page server: %w", err)
		}
	}()
	if err := kernel.FUSE(); err != nil {
		return nil, sandbox.WithKind(sandbox.KindUnsupported, err)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := errors.Join(osfs.MkdirAll("pager-dir", cfg.Dir, 0o711), os.Chmod(cfg.Dir, 0o711)); err != nil { // whatever the umask
		return nil, err
	}
	p := &Pager{cfg: cfg, log: cfg.Log}
	switch err := p.adopt(); {
	case err == nil:
		p.log.Info("page server adopted", "pid", p.process.PID())
	case errors.Is(err, kernel.ErrGone), errors.Is(err, fs.ErrNotExist):
		if err := p.begin(ctx); err != nil {
			return nil, err
		}
	default:
		return nil, err
	}
	watching, stop := context.WithCancel(context.WithoutCancel(ctx))
	p.stop = stop
	p.wg.Go(func() { p.watch(watching) })
	return p, nil
}

func (p *Pager) imagesDir() string { return filepath.Join(p.cfg.Dir, imagesDir) }
func (p *Pager) statePath() string { return filepath.Join(p.cfg.Dir, stateFile) }

// Path is the file of an image.
func (p *Pager) Path(name string) string { return filepath.Join(p.imagesDir(), name) }

// File opens the file of an image as QEMU wants it, for writing too.
func (p *Pager) File(name string) (*os.File, error) {
	if err := sandbox.SafeName("image", name); err != nil {
		return nil, err
	}
	return os.OpenFile(p.Path(name), os.O_RDWR, 0)
}

// Damaged says whether something of an image could not be read since the server
// that runs was started.
func (p *Pager) Damaged(name string) bool {
	_, err := os.Lstat(p.Path(damagedPrefix + name))
	return err == nil
}

// adopt takes over the server that an earlier process started.
func (p *Pager) adopt() (err error) {
	data, err := osfs.ReadFileLimit(p.statePath(), maxState)
	if err != nil {
		return err
	}
	var s state
	if err := json.Unmarshal(data, &s); err != nil {
		return fmt.Errorf("%s: %w", p.statePath(), err)
	}
	process, err := kernel.OpenProcess(s.PID, s.StartTime)
	if err != nil {
		return err
	}
	var u undo.Stack
	u.PushClose("process", process.Close)
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run(context.Background()))
		}
	}()
	if p.dev, err = process.File(DeviceFD); err != nil {
		return fmt.Errorf("take the mount over: %w", err)
	}
	u.PushClose("device", p.dev.Close)
	if p.slots, err = process.File(SlotsFD); err != nil {
		return fmt.Errorf("take the requests over: %w", err)
	}
	p.process = process
	return nil
}

// begin mounts and starts the first server. A mount that nobody serves any more
// is taken away first: what lay on it is lost.
func (p *Pager) begin(ctx context.Context) (err error) {
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run(ctx))
		}
	}()
	if err := errors.Join(fuse.Unmount(p.imagesDir()), osfs.MkdirAll("pager-dir", p.imagesDir(), 0o700)); err != nil {
		return err
	}
	if p.slots, err = fuse.NewSlots(); err != nil {
		return err
	}
	u.PushClose("slots", p.slots.Close)
	if p.dev, err = fuse.Mount(p.imagesDir()); err != nil {
		return err
	}
	u.PushClose("mount", func() error { return errors.Join(fuse.Unmount(p.imagesDir()), p.dev.Close()) })
	return p.spawn()
}

// spawn starts a server and writes down who it is.
func (p *Pager) spawn() (err error) {
	output, err := p.openLog()
	if err != nil {
		return err
	}
	defer func() { _ = output.Close() }() // the server has its own
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer func() { _ = null.Close() }() // nothing was written
	pidfd := -1
	sys := &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd}
	if p.cfg.UID != 0 {
		sys.Credential = &syscall.Credential{Uid: uint32(p.cfg.UID), Gid: uint32(p.cfg.GID)}
	}
	child, err := os.StartProcess(p.cfg.Command[0], p.cfg.Command, &os.ProcAttr{
		Dir: "/", Env: environment(), Sys: sys,
		Files: []*os.File{null, output, output, p.dev, p.slots},
	})
	if err != nil {
		return fmt.Errorf("start page server: %w", err)
	}
	process, err := kernel.HoldChild(child, pidfd)
	if err != nil {
		return err
	}
	started, err := kernel.ProcStartTime(process.PID())
	if err == nil {
		err = p.note(state{process.PID(), started})
	}
	if err != nil {
		return errors.Join(err, end(context.Background(), process))
	}
	p.mu.Lock()
	old := p.process
	p.process = process
	p.mu.Unlock()
	if old != nil {
		return old.Close()
	}
	return nil
}

func (p *Pager) note(s state) error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return osfs.WriteFile("pager-state", p.statePath(), data, 0o600)
}

// environment is ours without the faults that tests have put into it: they are
// meant for us, and name files that a server without rights cannot write.
func environment() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "DORMOUSE_FAULT") })
}

// openLog opens what servers say, for more; one that has grown large begins anew.
func (p *Pager) openLog() (*os.File, error) {
	path := filepath.Join(p.cfg.Dir, logFile)
	flags := os.O_CREATE | os.O_WRONLY | os.O_APPEND
	if info, err := os.Stat(path); err == nil && info.Size() > maxLog {
		flags |= os.O_TRUNC
	}
	return os.OpenFile(path, flags, 0o600)
}

// watch starts another server whenever one ends.
func (p *Pager) watch(ctx context.Context) {
	pause, short := firstPause, 0
	for {
		p.mu.Lock()
		process := p.process
		p.mu.Unlock()
		began := time.Now()
		if err := process.Wait(ctx); err != nil {
			return // we stop watching, or it is being stopped
		}
		status, _ := process.Reap() // unknown where it is not our child
		p.log.Warn("page server ended, another one is started", "pid", process.PID(), "status", status)
		if time.Since(began) > longPause {
			pause, short = firstPause, 0
		} else if short++; short > 1 { // it cannot live: that it is tried again must not cost all of the machine
			if pause = min(2*pause, longPause); !sleep(ctx, pause) {
				return
			}
		}
		for {
			if err := p.spawn(); err == nil {
				break
			} else {
				p.log.Error("page server not started, will try again", "err", err)
			}
			if pause = min(2*pause, longPause); !sleep(ctx, pause) {
				return
			}
		}
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// Close gives the server up and leaves it running.
func (p *Pager) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	p.mu.Unlock()
	p.stop()
	p.wg.Wait()
	return errors.Join(p.process.Close(), p.dev.Close(), p.slots.Close())
}

// Stop ends the server and takes the mount away: what still lies on it is lost.
func (p *Pager) Stop(ctx context.Context) error {
	p.stop()
	p.wg.Wait()
	return errors.Join(end(ctx, p.process), fuse.Unmount(p.imagesDir()), osfs.Remove("pager-state", p.statePath()), p.Close())
}

// end kills a server and waits until it is gone.
func end(ctx context.Context, process *kernel.PidFD) error {
	if err := process.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, kernel.ErrGone) {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopLimit)
	defer cancel()
	err := process.Wait(ctx)
	_, _ = process.Reap() // unknown where it is not our child
	return err
}

// Sweep takes away what is left of a server and its mount that nobody holds.
func Sweep(ctx context.Context, dir string) error {
	p := &Pager{cfg: Config{Dir: dir}, log: slog.New(slog.DiscardHandler), stop: func() {}}
	err := p.adopt()
	if err == nil {
		return p.Stop(ctx)
	}
	if errors.Is(err, kernel.ErrGone) || errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, fuse.Unmount(p.imagesDir()))
}
