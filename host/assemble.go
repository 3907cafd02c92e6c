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
	entry    entry
	template template.Template
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
		return nil, nil, fmt.Errorf("make folders: %w", noSpace(err))
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

	if err := m.createDisk(ctx, p); err != nil {
		return nil, nil, fmt.Errorf("create disk: %w", noSpace(err))
	}
	u.Push("disk", m.removeDisk)
	watch.lap("disk")

	u.Push("vm", m.removeVM)
	g := a.newGuest(m.network, p.entry.Token)
	u.PushClose("guest connections", g.close)
	if err := m.bootVM(ctx, p, g, watch); err != nil {
		return nil, nil, err
	}
	if err := m.introduce(ctx, g, p); err != nil {
		return nil, nil, fmt.Errorf("introduce guest: %w", err)
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
		Dir: m.a.stateDir(m.id), Base: p.template.Image,
		SizeBytes: max(int64(p.entry.Spec.DiskMiB)<<20, p.template.ImageBytes),
		UID:       m.uid(), GID: m.uid(),
	}
}

func (m *machine) createDisk(ctx context.Context, p plan) error {
	if err := fault.Point(ctx, "host/create/disk"); err != nil {
		return err
	}
	config := m.diskConfig(p)
	d, err := m.a.cfg.Disks.Create(ctx, config)
	if err != nil {
		return err
	}
	m.disk, m.config = d, config
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
		return m.vm.Exit().Retry
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
	tap, err := m.network.OpenTap()
	if err != nil {
		return fmt.Errorf("open tap: %w", err)
	}
	defer func() { _ = tap.Close() }() // the VMM has its own
	vm, err := m.a.cfg.VMM.Start(ctx, vmm.Spec{
		ID: m.id, VCPUs: p.entry.Spec.VCPUs, MemMiB: p.entry.Spec.MemMiB,
		Kernel: m.a.cfg.Kernel, Initrd: m.a.cfg.Initrd, Cmdline: m.bootConfig(p).Cmdline(),
		DiskPath: m.disk.Path(), DiskFormat: m.disk.Format(),
		Tap: tap, MAC: m.network.MAC(), NetNS: m.network.NetNS(),
		Dir: m.a.runDir(m.id), UID: m.uid(), GID: m.uid(),
	})
	if err != nil {
		return err
	}
	m.vm = vm
	return nil
}

func (m *machine) bootConfig(p plan) guestapi.Boot {
	return guestapi.Boot{
		RootDevice: "/dev/vda", Address: m.network.Guest(), Gateway: m.network.Gateway(),
		HostKey: m.a.key.Public().(ed25519.PublicKey), Hostname: p.entry.Hostname,
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
			exit := m.vm.Exit()
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
	return g.init(ctx, m.a.key, m.a.cfg.Now(), guestapi.Init{
		EnvVars: mergeEnv(p.template.Env, p.entry.Spec.Env), AccessToken: p.entry.Token,
		DefaultUser: p.template.DefaultUser, DefaultWorkdir: p.template.DefaultWorkdir,
		SandboxID: string(m.id), Hostname: p.entry.Hostname, Entropy: randomBytes(64),
	})
}
