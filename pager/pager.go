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
	"strconv"
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

	programFD = 5 // the program itself
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

	mu     sync.Mutex // guards what is below
	server role
	keeper role
	state  state
	closed bool
}

// role is what a process of ours is there for.
type role struct {
	name    string
	command []string // empty: there is nobody
	process *kernel.PidFD
	written func(*state) *identity // where it is written down
}

// state is what finds the processes again: the server, and its keeper.
type state struct {
	identity
	Keeper identity `json:"keeper,omitzero"`
}

// identity is a process; its number alone does not name it.
type identity struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"start_time"`
}

func newPager(cfg Config, log *slog.Logger) *Pager {
	return &Pager{
		cfg: cfg, log: log, stop: func() {},
		server: role{"page server", cfg.Command, nil, func(s *state) *identity { return &s.identity }},
		keeper: role{"keeper of the page server", cfg.Keeper, nil, func(s *state) *identity { return &s.Keeper }},
	}
}

// roles are both; the server comes first.
func (p *Pager) roles() []*role { return []*role{&p.server, &p.keeper} }

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
	p := newPager(cfg, cfg.Log)
	err = p.adopt()
	if errors.Is(err, kernel.ErrGone) || errors.Is(err, fs.ErrNotExist) {
		err = p.mount(ctx)
	}
	if err != nil {
		return nil, err
	}
	if p.server.process == nil {
		if err := p.replace(&p.server); err != nil {
			return nil, errors.Join(err, p.abandon(ctx))
		}
	} else {
		p.log.Info("page server adopted", "pid", p.server.process.PID())
	}
	if len(cfg.Keeper) > 0 && p.keeper.process == nil {
		if err := p.replace(&p.keeper); err != nil { // it is not needed to serve
			p.log.Error(p.keeper.name+" not started, will try again", "err", err)
		}
	}
	var watching context.Context
	watching, p.stop = context.WithCancel(context.WithoutCancel(ctx))
	for _, r := range p.roles() {
		if len(r.command) > 0 {
			p.wg.Go(func() { p.watch(watching, r) })
		}
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

// adopt takes over what an earlier process had: from the server that it started,
// or if that is gone, from its keeper.
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
	for _, r := range p.roles() {
		who := r.written(&p.state)
		if *who == (identity{}) {
			continue
		}
		process, err := kernel.OpenProcess(who.PID, who.StartTime)
		if errors.Is(err, kernel.ErrGone) {
			continue
		}
		if err != nil {
			return err
		}
		r.process = process
		if p.dev != nil {
			continue
		}
		err = p.takeOver(process)
		if errors.Is(err, kernel.ErrGone) { // it is just ending
			r.process, err = nil, process.Close()
		}
		if err != nil {
			return err
		}
	}
	if p.dev == nil {
		return fmt.Errorf("server and keeper: %w", kernel.ErrGone)
	}
	return nil
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
	for _, r := range p.roles() {
		if r.process != nil {
			errs = append(errs, r.process.Close())
		}
		r.process = nil
	}
	for _, file := range []*os.File{p.dev, p.slots} {
		if file != nil {
			errs = append(errs, file.Close())
		}
	}
	p.dev, p.slots, p.state = nil, nil, state{}
	return errors.Join(errs...)
}

// abandon undoes an Open. A mount that a keeper has is left to the next one.
func (p *Pager) abandon(ctx context.Context) error {
	if p.keeper.process != nil {
		return p.letGo()
	}
	return p.Stop(ctx)
}

// mount makes what a server works with. A mount that nobody serves any more is
// taken away first: what lay on it is lost.
func (p *Pager) mount(ctx context.Context) (err error) {
	if err := errors.Join(fuse.Unmount(p.imagesDir()), osfs.MkdirAll("pager-dir", p.imagesDir(), 0o700)); err != nil {
		return err
	}
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run(ctx))
		}
	}()
	if p.slots, err = fuse.NewSlots(); err != nil {
		return err
	}
	u.PushClose("slots", p.slots.Close)
	p.dev, err = fuse.Mount(p.imagesDir())
	return err
}

// replace starts a process for a role and writes down who it is.
func (p *Pager) replace(r *role) error {
	process, who, err := p.start(r.command)
	if err != nil {
		return fmt.Errorf("start the %s: %w", r.name, err)
	}
	p.mu.Lock()
	next, before := p.state, r.process
	*r.written(&next) = who
	if err = p.note(next); err == nil {
		p.state, r.process = next, process
	}
	p.mu.Unlock()
	switch {
	case err != nil:
		return errors.Join(err, end(context.Background(), process))
	case before != nil:
		return before.Close()
	}
	return nil
}

// start starts a process with what a server works with.
func (p *Pager) start(command []string) (*kernel.PidFD, identity, error) {
	output, err := p.openLog()
	if err != nil {
		return nil, identity{}, err
	}
	defer func() { _ = output.Close() }() // the process has its own
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, identity{}, err
	}
	defer func() { _ = null.Close() }() // nothing was written
	program, err := openProgram(command[0])
	if err != nil {
		return nil, identity{}, err
	}
	defer func() { _ = program.Close() }() // it is only run
	pidfd := -1
	sys := &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd}
	if p.cfg.UID != 0 {
		sys.Credential = &syscall.Credential{Uid: uint32(p.cfg.UID), Gid: uint32(p.cfg.GID)}
	}
	child, err := os.StartProcess("/proc/self/fd/"+strconv.Itoa(programFD), command, &os.ProcAttr{
		Dir: "/", Env: environment(), Sys: sys,
		Files: []*os.File{null, output, output, p.dev, p.slots, program},
	})
	if err != nil {
		return nil, identity{}, err
	}
	process, err := kernel.HoldChild(child, pidfd)
	if err != nil {
		return nil, identity{}, err
	}
	started, err := kernel.ProcStartTime(process.PID())
	if err != nil {
		return nil, identity{}, errors.Join(err, end(context.Background(), process))
	}
	return process, identity{process.PID(), started}, nil
}

// openProgram opens what is run as another user: by its descriptor, for the user
// may pass through none of the directories above it. Homes are like that.
func openProgram(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && info.Mode().Perm()&0o001 == 0 {
		err = fmt.Errorf("%s has mode %v: everybody must be allowed to execute it", path, info.Mode().Perm())
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
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

// watch starts another process whenever the one of a role ends, and the first if
// there is none.
func (p *Pager) watch(ctx context.Context, r *role) {
	pause, short := firstPause, 0
	for {
		p.mu.Lock()
		process := r.process
		p.mu.Unlock()
		if process != nil {
			began := time.Now()
			if err := process.Wait(ctx); err != nil {
				return // we stop watching, or it is being stopped
			}
			status, _ := process.Reap() // unknown where it is not our child
			p.log.Warn(r.name+" ended, another one is started", "pid", process.PID(), "status", status)
			if time.Since(began) > longPause {
				pause, short = firstPause, 0
			} else if short++; short > 1 { // it cannot live: that it is tried again must not cost all of the machine
				if pause = min(2*pause, longPause); !sleep(ctx, pause) {
					return
				}
			}
		}
		for {
			err := p.replace(r)
			if err == nil {
				break
			}
			p.log.Error(r.name+" not started, will try again", "err", err)
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
	return p.letGo()
}

// Stop ends the server and takes the mount away: what still lies on it is lost.
func (p *Pager) Stop(ctx context.Context) error {
	p.stop()
	p.wg.Wait()
	var errs []error
	for _, r := range p.roles() {
		if r.process != nil {
			errs = append(errs, end(ctx, r.process))
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
	p := newPager(Config{Dir: dir}, slog.New(slog.DiscardHandler))
	err := p.adopt()
	if err == nil {
		return p.Stop(ctx)
	}
	if errors.Is(err, kernel.ErrGone) || errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, fuse.Unmount(p.imagesDir()))
}
