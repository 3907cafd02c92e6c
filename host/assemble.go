package host

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// plan says where a machine comes from. Every verb that makes a machine fills
// in one of these and calls assemble.
type plan struct {
	entry entry
	// image is the template's, for a machine that boots.
	image template.Template
	// from is what the machine goes on from; nil if it boots.
	from  *point
	start sandbox.Start
	// warm names what the machine is kept as when it has booted; empty if it is not.
	warm    string
	noStart bool // the template's start command is left alone
}

// assemble makes a machine and returns when its guest answers and knows who it
// is. It is the only way to make one. On an error nothing of it is left and the
// machine is nil; when the roll-back failed too, the machine is what is left.
func (a *Agent) assemble(ctx context.Context, p plan, watch *stopwatch) (left *machine, _ *guest, err error) {
	m := &machine{a: a, id: p.entry.ID}
	var u undo.Stack
	defer func() {
		if err == nil {
			return
		}
		rollback := u.Run(ctx)
		if rollback != nil {
			left = m
		}
		err = errors.Join(err, rollback)
	}()

	u.Push("folders", m.removeDirs)
	if err := m.makeDirs(ctx); err != nil {
		return nil, nil, fmt.Errorf("make folders: %w", sandbox.NoSpace(err))
	}
	watch.lap("folders")

	if err := m.attachNetwork(ctx, p); err != nil {
		return nil, nil, fmt.Errorf("attach network: %w", err)
	}
	u.Push("network", m.removeNetwork)
	if err := m.openNetwork(ctx, p); err != nil {
		return nil, nil, fmt.Errorf("open network: %w", err)
	}
	watch.lap("network")

	u.PushClose("pins", m.unpin)
	if err := m.createDisk(ctx, p); err != nil {
		return nil, nil, fmt.Errorf("create disk: %w", sandbox.NoSpace(err))
	}
	u.Push("disk", m.removeDisk)
	watch.lap("disk")

	if err := m.makeGroup(ctx, p); err != nil {
		return nil, nil, fmt.Errorf("make control group: %w", err)
	}
	u.Push("control group", m.removeGroup)
	watch.lap("cgroup")

	u.Push("vm", m.removeVM)
	g := a.newGuest(m.network, p.entry.Token)
	u.PushClose("guest connections", g.close)
	if err := m.runVM(ctx, p, g, watch); err != nil {
		return nil, nil, err
	}
	if err := m.keepWarm(ctx, p, watch); err != nil {
		return nil, nil, fmt.Errorf("keep warm: %w", err)
	}
	if err := m.introduce(ctx, g, p); err != nil {
		return nil, nil, ofRestore(p, fmt.Errorf("introduce guest: %w", err))
	}
	watch.lap("identity")
	u.Take()
	return m, g, nil
}

func (m *machine) makeDirs(ctx context.Context) error {
	if err := fault.Point(ctx, "host/create/folders"); err != nil {
		return err
	}
	if err := osfs.MkdirAll("sandbox-dir", m.a.stateDir(m.id), 0o711); err != nil {
		return err
	}
	return os.Mkdir(m.a.runDir(m.id), 0o711)
}

func (m *machine) attachNetwork(ctx context.Context, _ plan) error {
	if err := fault.Point(ctx, "host/create/network"); err != nil {
		return err
	}
	network, err := m.a.cfg.Networks.Acquire(ctx)
	if err != nil {
		return err
	}
	m.network = network
	return nil
}

func (m *machine) openNetwork(ctx context.Context, p plan) error {
	if err := fault.Point(ctx, "host/create/policy"); err != nil {
		return err
	}
	return m.network.SetInternet(ctx, p.entry.Spec.Network.Internet)
}

// uid is the user that this machine's VMM runs as.
func (m *machine) uid() int {
	if m.a.cfg.UIDBase == 0 {
		return 0
	}
	return m.a.cfg.UIDBase + m.network.Index()
}

func (m *machine) diskConfig(p plan) disk.Config {
	return disk.Config{
		Dir: m.a.stateDir(m.id), Base: p.image.Image,
		SizeBytes: max(int64(p.entry.Spec.DiskMiB)<<20, p.image.ImageBytes),
		UID:       m.uid(), GID: m.uid(),
	}
}

func (m *machine) createDisk(ctx context.Context, p plan) error {
	if err := fault.Point(ctx, "host/create/disk"); err != nil {
		return err
	}
	config := m.diskConfig(p)
	driver := m.a.cfg.Disks[0]
	if err := m.layBase(ctx, p, driver.Name(), &config); err != nil {
		return fmt.Errorf("base of the disk: %w", err)
	}
	d, err := driver.Create(ctx, config)
	if err != nil {
		return err
	}
	m.disk, m.config = d, config
	return nil
}

// layBase finds what the disk lies on. Where the host keeps snapshots that is an
// image of its store, so that the next point is a diff to it.
func (m *machine) layBase(ctx context.Context, p plan, driver string, config *disk.Config) (err error) {
	switch {
	case p.from != nil:
		m.base = p.from.Disk
	case m.a.cfg.Snapshots == nil || p.entry.Build:
		return nil
	default:
		pin, err := m.a.cfg.Images.Base(ctx, p.image, config.SizeBytes)
		if err != nil {
			return err
		}
		m.pins, m.base = append(m.pins, pin.Release), pin.Digest
	}
	config.Base, config.Layout, err = m.a.cfg.Images.Disk(ctx, driver, m.base)
	return err
}

// runVM starts the VM and returns when its guest answers.
func (m *machine) runVM(ctx context.Context, p plan, g *guest, watch *stopwatch) error {
	if p.from == nil {
		return m.bootVM(ctx, p, g, watch)
	}
	if err := m.restoreVM(ctx, p, watch); err != nil {
		return ofRestore(p, fmt.Errorf("restore vm: %w", err))
	}
	err := m.awaitGuest(ctx, g)
	watch.lap("answer")
	return ofRestore(p, err)
}

// restoreError is a failure that another start, by booting, need not meet.
type restoreError struct{ error }

func (e restoreError) Unwrap() error { return e.error }

// ofRestore marks a failure of a machine that goes on from a point.
func ofRestore(p plan, err error) error {
	if err == nil || p.from == nil {
		return err
	}
	return restoreError{err}
}

// restoreVM starts the VM where another one stopped.
func (m *machine) restoreVM(ctx context.Context, p plan, watch *stopwatch) error {
	if err := fault.Point(ctx, "host/restore/images"); err != nil {
		return err
	}
	devices, err := m.a.cfg.Snapshots.Object(p.from.Devices)
	if err != nil {
		return err
	}
	var console []byte
	if !p.from.Console.IsZero() {
		if console, err = m.a.cfg.Snapshots.Object(p.from.Console); err != nil {
			return err
		}
	}
	memory, err := m.a.cfg.Images.Memory(p.from.Memory)
	if err != nil {
		return fmt.Errorf("open memory: %w", err)
	}
	defer func() { _ = memory.Close() }() // the VMM has its own
	spec, tap, err := m.vmSpec(p)
	if err != nil {
		return err
	}
	defer func() { _ = tap.Close() }() // the VMM has its own
	spec.Restore = &vmm.Restore{Memory: memory, Devices: devices, Compat: p.from.Compat, Console: console}
	watch.lap("images")
	if err := fault.Point(ctx, "host/restore/vm"); err != nil {
		return err
	}
	if m.vm, err = m.a.cfg.VMM.Start(ctx, spec); err != nil {
		return err
	}
	watch.lap("restore")
	if err := fault.Point(ctx, "host/restore/thaw"); err != nil {
		return err
	}
	if err := m.vm.Thaw(ctx); err != nil {
		return fmt.Errorf("let it run: %w", err)
	}
	watch.lap("thaw")
	return nil
}

// maxBoots is how often a boot is tried that fails for a reason which another
// one need not have.
const maxBoots = 3

// bootVM starts the VM and waits for its guest.
func (m *machine) bootVM(ctx context.Context, p plan, g *guest, watch *stopwatch) error {
	for try := 1; ; try++ {
		if err := m.startVM(ctx, p); err != nil {
			return fmt.Errorf("start vm: %w", err)
		}
		watch.lap("vm")
		err := m.awaitGuest(ctx, g)
		watch.lap("boot")
		if err == nil || try == maxBoots || !m.mayRetry() {
			return err
		}
		m.a.log.Warn("boot is tried again", "sandbox", m.id, "try", try, "err", m.vm.Exit().Detail)
		if err := m.forgetVM(ctx); err != nil {
			return fmt.Errorf("clear up for another boot: %w", err)
		}
	}
}

func (m *machine) mayRetry() bool {
	select {
	case <-m.vm.Done():
		return m.a.exitOf(m.id, m.vm).Retry
	default:
		return false
	}
}

// forgetVM clears up after a VM that ended while it booted.
func (m *machine) forgetVM(ctx context.Context) error {
	vm := m.vm
	m.vm = nil
	return errors.Join(vm.Kill(ctx), vm.Release(), os.RemoveAll(m.a.runDir(m.id)), os.Mkdir(m.a.runDir(m.id), 0o711))
}

func (m *machine) startVM(ctx context.Context, p plan) error {
	if err := fault.Point(ctx, "host/create/vm"); err != nil {
		return err
	}
	spec, tap, err := m.vmSpec(p)
	if err != nil {
		return err
	}
	defer func() { _ = tap.Close() }() // the VMM has its own
	vm, err := m.a.cfg.VMM.Start(ctx, spec)
	if err != nil {
		return err
	}
	m.vm = vm
	return nil
}

// vmSpec is what a VMM is started with; the caller closes the TAP.
func (m *machine) vmSpec(p plan) (vmm.Spec, *os.File, error) {
	tap, err := m.network.OpenTap()
	if err != nil {
		return vmm.Spec{}, nil, fmt.Errorf("open tap: %w", err)
	}
	return vmm.Spec{
		ID: m.id, VCPUs: p.entry.Spec.VCPUs, MemMiB: p.entry.Spec.MemMiB,
		Kernel: m.a.cfg.Kernel, Initrd: m.a.cfg.Initrd, Cmdline: m.bootConfig(p).Cmdline(),
		DiskPath: m.disk.Path(), DiskFormat: m.disk.Format(),
		Tap: tap, MAC: m.network.MAC(), NetNS: m.network.NetNS(),
		Dir: m.a.runDir(m.id), UID: m.uid(), GID: m.uid(), Cgroup: m.group.Path(),
	}, tap, nil
}

func (m *machine) bootConfig(p plan) guestapi.Boot {
	return guestapi.Boot{
		RootDevice: "/dev/vda", Address: m.network.Guest(), Gateway: m.network.Gateway(),
		HostKey: m.a.key.Public().(ed25519.PublicKey), Hostname: p.entry.Hostname, SandboxID: string(m.id),
	}
}

// awaitGuest waits until the guest agent answers, the VM ends, or it has taken
// too long; then the end of the console is in the error.
func (m *machine) awaitGuest(ctx context.Context, g *guest) error {
	if err := fault.Point(ctx, "host/create/boot"); err != nil {
		return fmt.Errorf("boot guest: %w", err)
	}
	deadline, cancel := context.WithTimeout(ctx, m.a.cfg.BootTimeout)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if g.healthy(deadline) == nil {
			return nil
		}
		select {
		case <-m.vm.Done():
			exit := m.a.exitOf(m.id, m.vm)
			return withCause(exit.Cause, "boot guest: the VM ended: %s%s", printable(exit.Detail), m.consoleTail())
		case <-deadline.Done():
			if ctx.Err() != nil {
				return fmt.Errorf("boot guest: %w", context.Cause(ctx))
			}
			return sandbox.WithKind(sandbox.KindTimeout, withCause(sandbox.CauseBootTimeout,
				"boot guest: no answer within %v%s", m.a.cfg.BootTimeout, m.consoleTail()))
		case <-tick.C:
		}
	}
}

// consoleTail is the last lines of the console, for an error.
func (m *machine) consoleTail() string {
	const tail = 2000
	data, _, err := m.vm.Console(-tail, tail)
	if err != nil || len(data) == 0 {
		return "; its console is empty"
	}
	return "; its console ends with:\n" + printable(string(data))
}

// introduce tells the guest who it is.
func (m *machine) introduce(ctx context.Context, g *guest, p plan) error {
	if err := fault.Point(ctx, "host/create/identity"); err != nil {
		return err
	}
	identity := guestapi.Init{
		EnvVars: mergeEnv(p.entry.Env, p.entry.Spec.Env), AccessToken: p.entry.Token,
		DefaultUser: p.entry.DefaultUser, DefaultWorkdir: p.entry.DefaultWorkdir,
		SandboxID: string(m.id), Hostname: p.entry.Hostname, Entropy: randomBytes(64),
		NewMachineID: p.start != sandbox.StartResume, Unused: p.start == sandbox.StartWarm,
	}
	if p.from == nil {
		return g.init(ctx, m.a.key, m.id, m.a.cfg.Now(), identity)
	}
	told, err := g.identify(ctx, m.a.key, p.from.Guest, m.a.cfg.Now, identity)
	for _, w := range told.Warnings {
		m.a.log.Warn("restored guest", "sandbox", m.id, "warning", w)
	}
	for _, h := range told.Hooks {
		if h.Error != "" {
			m.a.log.Warn("hook of a restored guest failed", "sandbox", m.id, "hook", h.Name, "err", h.Error)
		}
	}
	return err
}
