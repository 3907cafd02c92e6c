package host

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
	"github.com/dormouse-sandbox/dormouse/template"
)

// A create is a restore. The first machine of an image and a shape boots, and is
// kept as soon as its guest answers, before it is told who it is: the warm
// snapshot. Those after it go on from there. It is made anew when anything that
// it was made with is another: image, shape, kernel, initramfs, VMM.

// warmPrefix begins the names of warm snapshots.
const warmPrefix = ownPrefix + "warm."

// warmKey names the warm snapshot of an image and a shape.
func (a *Agent) warmKey(t template.Template, spec sandbox.Spec) (string, error) {
	key := struct {
		Image, Compat, Kernel, Initrd string
		VCPUs, MemMiB, DiskMiB        int
	}{
		Image: t.Digest, Compat: a.cfg.VMM.Capabilities().Compat, VCPUs: spec.VCPUs, MemMiB: spec.MemMiB, DiskMiB: spec.DiskMiB,
	}
	for path, to := range map[string]*string{a.cfg.Kernel: &key.Kernel, a.cfg.Initrd: &key.Initrd} {
		info, err := os.Stat(path)
		if err != nil {
			return "", err
		}
		*to = fmt.Sprint(path, info.Size(), info.ModTime().UnixNano())
	}
	data, err := json.Marshal(key)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(data)
	return warmPrefix + hex.EncodeToString(sum[:16]), nil
}

// createMachine makes the machine of a create: from a warm snapshot, if there is
// one that works, else by booting.
func (a *Agent) createMachine(ctx context.Context, b *box, p *plan, watch *stopwatch) (*machine, *guest, error) {
	if !a.cfg.Warm || p.from != nil || a.cfg.Snapshots == nil || p.entry.Build || a.cfg.VMM.Capabilities().Compat == "" {
		return a.bootInTurn(ctx, *p, watch)
	}
	name, err := a.warmKey(p.image, p.entry.Spec)
	if err != nil {
		return nil, nil, fmt.Errorf("warm snapshot: %w", err)
	}
	done, err := a.turn(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer done()
	warm, release, err := a.warm(name) // not before its turn: one of those in front may make it
	if err != nil {
		a.log.Warn("warm snapshot not read, booting", "snapshot", name, "err", err)
	}
	watch.lap("queue")
	booting := *p
	booting.warm = name
	if warm == nil {
		return a.assemble(ctx, booting, watch)
	}
	defer release()
	restoring := *p
	restoring.begin(warm, sandbox.StartWarm)
	m, g, err := a.assemble(ctx, restoring, watch)
	if err == nil {
		b.set(func(e *entry) { e.Began, e.Last = warm, warm }) // before release, so that the collector keeps it
		*p = restoring
		return m, g, nil
	}
	var restore restoreError
	if m != nil || ctx.Err() != nil || !errors.As(err, &restore) || sandbox.Is(err, sandbox.KindNoSpace) {
		return m, nil, err
	}
	a.log.Warn("a warm snapshot did not work and is given up, booting", "sandbox", b.id, "snapshot", name, "err", err)
	if gone := a.cfg.Snapshots.RemoveRef(name); gone != nil {
		return nil, nil, errors.Join(err, gone)
	}
	a.collectSoon()
	watch.lap("failed_restore")
	return a.assemble(ctx, booting, watch)
}

// warm finds a warm snapshot and pins it; nil if there is none.
func (a *Agent) warm(name string) (*point, func(), error) {
	ref, err := a.cfg.Snapshots.Ref(name)
	if sandbox.Is(err, sandbox.KindNotFound) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	p, err := pointOf(ref)
	if err != nil {
		return nil, nil, err
	}
	release, err := a.pin(p)
	if err != nil {
		return nil, nil, err
	}
	return p, release, nil
}

// keepWarm keeps a machine that has booted and knows nothing yet. That it could
// not is no reason to fail the create.
func (m *machine) keepWarm(ctx context.Context, p plan, watch *stopwatch) error {
	if p.warm == "" {
		return nil
	}
	g := m.a.newGuest(m.network, hex.EncodeToString(randomBytes(32))) // nobody keeps its token
	defer func() { _ = g.close() }()                                  // nothing of it is open
	err := m.rehearse(ctx, g, p)
	held := err == nil && m.hold(ctx, g)
	watch.lap("rehearse")
	if err == nil {
		err = m.tryKeepWarm(ctx, p, watch)
	}
	if err != nil {
		m.a.log.Warn("warm snapshot not kept", "snapshot", p.warm, "err", err)
	}
	// Whatever it was, it has to run.
	if err := m.vm.Thaw(ctx); err != nil {
		return fmt.Errorf("let it run on: %w", err)
	}
	if held {
		if err := g.thaw(ctx, m.a.key, m.id, m.a.cfg.Now()); err != nil {
			return fmt.Errorf("let its processes run on: %w", err)
		}
	}
	watch.lap("warm")
	return nil
}

// rehearsalLimit bounds the command of a rehearsal.
const rehearsalLimit = 10 * time.Second

// rehearse has the guest do what each of its copies will do first: become somebody,
// and run a command. So their pages are in the memory that is kept, and mapped. Who it
// becomes nobody will ever be.
func (m *machine) rehearse(ctx context.Context, g *guest, p plan) error {
	if err := fault.Point(ctx, "host/warm/rehearse"); err != nil {
		return err
	}
	_, err := g.identify(ctx, m.a.key, m.id, m.a.cfg.Now, guestapi.Init{
		Rehearsal: true, AccessToken: g.token, Hostname: string(sandbox.NewID()), Entropy: randomBytes(64), NewMachineID: true,
		DefaultUser: p.entry.DefaultUser, DefaultWorkdir: p.entry.DefaultWorkdir,
	})
	if err != nil { // its processes may stand still, and this one has to run
		return errors.Join(fmt.Errorf("rehearse its identity: %w", err), g.thaw(ctx, m.a.key, m.id, m.a.cfg.Now()))
	}
	// An image need not have this one.
	r, err := g.run(ctx, Command{Cmd: "/bin/true", User: p.entry.DefaultUser, Timeout: rehearsalLimit})
	if err == nil {
		_, err = r.Output(func(_, _ []byte) error { return nil })
		r.Finish(err == nil)
	}
	if err != nil {
		m.a.log.Info("no command was rehearsed", "sandbox", m.id, "why", printable(err.Error()))
	}
	return nil
}

// hold makes the guest's processes stand still: else each copy would begin with that.
// A guest that cannot is kept as it is. Whoever is told that it may have done so has
// to thaw it.
func (m *machine) hold(ctx context.Context, g *guest) bool {
	err := fault.Point(ctx, "host/warm/hold")
	if err == nil {
		err = g.freeze(ctx, m.a.key, m.id, m.a.cfg.Now(), guestapi.Freeze{})
	}
	if err != nil {
		m.a.log.Info("a warm snapshot's processes run", "sandbox", m.id, "why", printable(err.Error()))
	}
	return err == nil || !sandbox.Is(err, sandbox.KindUnsupported)
}

func (m *machine) tryKeepWarm(ctx context.Context, p plan, watch *stopwatch) (err error) {
	if err := fault.Point(ctx, "host/warm/freeze"); err != nil {
		return err
	}
	if err := m.vm.Freeze(ctx); err != nil {
		return err
	}
	now, err := m.look(ctx, watch, m.disk.Changed)
	defer func() { err = errors.Join(err, now.Close()) }()
	if err != nil {
		return err
	}
	now.guest = m.id
	watch.stoodAt = m.a.cfg.Now()
	if err := m.a.room(now); err != nil {
		return err
	}
	e := p.entry
	e.Base = m.base
	kept, release, err := m.a.keep(ctx, e, now, watch)
	if err != nil {
		return err
	}
	kept.Warm = true
	ref, err := kept.ref(p.warm)
	if err == nil {
		err = fault.Point(ctx, "host/warm/name")
	}
	if err == nil {
		err = m.a.cfg.Snapshots.SetRef(ref)
	}
	if err != nil {
		release()
		return err
	}
	m.kept, m.pins = kept, append(m.pins, release)
	return m.a.trimWarm()
}

// trimWarm removes the oldest warm snapshots when there are too many: each shape
// that somebody asks for makes one.
func (a *Agent) trimWarm() error {
	refs, err := a.cfg.Snapshots.Refs()
	if err != nil {
		return err
	}
	refs = slices.DeleteFunc(refs, func(r snapshot.Ref) bool { return !strings.HasPrefix(r.Name, warmPrefix) })
	slices.SortFunc(refs, func(x, y snapshot.Ref) int { return x.CreatedAt.Compare(y.CreatedAt) })
	var errs []error
	for len(refs) > a.cfg.MaxWarm {
		errs = append(errs, a.cfg.Snapshots.RemoveRef(refs[0].Name))
		refs = refs[1:]
		a.collectSoon()
	}
	return errors.Join(errs...)
}

// sweepWarm removes the warm snapshots of other VMMs and of images that are gone.
func (a *Agent) sweepWarm() error {
	if a.cfg.Snapshots == nil || a.cfg.Images == nil || a.cfg.Templates == nil {
		return nil
	}
	refs, err := a.cfg.Snapshots.Refs()
	if err != nil {
		return err
	}
	templates, err := a.cfg.Templates.List()
	if err != nil {
		return err
	}
	errs := []error{a.cfg.Images.Sweep(templates)}
	for _, r := range refs {
		if strings.HasPrefix(r.Name, warmPrefix) && !a.stillWarm(r) {
			errs = append(errs, a.cfg.Snapshots.RemoveRef(r.Name))
			a.collectSoon()
		}
	}
	return errors.Join(errs...)
}

func (a *Agent) stillWarm(r snapshot.Ref) bool {
	p, err := pointOf(r)
	if err != nil || a.fits(p) != nil {
		return false
	}
	t, err := a.cfg.Templates.Get(p.Template)
	if err != nil {
		return !sandbox.Is(err, sandbox.KindNotFound)
	}
	name, err := a.warmKey(t, sandbox.Spec{VCPUs: p.VCPUs, MemMiB: p.MemMiB, DiskMiB: p.DiskMiB})
	return err != nil || name == r.Name
}
