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
	// Keeper starts a program that has the same descriptors and does nothing: while
	// it lives, server and holder may both be killed. Empty: there is none.
	Keeper []string
	// UID and GID run both.
	UID, GID int
	Log      *slog.Logger
}

// Pager holds the page server of one host. It keeps duplicates of what the server
// works with, and so does a third process, the keeper, so that any two of the three
// may be killed at once.
type Pager struct {
	cfg   Config
	log   *slog.Logger
	dev   *os.File
	slots *os.File

	stop context.CancelFunc // the watching, not the server
	wg   sync.WaitGroup

	mu      sync.Mutex
	process *kernel.PidFD // the server
	keeper  *kernel.PidFD // nil where there is none
	state   state
	closed  bool
}

// state is what finds a running server again, or its keeper.
type state struct {
	PID       int     `json:"pid"`
	StartTime uint64  `json:"start_time"`
	Keeper    *person `json:"keeper,omitempty"`
}

// person is a process that a number alone does not name.
type person struct {
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
	case err == nil && p.process != nil:
		p.log.Info("page server adopted", "pid", p.process.PID())
	case err == nil:
		p.log.Warn("page server is gone, another one is started on what was kept", "keeper", p.keeper.PID())
		if err := p.spawn(); err != nil {
			return nil, errors.Join(err, p.letGo())
		}
	case errors.Is(err, kernel.ErrGone), errors.Is(err, fs.ErrNotExist):
		if err := p.begin(ctx); err != nil {
			return nil, err
		}
	default:
		return nil, err
	}
	if err := p.spawnKeeper(); err != nil { // the watch tries again
		p.log.Error("keeper of the page server not started, will try again", "err", err)
	}
	watching, stop := context.WithCancel(context.WithoutCancel(ctx))
	p.stop = stop
	p.wg.Go(func() { p.watch(watching) })
	if len(cfg.Keeper) > 0 {
		p.wg.Go(func() { p.watchKeeper(watching) })
	}
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

// adopt takes over the server that an earlier process started, or, if that is gone,
// what its keeper has: then p.process is nil.
func (p *Pager) adopt() (err error) {
	data, err := osfs.ReadFileLimit(p.statePath(), maxState)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, &p.state); err != nil {
		return fmt.Errorf("%s: %w", p.statePath(), err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.letGo())
		}
	}()
	if k := p.state.Keeper; k != nil {
		if p.keeper, err = kernel.OpenProcess(k.PID, k.StartTime); err != nil && !errors.Is(err, kernel.ErrGone) {
			return err
		}
	}
	p.process, err = kernel.OpenProcess(p.state.PID, p.state.StartTime)
	if err == nil {
		if err = p.takeOver(p.process); err == nil {
			return nil
		}
	}
	if p.keeper == nil {
		return err
	}
	if p.process != nil { // it was ending
		if err := p.process.Close(); err != nil {
			return err
		}
		p.process = nil
	}
	return p.takeOver(p.keeper)
}

// takeOver gets duplicates of what a process has.
func (p *Pager) takeOver(from *kernel.PidFD) error {
	dev, err := from.File(DeviceFD)
	if err != nil {
		return fmt.Errorf("take the mount over: %w", err)
	}
	slots, err := from.File(SlotsFD)
	if err != nil {
		return errors.Join(fmt.Errorf("take the requests over: %w", err), dev.Close())
	}
	p.dev, p.slots = dev, slots
	return nil
}

// letGo closes everything that is held.
func (p *Pager) letGo() error {
	var errs []error
	for _, process := range []*kernel.PidFD{p.process, p.keeper} {
		if process != nil {
			errs = append(errs, process.Close())
		}
	}
	for _, file := range []*os.File{p.dev, p.slots} {
		if file != nil {
			errs = append(errs, file.Close())
		}
	}
	p.process, p.keeper, p.dev, p.slots, p.state = nil, nil, nil, nil, state{}
	return errors.Join(errs...)
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
func (p *Pager) spawn() error {
	process, who, err := p.start(p.cfg.Command)
	if err != nil {
		return fmt.Errorf("start page server: %w", err)
	}
	p.mu.Lock()
	p.state.PID, p.state.StartTime = who.PID, who.StartTime
	err = p.note()
	old := p.process
	if err == nil {
		p.process = process
	}
	p.mu.Unlock()
	if err != nil {
		return errors.Join(err, end(context.Background(), process))
	}
	if old != nil {
		return old.Close()
	}
	return nil
}

// spawnKeeper starts a keeper if there is to be one and is none.
func (p *Pager) spawnKeeper() error {
	p.mu.Lock()
	have := p.keeper != nil && !p.keeper.Exited()
	p.mu.Unlock()
	if have || len(p.cfg.Keeper) == 0 {
		return nil
	}
	process, who, err := p.start(p.cfg.Keeper)
	if err != nil {
		return fmt.Errorf("start keeper: %w", err)
	}
	p.mu.Lock()
	p.state.Keeper = &who
	err = p.note()
	old := p.keeper
	if err == nil {
		p.keeper = process
	}
	p.mu.Unlock()
	if err != nil {
		return errors.Join(err, end(context.Background(), process))
	}
	if old != nil {
		return old.Close()
	}
	return nil
}

// start starts a process with what a server works with.
func (p *Pager) start(command []string) (*kernel.PidFD, person, error) {
	output, err := p.openLog()
	if err != nil {
		return nil, person{}, err
	}
	defer func() { _ = output.Close() }() // the process has its own
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, person{}, err
	}
	defer func() { _ = null.Close() }() // nothing was written
	pidfd := -1
	sys := &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd}
	if p.cfg.UID != 0 {
		sys.Credential = &syscall.Credential{Uid: uint32(p.cfg.UID), Gid: uint32(p.cfg.GID)}
	}
	child, err := os.StartProcess(command[0], command, &os.ProcAttr{
		Dir: "/", Env: environment(), Sys: sys,
		Files: []*os.File{null, output, output, p.dev, p.slots},
	})
	if err != nil {
		return nil, person{}, err
	}
	process, err := kernel.HoldChild(child, pidfd)
	if err != nil {
		return nil, person{}, err
	}
	started, err := kernel.ProcStartTime(process.PID())
	if err != nil {
		return nil, person{}, errors.Join(err, end(context.Background(), process))
	}
	return process, person{process.PID(), started}, nil
}

// note writes the state down; the caller holds mu.
func (p *Pager) note() error {
	data, err := json.Marshal(p.state)
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

// watchKeeper starts another keeper whenever one ends.
func (p *Pager) watchKeeper(ctx context.Context) {
	for ctx.Err() == nil {
		p.mu.Lock()
		keeper := p.keeper
		p.mu.Unlock()
		if keeper != nil {
			if err := keeper.Wait(ctx); err != nil {
				return // we stop watching
			}
			_, _ = keeper.Reap() // unknown where it is not our child
		}
		if err := p.spawnKeeper(); err != nil {
			p.log.Error("keeper of the page server not started, will try again", "err", err)
		}
		if !sleep(ctx, longPause) {
			return
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
	return p.letGo()
}

// Stop ends the server and takes the mount away: what still lies on it is lost.
func (p *Pager) Stop(ctx context.Context) error {
	p.stop()
	p.wg.Wait()
	var errs []error
	for _, process := range []*kernel.PidFD{p.process, p.keeper} {
		if process != nil {
			errs = append(errs, end(ctx, process))
		}
	}
	errs = append(errs, fuse.Unmount(p.imagesDir()), osfs.Remove("pager-state", p.statePath()), p.Close())
	return errors.Join(errs...)
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
