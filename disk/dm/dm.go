package dm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Config says whose devices these are. One process at a time has an instance.
type Config struct {
	// Instance is in the name of everything: five of a-z and 0-9.
	Instance string
	// NodeDir is where the nodes are that VMMs open; the default is
	// /dev/dormouse. It must be on a file system that a boot empties.
	NodeDir string
	// BusyLimit is how long a device that is still open is waited for; the
	// default is 3 s.
	BusyLimit time.Duration
	Log       *slog.Logger
}

const (
	defaultNodeDir   = "/dev/dormouse"
	defaultBusyLimit = 3 * time.Second
	loadLimit        = time.Second // see load

	sector = 512 // bytes: what tables count in
)

// kernelCalls is what a driver asks of the kernel, so that a test can run the
// driver where there is no device-mapper.
type kernelCalls interface {
	// Mapped devices.
	List() ([]listed, error)
	Status(name string) (device, error)
	Deps(name string) ([]uint64, error)
	Info(name string) ([]target, error)
	Make(name string) error
	Load(name string, readOnly bool, table []target) error
	Resume(name string) error
	Suspend(name string) error
	Unload(name string) error
	Drop(name string) error
	Holders(dev uint64) (int, error)
	Openers(dev uint64) []string
	// Loop devices.
	Attach(file *os.File, tag string, readOnly bool) (held, error)
	LoopAt(dev uint64) (loop, error)
	Loops(prefix string) ([]loop, error)
	Clear(dev uint64) error
	// Nodes.
	MakeNode(name string, dev uint64, uid, gid int) error
	NodeOwner(name string) (uid, gid int, err error)
	RemoveNode(name string) error
	Nodes(prefix string) ([]string, error)
	OpenNode(name string) (reader, error)

	Close() error
}

// linux is the real one.
type linux struct {
	control
	loops
	nodes
}

func (l linux) Close() error { return l.file.Close() }

// Driver makes disks. It is safe for concurrent use.
type Driver struct {
	cfg Config
	k   kernelCalls
	log *slog.Logger

	// busy has one lock per disk and per layer; they come before mu.
	busy keyed
	// mu is for the devices that disks share: it is held while they are made and
	// dropped. Nothing under it waits or reads more than a few blocks; the overlay
	// of a large disk takes longer, for the kernel reads all that is in it.
	mu sync.Mutex
	// pinned counts, by the name of a base, the disks that are about to use it.
	pinned map[string]int
	// checked is, by the name of a layer, what Check found last.
	checked map[string]checked
}

// Available says what the kernel lacks for all this, and asks for the modules.
func Available() error {
	if err := kernel.DeviceMapper("linear", "zero", "snapshot", "verity"); err != nil {
		return err
	}
	return kernel.Loop()
}

// Open makes a driver where the kernel can do all this.
func Open(cfg Config) (*Driver, error) {
	if err := Available(); err != nil {
		return nil, sandbox.Errorf(sandbox.KindUnsupported, "open device-mapper disks: %w", err)
	}
	cfg = cfg.withDefaults()
	ctl, err := openControl()
	if err != nil {
		return nil, err
	}
	d, err := open(cfg, linux{control: ctl, nodes: nodes{cfg.NodeDir}})
	if err != nil {
		return nil, errors.Join(err, ctl.file.Close())
	}
	return d, nil
}

func (c Config) withDefaults() Config {
	if c.NodeDir == "" {
		c.NodeDir = defaultNodeDir
	}
	if c.BusyLimit == 0 {
		c.BusyLimit = defaultBusyLimit
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

func open(cfg Config, k kernelCalls) (*Driver, error) {
	if !instanceForm.MatchString(cfg.Instance) {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "instance %q is not five of a-z and 0-9", cfg.Instance)
	}
	if !filepath.IsAbs(cfg.NodeDir) {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "node directory %q must be an absolute path", cfg.NodeDir)
	}
	return &Driver{cfg: cfg, k: k, log: cfg.Log, pinned: map[string]int{}, checked: map[string]checked{}}, nil
}

// Name is "dm".
func (d *Driver) Name() string { return "dm" }

// Close gives up the driver. The disks stay as they are.
func (d *Driver) Close() error { return d.k.Close() }

// step is one call that a test can fail, before it is made or after.
func (d *Driver) step(ctx context.Context, name string, call func() error) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if err := fault.Point(ctx, "dm/"+name); err != nil {
		return err
	}
	return errors.Join(call(), fault.Point(ctx, "dm/"+name+"/done"))
}

// build makes a device with a table.
func (d *Driver) build(ctx context.Context, what, name string, readOnly bool, table []target) error {
	for _, s := range []struct {
		verb string
		call func() error
	}{
		{"make", func() error { return d.k.Make(name) }},
		{"load", func() error { return d.load(ctx, name, readOnly, table) }},
		{"resume", func() error { return d.k.Resume(name) }},
	} {
		if err := d.step(ctx, what+"/"+s.verb, s.call); err != nil {
			return fmt.Errorf("%s device %s: %w", s.verb, name, err)
		}
	}
	return nil
}

// drop removes a device that nobody may have open, and waits until the loop
// devices below are gone too. Removing what is gone is success.
func (d *Driver) drop(ctx context.Context, what, name string) error {
	var below []loop
	err := d.notBusy(ctx, func() (err error) { below, err = d.dropOnce(ctx, what, name); return })
	if err != nil {
		return fmt.Errorf("remove device %s: %w%s", name, err, d.whoHas(name))
	}
	return d.loopsGone(ctx, below)
}

// dropOnce tells which loop devices were below the device.
func (d *Driver) dropOnce(ctx context.Context, what, name string) ([]loop, error) {
	below, err := d.loopsBelow(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look below: %w", err)
	}
	return below, d.step(ctx, what+"/drop", func() error {
		err := d.k.Drop(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
}

// loopsBelow are the loop devices that a device's table uses.
func (d *Driver) loopsBelow(name string) ([]loop, error) {
	deps, err := d.k.Deps(name)
	if err != nil {
		return nil, err
	}
	var below []loop
	for _, dev := range deps {
		if unix.Major(dev) != loopMajor {
			continue
		}
		l, err := d.k.LoopAt(dev)
		if err != nil {
			return nil, fmt.Errorf("loop device %s: %w", number(dev), err)
		}
		below = append(below, l)
	}
	return below, nil
}

// loopsGone waits until loop devices that were below a device have cleared
// themselves. A number may be somebody else's at once: then the tag is another,
// or, for the same layer's next user, a table holds it.
func (d *Driver) loopsGone(ctx context.Context, below []loop) error {
	return d.notBusy(ctx, func() error {
		for _, was := range below {
			is, err := d.k.LoopAt(was.dev)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			holders, err := d.k.Holders(was.dev)
			if err == nil && holders == 0 && is.tag == was.tag && is.inode == was.inode {
				return fmt.Errorf("loop device %s over %s is still there: %w", number(was.dev), was.path, unix.EBUSY)
			}
		}
		return nil
	})
}

// load loads a table. Tables that come and go at the same time can be in each
// other's way in the kernel: a cache of dm-bufio that is being destroyed has the
// sysfs name of the one to be made, and the answer is that there is no memory
// (Linux 6.0 and later, see "sysfs: cannot create duplicate filename" in its log).
func (d *Driver) load(ctx context.Context, name string, readOnly bool, table []target) error {
	return d.again(ctx, loadLimit, unix.ENOMEM, func() error { return d.k.Load(name, readOnly, table) })
}

// notBusy makes a call again while the answer is that something is busy, and
// for nothing else.
func (d *Driver) notBusy(ctx context.Context, call func() error) error {
	err := d.again(ctx, d.cfg.BusyLimit, unix.EBUSY, call)
	if errors.Is(err, unix.EBUSY) && ctx.Err() == nil {
		return sandbox.Errorf(sandbox.KindBusy, "after %v: %w", d.cfg.BusyLimit, err)
	}
	return err
}

// again makes a call until its error is another one than while, or the limit is
// over. The last call comes after the limit: a busy machine may have slept through it.
func (d *Driver) again(ctx context.Context, limit time.Duration, while error, call func() error) error {
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	over := false
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		err := call()
		if over || !errors.Is(err, while) {
			return err
		}
		select {
		case <-time.After(pause):
		case <-deadline.C:
			over = true
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), err)
		}
	}
}

// whoHas is for the end of an error.
func (d *Driver) whoHas(name string) string {
	dev, err := d.k.Status(name)
	if err != nil {
		return ""
	}
	who := d.k.Openers(dev.dev)
	if len(who) == 0 {
		return ""
	}
	return ": open in " + strings.Join(who, ", ")
}

// keyed is a lock per name.
type keyed struct {
	mu   sync.Mutex
	held map[string]chan struct{}
}

func (k *keyed) lock(ctx context.Context, name string) (unlock func(), err error) {
	for {
		k.mu.Lock()
		wait, taken := k.held[name]
		if !taken {
			free := make(chan struct{})
			if k.held == nil {
				k.held = map[string]chan struct{}{}
			}
			k.held[name] = free
			k.mu.Unlock()
			return func() {
				k.mu.Lock()
				delete(k.held, name)
				k.mu.Unlock()
				close(free)
			}, nil
		}
		k.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
