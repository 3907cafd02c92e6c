package host

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// Status is what the host says of one sandbox.
type Status struct {
	ID        sandbox.ID
	Spec      sandbox.Spec
	Hostname  string
	State     string // "creating", "running", "destroying" or "ended"
	CreatedAt time.Time
	Deadline  time.Time
	EndedAt   time.Time
	Cause     sandbox.Cause
	Detail    string
	Phases    []Phase
	Frozen    sandbox.Freeze // why it stands still, if it does

	AutoPause      time.Duration
	Point          *PointInfo // where it is paused, or its newest point; nil if there is none
	PausedAt       time.Time
	PausedBy       sandbox.PauseReason
	Start          sandbox.Start
	IdleSince      time.Time // zero while it is not idle
	AutoPauseError string
}

func statusOf(e entry) Status {
	return Status{
		ID: e.ID, Spec: e.Spec, Hostname: e.Hostname, State: string(e.State), CreatedAt: e.CreatedAt,
		Deadline: e.Deadline, EndedAt: e.EndedAt, Cause: e.Cause, Detail: e.Detail, Phases: e.Phases,
		AutoPause: e.AutoPause, Point: e.Last.info(), PausedAt: e.PausedAt, PausedBy: e.PausedBy, Start: e.Start,
	}
}

func (b *box) status() Status {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := statusOf(b.entry)
	s.Frozen, s.IdleSince, s.AutoPauseError = b.frozen, b.idleSince(), b.use.why
	return s
}

// List names every sandbox that lives here, and the ended ones that nobody
// acknowledged.
func (a *Agent) List() []Status {
	boxes := a.all()
	out := make([]Status, 0, len(boxes))
	for _, b := range boxes {
		if !b.now().Build {
			out = append(out, b.status())
		}
	}
	return out
}

// Limits are what may be changed of a running sandbox.
type Limits struct {
	Deadline  time.Time      // zero: it stays
	AutoPause *time.Duration // nil: it stays; 0: never
}

// SetDeadline moves the time at which the host destroys a sandbox by itself.
func (a *Agent) SetDeadline(id string, deadline time.Time) error {
	return a.SetLimits(id, Limits{Deadline: deadline})
}

// SetLimits changes when the host destroys and pauses a sandbox by itself.
func (a *Agent) SetLimits(id string, l Limits) error {
	b, err := a.box(id)
	if err != nil {
		return err
	}
	if !l.Deadline.IsZero() {
		if err := sandbox.CheckTimeout(l.Deadline.Sub(a.cfg.Now()).Round(time.Second)); err != nil {
			return err
		}
	}
	if l.AutoPause != nil && *l.AutoPause < 0 {
		return sandbox.Errorf(sandbox.KindInvalid, "auto_pause is %v, must not be negative", *l.AutoPause)
	}
	if !b.takeWithin(freezeLimit) { // so long may the agent itself be at it, for want of space
		return sandbox.Errorf(sandbox.KindBusy, "sandbox %s has been changed by somebody else for %v, and still is", b.id, freezeLimit)
	}
	defer b.op.Unlock()
	if a.isClosed() {
		return errClosing
	}
	if b.alive.Err() != nil { // its end has begun, and does not stop
		return context.Cause(b.alive)
	}
	e := b.now()
	if e.State != stateRunning {
		return errNotRunning(e)
	}
	change := func(e *entry) {
		if !l.Deadline.IsZero() {
			e.Deadline = l.Deadline
		}
		if l.AutoPause != nil {
			e.AutoPause = *l.AutoPause
		}
	}
	change(&e)
	if err := a.journal.write("set-deadline", e); err != nil {
		return err
	}
	b.set(change)
	return nil
}

// Ping is one round trip to the guest agent.
func (a *Agent) Ping(ctx context.Context, id string) (time.Duration, error) {
	b, err := a.box(id)
	if err != nil {
		return 0, err
	}
	g, ctx, cancel, err := a.guestOf(ctx, b)
	if err != nil {
		return 0, err
	}
	defer cancel()
	start := time.Now()
	err = g.ping(ctx)
	return time.Since(start), err
}

// maxConsoleRead bounds one read of the console log.
const maxConsoleRead = 1 << 20

// Console reads a console log: the tail of it, or on from an offset. It works
// for ended sandboxes too, for a day.
func (a *Agent) Console(id string, tail, from int64) (data []byte, next int64, err error) {
	parsed, err := sandbox.ParseID(id)
	if err != nil {
		return nil, 0, err
	}
	if tail < 0 || tail > maxConsoleRead {
		return nil, 0, sandbox.Errorf(sandbox.KindInvalid, "tail_bytes is %d, must be from 0 to %d", tail, maxConsoleRead)
	}
	offset := from
	if from == 0 && tail > 0 {
		offset = -tail
	}
	b, err := a.box(id)
	if err == nil {
		b.mu.Lock()
		vm, e := b.vm, b.entry
		b.mu.Unlock()
		if vm != nil {
			return vm.Console(offset, maxConsoleRead)
		}
		if e.State == stateCreating {
			return nil, 0, errNotRunning(e)
		}
	}
	return readKept(a.consolePath(parsed), parsed, offset)
}

// readKept reads the console log of a sandbox that has ended.
func readKept(path string, id sandbox.ID, offset int64) ([]byte, int64, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, sandbox.Errorf(sandbox.KindNotFound, "no console log is kept of sandbox %s", id)
	}
	if err != nil {
		return nil, 0, err
	}
	size := int64(len(data))
	if offset < 0 {
		offset = max(0, size+offset)
	}
	return data[min(offset, size):], size, nil
}

// Usage is what a sandbox uses, seen from inside and from outside.
type Usage struct {
	Guest        guestapi.Metrics
	RSSBytes     uint64
	OverlayBytes int64
}

// Metrics asks the guest, and measures what the host pays. A sandbox that is only
// looked at stays idle.
func (a *Agent) Metrics(ctx context.Context, id string) (Usage, error) {
	b, err := a.box(id)
	if err != nil {
		return Usage{}, err
	}
	g, ctx, cancel, err := a.reach(ctx, b)
	if err != nil {
		return Usage{}, err
	}
	defer cancel()
	var u Usage
	res, err := g.do(ctx, http.MethodGet, "/metrics", nil, nil)
	if err != nil {
		return Usage{}, err
	}
	defer func() { _ = res.Body.Close() }() // read below
	if err := json.NewDecoder(io.LimitReader(res.Body, 1<<20)).Decode(&u.Guest); err != nil {
		return Usage{}, sandbox.Errorf(sandbox.KindInternal, "the guest agent's metrics are not understood: %w", err)
	}
	b.mu.Lock()
	e, d := b.entry, b.disk
	b.mu.Unlock()
	if e.VMM == nil || d == nil {
		return Usage{}, errNotRunning(e)
	}
	u.RSSBytes = rssOf(e.VMM.PID)
	u.OverlayBytes, err = d.Allocated()
	return u, err
}

// Templates lists what sandboxes can be made from.
func (a *Agent) Templates() ([]template.Template, error) { return a.cfg.Templates.List() }

// Template describes one of them.
func (a *Agent) Template(name string) (template.Template, error) {
	if err := sandbox.SafeName("template", name); err != nil {
		return template.Template{}, err
	}
	return a.cfg.Templates.Get(name)
}

// TemplateLog is what its build has told.
func (a *Agent) TemplateLog(name string) ([]byte, error) {
	if err := sandbox.SafeName("template", name); err != nil {
		return nil, err
	}
	return a.cfg.Templates.Log(name)
}

// Description is what the host says of itself.
type Description struct {
	Name, Version, Instance     string
	VMM                         vmm.Capabilities
	CPUs                        int
	MemTotalMiB, MemFreeMiB     int
	MemPromisedMiB, DiskFreeMiB int
	Sandboxes, MaxSandboxes     int
	Disks, DiskReason           string // the driver of new disks
	Groups                      bool   // whether each VMM has a control group
	GroupsReason                string
	Damage                      []string // of the images that disks lie on
}

// Describe says what this machine is and how full.
func (a *Agent) Describe() Description {
	name, err := os.Hostname()
	if err != nil {
		name = "unknown"
	}
	a.mu.Lock()
	live, mem := a.load()
	damage := slices.Sorted(maps.Keys(a.damage))
	a.mu.Unlock()
	return Description{
		Name: name, Version: a.cfg.Version, Instance: a.cfg.Instance, VMM: a.cfg.VMM.Capabilities(), CPUs: cpus(),
		MemTotalMiB: a.cfg.MaxMemMiB, MemFreeMiB: memAvailableMiB(), MemPromisedMiB: mem,
		DiskFreeMiB: a.freeMiB(), Sandboxes: live, MaxSandboxes: a.cfg.MaxSandboxes,
		Disks: a.cfg.Disks[0].Name(), DiskReason: a.cfg.DiskReason,
		Groups: a.cfg.Groups != Groups(noGroups{}), GroupsReason: a.cfg.GroupsReason, Damage: damage,
	}
}

func sameSpec(x, y sandbox.Spec) bool {
	return x.Template == y.Template && x.VCPUs == y.VCPUs && x.MemMiB == y.MemMiB && x.DiskMiB == y.DiskMiB &&
		x.Network == y.Network && maps.Equal(x.Env, y.Env)
}

func mergeEnv(base, over map[string]string) map[string]string {
	out := maps.Clone(base)
	if out == nil {
		out = map[string]string{}
	}
	maps.Copy(out, over)
	return out
}
