package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
)

// The shape of the sandbox that a step of a build runs in, and its bounds.
const (
	buildMemMiB  = 1024
	buildRoomMiB = 8 << 10 // of disk, besides what the image has
	buildVCPUs   = 2
	buildLimit   = 2 * time.Hour    // of one step
	powerOffWait = 60 * time.Second // to write everything to the disk
)

// Steps runs the steps of template builds, each in a sandbox of its own: the
// only one that has its disk, and gone when the step is done.
type Steps struct{ Agent *Agent }

// Run runs one command and hands its disk over.
func (s Steps) Run(ctx context.Context, r template.RunStep) (err error) {
	a := s.Agent
	p := a.buildPlan(r)
	if free := a.freeMiB(); free < a.cfg.MinFreeMiB {
		return sandbox.Errorf(sandbox.KindNoSpace, "the host has %d MiB of free disk, builds need %d", free, a.cfg.MinFreeMiB)
	}
	b, _, err := a.reserve(p.entry)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, a.end(ctx, b, sandbox.CauseUser, ""))
		a.forgetBuild(b)
	}()
	if err := a.createReserved(ctx, b, p); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, buildLimit, sandbox.Errorf(sandbox.KindTimeout, "it took longer than %v", buildLimit))
	defer cancel()
	if err := a.runStep(ctx, b, r); err != nil {
		return err
	}
	return a.takeDisk(ctx, b, r)
}

// buildPlan is the plan of a machine for one step: a template that nobody else
// sees. The step's variables are its command's, not the sandbox's.
func (a *Agent) buildPlan(r template.RunStep) plan {
	now := a.cfg.Now()
	id := sandbox.NewID()
	t := template.Template{Name: "build", Image: r.Image, ImageBytes: r.ImageBytes, DefaultUser: r.User}
	return plan{image: t, entry: entry{
		ID: id, State: stateCreating, Hostname: string(id), CreatedAt: now, Deadline: now.Add(buildLimit + time.Hour),
		Slot: -1, Token: newToken(), Build: true, DefaultUser: r.User,
		Spec: sandbox.Spec{
			Template: t.Name, VCPUs: min(buildVCPUs, runtime.NumCPU()), MemMiB: buildMemMiB,
			DiskMiB: int(r.ImageBytes>>20) + buildRoomMiB, Network: sandbox.Network{Internet: true},
		},
	}}
}

// runStep runs the command to its end.
func (a *Agent) runStep(ctx context.Context, b *box, r template.RunStep) error {
	if err := fault.Point(ctx, "host/build/run"); err != nil {
		return err
	}
	process, err := a.Start(ctx, string(b.id), Command{
		Cmd: r.Command[0], Args: r.Command[1:], Env: r.Env, Cwd: r.Workdir, User: r.User,
	}, false)
	if err != nil {
		return err
	}
	ended := false
	defer func() { process.Finish(ended) }()
	end, err := process.Output(func(stdout, stderr []byte) error {
		_, err1 := r.Output.Write(stdout)
		_, err2 := r.Output.Write(stderr)
		return errors.Join(err1, err2)
	})
	if err != nil {
		return err
	}
	ended = true
	if !end.Exited || end.ExitCode != 0 {
		return sandbox.Errorf(sandbox.KindInvalid, "%s", end.Status)
	}
	return nil
}

// takeDisk switches the VM off, so that all is on the disk, and copies that.
func (a *Agent) takeDisk(ctx context.Context, b *box, r template.RunStep) error {
	b.op.Lock()
	defer b.op.Unlock()
	if b.machine == nil || b.now().State != stateRunning {
		return errNotRunning(b.now())
	}
	m := b.machine
	g, joined, cancel, err := a.guestOf(ctx, b)
	if err != nil {
		return err
	}
	err = g.powerOff(joined, a.key, b.id, a.cfg.Now())
	cancel()
	if err != nil {
		return fmt.Errorf("switch off: %w", err)
	}
	b.die(errEnding(b.id, sandbox.CauseUser, "the step is done")) // its VM does not end by itself
	if err := m.awaitOff(ctx); err != nil {
		return err
	}
	if err := fault.Point(ctx, "host/build/disk"); err != nil {
		return err
	}
	return m.copyDisk(ctx, r)
}

func (m *machine) awaitOff(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, powerOffWait)
	defer cancel()
	select {
	case <-m.vm.Done():
		return nil
	case <-ctx.Done():
		return sandbox.Errorf(sandbox.KindTimeout, "the VM of the step did not switch itself off%s", m.consoleTail())
	}
}

// copyDisk writes what the guest's disk is to a raw, sparse file. The tool reads
// what the VMM has written, and so has no more rights than that had: a forged
// overlay could name any file as what it lies on.
func (m *machine) copyDisk(ctx context.Context, r template.RunStep) (err error) {
	f, err := os.OpenFile(r.Result, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Truncate(m.config.SizeBytes); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "qemu-img", "convert", "-n", "--target-is-zero", "-S", "4k", "-f", m.disk.Format(), "-O", "raw", m.disk.Path(), "/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{f}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if uid := m.uid(); uid != 0 {
		if err := f.Chown(uid, uid); err != nil {
			return err
		}
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}
	}
	// Pdeathsig is about the thread that forks, so it must stay until the end.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if out, err := cmd.CombinedOutput(); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return sandbox.NoSpace(fmt.Errorf("copy the disk: qemu-img: %w: %s", err, printable(string(out))))
	}
	return f.Chown(0, 0)
}

// forgetBuild drops the record of a step's sandbox: nobody asks for it.
func (a *Agent) forgetBuild(b *box) {
	if e := b.now(); !e.Build || e.State != stateEnded {
		return
	}
	if err := a.forget(b); err != nil {
		a.log.Warn("the sandbox of a build step is not forgotten", "sandbox", b.id, "err", err)
	}
}

var _ template.Runner = Steps{}
