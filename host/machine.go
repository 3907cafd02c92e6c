package host

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// machine is what the host has of one sandbox: folders, disk, network, control
// group and VM.
// Parts that it never had are nil.
type machine struct {
	a       *Agent
	id      sandbox.ID
	disk    disk.Disk
	config  disk.Config // what disk was made from
	network Network
	group   Group
	vm      vmm.Machine
	// base is the manifest that disk lies on, if it lies on one.
	base snapshot.Digest
	kept *point // as what it was kept before it was told who it is, if it was
	pins []func()
}

// unpin lets the journal alone keep what the machine needs of the snapshot store.
func (m *machine) unpin() error {
	for _, release := range m.pins {
		release()
	}
	m.pins = nil
	return nil
}

// remove takes all of it away, the VM first: while that runs, the rest stays.
// Every step runs even if one before it failed, and each may be repeated: after
// an error remove is called again.
func (m *machine) remove(ctx context.Context) error {
	var u undo.Stack
	u.Push("folders", m.removeDirs)
	u.Push("disk", m.removeDisk)
	u.Push("network", m.removeNetwork)
	u.Push("control group", m.removeGroup)
	u.Push("vm", m.removeVM)
	return u.Run(ctx)
}

func (m *machine) removeVM(ctx context.Context) error {
	if err := fault.Point(ctx, "host/destroy/vm"); err != nil {
		return err
	}
	if m.vm == nil {
		return nil
	}
	if err := m.vm.Kill(ctx); err != nil {
		return err
	}
	m.keepConsole()
	return m.vm.Release()
}

func (m *machine) removeNetwork(ctx context.Context) error {
	if err := fault.Point(ctx, "host/destroy/network"); err != nil {
		return err
	}
	if m.network == nil {
		return nil
	}
	if m.runs() {
		return errStillRuns
	}
	return m.network.Close(ctx)
}

func (m *machine) removeDisk(ctx context.Context) error {
	if err := fault.Point(ctx, "host/destroy/disk"); err != nil {
		return err
	}
	if m.disk == nil {
		return nil
	}
	if m.runs() {
		return errStillRuns
	}
	return m.disk.Remove(ctx)
}

func (m *machine) removeDirs(ctx context.Context) error {
	if err := fault.Point(ctx, "host/destroy/folders"); err != nil {
		return err
	}
	if m.runs() {
		return errStillRuns
	}
	return errors.Join(
		os.RemoveAll(m.a.runDir(m.id)), // nothing in it outlives the VM: durability does not matter
		osfs.RemoveAll("sandbox-dir", m.a.stateDir(m.id)),
	)
}

var errStillRuns = errors.New("the VM still runs")

// runs says that the VM has not ended, as far as its handle knows. Its network
// slot and its user ID must not become another one's before.
func (m *machine) runs() bool {
	if m.vm == nil {
		return false
	}
	select {
	case <-m.vm.Done():
		return false
	default:
		return true
	}
}

// release gives up the handles and leaves everything as it is.
func (m *machine) release() error {
	var errs []error
	if m.vm != nil {
		errs = append(errs, m.vm.Release())
	}
	if m.disk != nil {
		errs = append(errs, m.disk.Close(context.Background()))
	}
	return errors.Join(errs...)
}

// keptConsole is how much of an ended VM's console stays readable.
const keptConsole = 256 << 10

// keepConsole saves the end of the console log, so that it can be read after
// the sandbox is gone. It is a courtesy: failing it fails nothing.
func (m *machine) keepConsole() {
	data, _, err := m.vm.Console(-keptConsole, keptConsole)
	if err == nil && len(data) > 0 {
		err = os.WriteFile(m.a.consolePath(m.id), data, 0o600)
	}
	if err != nil {
		m.a.log.Warn("console log not kept", "sandbox", m.id, "err", err)
	}
}

func (a *Agent) consolePath(id sandbox.ID) string {
	return filepath.Join(a.cfg.Dir, "consoles", string(id)+".log")
}

// watch waits for the VM's end and destroys the rest of the sandbox.
func (a *Agent) watch(b *box, vm vmm.Machine, awake context.Context) {
	select {
	case <-vm.Done():
	case <-a.ctx.Done():
		return
	case <-awake.Done():
		return // somebody else is ending it, or it is paused
	}
	if a.ctx.Err() != nil || awake.Err() != nil {
		return // the next agent finds out by itself
	}
	exit := a.exitOf(b.id, vm)
	a.log.Warn("vm ended by itself", "sandbox", b.id, "cause", exit.Cause, "detail", exit.Detail)
	if err := a.end(a.ctx, b, exit.Cause, exit.Detail); err != nil {
		a.log.Error("sandbox not removed yet", "sandbox", b.id, "err", err)
	}
}
