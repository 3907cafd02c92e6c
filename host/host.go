package host

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
	"github.com/dormouse-sandbox/dormouse/template"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// Network is one sandbox's network, as package netns makes it.
type Network interface {
	Index() int
	NetNS() string
	OpenTap() (*os.File, error)
	MAC() string
	Guest() netip.Prefix
	Gateway() netip.Addr
	Dial(ctx context.Context, address string) (net.Conn, error)
	// SetInternet opens or closes the way to public addresses.
	SetInternet(ctx context.Context, allowed bool) error
	// Close removes everything of it; calling it again finishes what was left.
	Close(ctx context.Context) error
}

// Networks makes them. Adopt's error for one that is not there any more is
// not_found.
type Networks interface {
	Acquire(ctx context.Context) (Network, error)
	Adopt(ctx context.Context, index int) (Network, error)
	Sweep(ctx context.Context) error
}

// Templates is where images come from.
type Templates interface {
	Get(name string) (template.Template, error)
	List() ([]template.Template, error)
	Log(name string) ([]byte, error) // what its build has told
}

// Config is what an agent works with. Everything without a "default" is needed.
type Config struct {
	Dir      string // durable state: journal, keys, disks
	RunDir   string // sockets and console logs; may vanish with a reboot. Short: sockets live in it
	Instance string // unique on this machine, [a-z0-9]{5}
	Version  string

	VMM vmm.Driver
	// Disks make the sandboxes' disks: the first one new ones, and each those
	// that it has made before.
	Disks     []disk.Driver
	Networks  Networks
	Groups    Groups    // default: no control groups
	Templates Templates // for creates; not to end sandboxes
	Kitchen   Kitchen   // makes templates; default: none are made
	Kernel    string    // guest kernel image
	Initrd    string    // initramfs with the guest agent

	// Snapshots keeps what paused sandboxes go on from, and Images gives VMs files
	// of it. Default: nothing can be paused.
	Snapshots *snapshot.Store
	Images    Images

	// Warm makes creates go on from what the first one of an image and a shape has
	// booted, instead of booting each.
	Warm      bool
	MaxLayers int // of a point before it is flattened; default 32
	MaxWarm   int // warm snapshots; default 16

	// UIDBase is the first of the user IDs that VMM processes run as, one per
	// network slot; 0 leaves them as the agent's own (tests without root).
	UIDBase int

	MaxSandboxes int           // default 1000
	MaxMemMiB    int           // of all sandboxes together; default what the machine has, less 512 MiB
	MinFreeMiB   int           // free disk below which creates are refused; default 1024
	ReserveMiB   int           // free disk below which VMs that write are frozen, and below half of it all; default 256
	MaxBoots     int           // VMs booting at the same time; default the number of CPUs
	BootTimeout  time.Duration // from the VMM's start to the guest's first answer; default 60 s
	ReadyTimeout time.Duration // for a start command's health check to succeed; default 5 min
	RetryEvery   time.Duration // for what could not be removed or adopted; default 5 s
	BootID       string        // default: what the kernel says

	// FreeBytes is the free space of a folder's file system; default: what the
	// kernel says.
	FreeBytes func(dir string) (int64, error)

	// DiskReason and GroupsReason say why it is this driver, and why there are
	// no control groups. They are for people.
	DiskReason, GroupsReason string

	Log *slog.Logger     // default: none
	Now func() time.Time // default time.Now
}

// Agent owns the sandboxes of one machine. Only one may be open on a Dir.
type Agent struct {
	cfg     Config
	log     *slog.Logger
	journal journal
	key     ed25519.PrivateKey // signs what only the host may ask of a guest
	lock    *os.File
	boots   chan struct{} // a token each for VMs that boot at the same time
	builds  chan struct{} // a token each for templates that are being built

	commands commands

	garbage atomic.Bool // something may have become needless in the snapshot store
	naming  sync.Mutex  // one snapshot is given its name at a time

	sweeping sync.Mutex // one sweep at a time; taken before mu

	// ctx ends when the agent closes; VMs do not end with it.
	ctx  context.Context
	stop context.CancelFunc
	wg   sync.WaitGroup

	mu      sync.Mutex // guards what is below; nothing is waited for under it
	boxes   map[sandbox.ID]*box
	closed  bool
	unswept bool // the sweep is due: it failed, or a stranded sandbox holds it back
	damage  map[string]bool
}

// Open takes over what an earlier agent left: running VMs are adopted, what was
// half made or half removed is removed, and what nobody owns is swept.
func Open(ctx context.Context, cfg Config) (_ *Agent, err error) {
	cfg = cfg.withDefaults()
	if err := makeDirs(cfg); err != nil {
		return nil, err
	}
	lock, err := lockDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, lock.Close())
		}
	}()
	key, err := loadKey(filepath.Join(cfg.Dir, "host.key"))
	if err != nil {
		return nil, fmt.Errorf("host key: %w", err)
	}
	if cfg.BootID == "" {
		if cfg.BootID, err = kernel.BootID(); err != nil {
			return nil, err
		}
	}
	a := &Agent{
		cfg: cfg, log: cfg.Log, journal: journal{dir: filepath.Join(cfg.Dir, "journal")}, key: key,
		lock: lock, boots: make(chan struct{}, cfg.MaxBoots), builds: make(chan struct{}, buildsAtOnce), boxes: map[sandbox.ID]*box{}, damage: map[string]bool{},
	}
	a.ctx, a.stop = context.WithCancel(context.Background())
	if err := a.recover(ctx); err != nil {
		a.stop()
		a.wg.Wait()
		return nil, fmt.Errorf("recover: %w", err)
	}
	if err := a.sweepWarm(); err != nil {
		a.log.Error("warm snapshots not swept", "err", err)
	}
	a.collectSoon() // what a crash left
	a.keepHouse()
	return a, nil
}

// makeDirs makes the agent's folders. VMs pass through some of them to their
// own, as users of their own; they list nothing.
func makeDirs(cfg Config) error {
	for _, d := range []struct {
		path string
		perm fs.FileMode
	}{
		{cfg.Dir, 0o711},
		{cfg.RunDir, 0o711},
		{filepath.Join(cfg.Dir, "sandboxes"), 0o711},
		{filepath.Join(cfg.Dir, "journal"), 0o700},
		{filepath.Join(cfg.Dir, "consoles"), 0o700},
	} {
		if err := osfs.MkdirAll("host-dirs", d.path, d.perm); err != nil {
			return fmt.Errorf("make %s: %w", d.path, err)
		}
	}
	return nil
}

func (c Config) withDefaults() Config {
	if c.MaxSandboxes == 0 {
		c.MaxSandboxes = 1000
	}
	if c.MaxMemMiB == 0 {
		c.MaxMemMiB = max(sandbox.MinMemMiB, memTotalMiB()-512)
	}
	if c.MinFreeMiB == 0 {
		c.MinFreeMiB = 1024
	}
	if c.ReserveMiB == 0 {
		c.ReserveMiB = defaultReserve
	}
	if c.FreeBytes == nil {
		c.FreeBytes = freeBytes
	}
	if c.MaxBoots == 0 {
		c.MaxBoots = runtime.NumCPU()
	}
	if c.BootTimeout == 0 {
		c.BootTimeout = 60 * time.Second
	}
	if c.ReadyTimeout == 0 {
		c.ReadyTimeout = 5 * time.Minute
	}
	if c.RetryEvery == 0 {
		c.RetryEvery = 5 * time.Second
	}
	if c.MaxLayers == 0 {
		c.MaxLayers = 32
	}
	if c.MaxWarm == 0 {
		c.MaxWarm = 16
	}
	if c.Groups == nil {
		c.Groups = noGroups{}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c
}

// Close stops the agent and leaves every VM running for the next one. Calls
// under way end with an error, and commands that somebody follows are killed, as
// if he had gone.
func (a *Agent) Close() error {
	a.mu.Lock()
	if a.closed {
		a.mu.Unlock()
		return nil
	}
	a.closed = true
	boxes := a.snapshot()
	a.mu.Unlock()

	a.commands.close()
	a.stop()
	if !a.commands.wait(stopLimit) {
		a.log.Warn("commands in guests may outlive their calls: they were not killed in time", "limit", stopLimit)
	}
	var errs []error
	for _, b := range boxes {
		b.op.Lock() // a create or destroy under way ends first
		if b.machine != nil {
			errs = append(errs, b.machine.release())
		}
		b.op.Unlock()
	}
	a.wg.Wait()
	return errors.Join(append(errs, a.lock.Close())...)
}

func (a *Agent) isClosed() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.closed
}

// has says whether the agent still knows this very sandbox.
func (a *Agent) has(b *box) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.boxes[b.id] == b
}

// snapshot lists the sandboxes; the caller holds mu.
func (a *Agent) snapshot() []*box {
	boxes := make([]*box, 0, len(a.boxes))
	for _, b := range a.boxes {
		boxes = append(boxes, b)
	}
	return boxes
}

// all lists the sandboxes.
func (a *Agent) all() []*box {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.snapshot()
}

// box finds a sandbox by an ID from outside.
func (a *Agent) box(id string) (*box, error) {
	parsed, err := sandbox.ParseID(id)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	b, ok := a.boxes[parsed]
	if !ok {
		return nil, sandbox.Errorf(sandbox.KindNotFound, "sandbox %s is not on this host", parsed)
	}
	return b, nil
}

// runDir is where a sandbox's socket and console log are.
func (a *Agent) runDir(id sandbox.ID) string { return filepath.Join(a.cfg.RunDir, string(id)) }

// stateDir is where a sandbox's disk is.
func (a *Agent) stateDir(id sandbox.ID) string {
	return filepath.Join(a.cfg.Dir, "sandboxes", string(id))
}
