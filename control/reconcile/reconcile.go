// Package reconcile brings the database and the host's report together: it
// records what ended or paused on the host, goes on with what was being destroyed,
// gives up creates that nobody works on any more, settles pauses and resumes whose
// process died, does the same for snapshots, and marks sandboxes unreachable while
// their host does not answer.
//
// It promises that a pass may run at any time, any number of times, beside
// requests: every change is a compare-and-set on a row that was read before the
// host was asked. A host that does not answer ends nothing. What the database
// does not know is left alone on the host; only what it knows to have ended is
// destroyed there.
package reconcile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1/hostv1connect"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Config is what a Reconciler works on. Zero durations mean the defaults.
type Config struct {
	Host     hostv1connect.HostServiceClient
	HostName string // of the rows it is responsible for
	Store    *store.DB
	Log      *slog.Logger     // nil: nothing is logged
	Now      func() time.Time // nil: time.Now

	// Owned says that a create, a pause or a resume of this process is under way.
	// Nil: none is.
	Owned func(sandbox.ID) bool
	// OwnedSnapshot says the same of making or deleting a snapshot.
	OwnedSnapshot func(name string) bool
	// Ended is told of every end that is recorded. It must not block.
	Ended func(store.Sandbox)

	Interval       time.Duration // between passes; 2 s
	CallLimit      time.Duration // of a call to the host that lists; 10 s
	DestroyLimit   time.Duration // of one attempt to destroy; 2 min
	CreateLimit    time.Duration // of a create that nobody owns; 10 min
	UnreachableFor time.Duration // silence after which sandboxes are unreachable; 10 s
	AbsentFor      time.Duration // absence after which a sandbox is lost; 10 s
	SettleFor      time.Duration // after which a pause or resume of which the host shows nothing has come to nothing; 10 s
}

func (c Config) withDefaults() Config {
	if c.Log == nil {
		c.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Owned == nil {
		c.Owned = func(sandbox.ID) bool { return false }
	}
	if c.OwnedSnapshot == nil {
		c.OwnedSnapshot = func(string) bool { return false }
	}
	if c.Ended == nil {
		c.Ended = func(store.Sandbox) {}
	}
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&c.Interval, 2 * time.Second},
		{&c.CallLimit, 10 * time.Second},
		{&c.DestroyLimit, 2 * time.Minute},
		{&c.CreateLimit, 10 * time.Minute},
		{&c.UnreachableFor, 10 * time.Second},
		{&c.AbsentFor, 10 * time.Second},
		{&c.SettleFor, 10 * time.Second},
	} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	return c
}

// Reconciler watches one host.
type Reconciler struct {
	cfg  Config
	kick chan struct{}

	ctx    context.Context // the life of the loop and of destroys, not of a call
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu         sync.Mutex
	closed     bool
	current    *turn           // the pass under way, if any
	next       *turn           // the one that follows it, if somebody waits for that
	lastAnswer time.Time       // of the host
	absent     since           // an answering host does not name it
	odd        since           // the host shows nothing of its pause or resume
	strangers  map[string]bool // logged already
	flights    map[sandbox.ID]*flight
}

// New makes a Reconciler; Start starts it.
func New(cfg Config) *Reconciler {
	r := &Reconciler{
		cfg:       cfg.withDefaults(),
		kick:      make(chan struct{}, 1),
		absent:    since{},
		odd:       since{},
		strangers: map[string]bool{},
		flights:   map[sandbox.ID]*flight{},
	}
	r.lastAnswer = r.cfg.Now()
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r
}

// Start runs one pass, so that what is served afterwards is true, and then the
// loop. A host that does not answer now is no error: it may later.
func (r *Reconciler) Start(ctx context.Context) error {
	if err := r.pass(ctx); err != nil && !sandbox.Is(err, sandbox.KindTransient) {
		return err
	}
	r.wg.Go(r.loop)
	return nil
}

// Close stops the loop and every destroy under way, and waits for them. What
// was not finished is finished after the next start. It may be called twice.
func (r *Reconciler) Close() error {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.cancel()
	r.wg.Wait()
	return nil
}

// Kick asks for a pass soon. It never blocks.
func (r *Reconciler) Kick() {
	select {
	case r.kick <- struct{}{}:
	default: // one is due already
	}
}

func (r *Reconciler) loop() {
	tick := time.NewTicker(r.cfg.Interval)
	defer tick.Stop()
	for {
		select {
		case <-r.ctx.Done():
			return
		case <-tick.C:
		case <-r.kick:
		}
		if err := r.pass(r.ctx); err != nil && r.ctx.Err() == nil {
			r.cfg.Log.Warn("reconcile", "host", r.cfg.HostName, "err", err)
		}
	}
}

// Once runs one pass and waits for the destroys that it started.
func (r *Reconciler) Once(ctx context.Context) error {
	err := r.pass(ctx)
	for _, f := range r.underWay() {
		select {
		case <-f.done:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return err
}

// Check runs one pass without waiting for destroys: what the host knows of an
// end is in the database afterwards.
func (r *Reconciler) Check(ctx context.Context) error { return r.pass(ctx) }

// live are the states in which a sandbox still concerns its host.
func live() []sandbox.State {
	var out []sandbox.State
	for _, s := range sandbox.States() {
		if !s.Ended() {
			out = append(out, s)
		}
	}
	return out
}

// onePass reads the rows before it asks the host, so that a sandbox that appears
// in between is never taken for a lost one.
func (r *Reconciler) onePass(ctx context.Context) error {
	rows, err := r.cfg.Store.Sandboxes(ctx, store.Filter{States: live(), Host: r.cfg.HostName})
	if err != nil {
		return err
	}
	reports, err := r.ask(ctx)
	if err != nil {
		r.silent(ctx, rows)
		return fmt.Errorf("list the host's sandboxes: %w", err)
	}
	r.forgetStrangers(reports)
	var done []string
	for _, row := range rows {
		status := reports[string(row.ID)]
		delete(reports, string(row.ID))
		if r.settle(ctx, row, status) && status != nil {
			done = append(done, string(row.ID))
		}
	}
	r.forgetTimes(rows)
	for id, status := range reports {
		if r.leftOver(ctx, id, status) {
			done = append(done, id)
		}
	}
	return errors.Join(r.acknowledge(ctx, done), r.settleSnapshots(ctx))
}

func (r *Reconciler) ask(ctx context.Context) (map[string]*hostv1.SandboxStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.CallLimit)
	defer cancel()
	resp, err := r.cfg.Host.ListSandboxes(ctx, connect.NewRequest(&hostv1.ListSandboxesRequest{}))
	if err != nil {
		return nil, sandbox.WithKind(sandbox.KindTransient, hostapi.FromConnect(err))
	}
	r.mu.Lock()
	r.lastAnswer = r.cfg.Now()
	r.mu.Unlock()
	out := map[string]*hostv1.SandboxStatus{}
	for _, s := range resp.Msg.GetSandboxes() {
		out[s.GetSpec().GetId()] = s
	}
	return out, nil
}

// silent marks what runs on a host that has not answered for a while. That is
// reversible; nothing ends because of it.
func (r *Reconciler) silent(ctx context.Context, rows []store.Sandbox) {
	r.mu.Lock()
	quiet := r.cfg.Now().Sub(r.lastAnswer)
	r.mu.Unlock()
	if quiet < r.cfg.UnreachableFor {
		return
	}
	for _, row := range rows {
		switch {
		case row.State == sandbox.Running:
		case row.State == sandbox.Pausing || row.State == sandbox.Resuming:
			if r.cfg.Owned(row.ID) || r.cfg.Now().Before(row.Until) {
				continue // it has an owner, who gets the host's error itself
			}
		default:
			continue // a paused one needs no host until it is resumed
		}
		_, err := r.cfg.Store.SetState(ctx, row, sandbox.Unreachable)
		r.note(row, sandbox.Unreachable, err)
	}
}

// settle does what one sandbox needs, and says whether its end is on record.
func (r *Reconciler) settle(ctx context.Context, row store.Sandbox, status *hostv1.SandboxStatus) (ended bool) {
	now := r.cfg.Now()
	v := Decide(row, status, Facts{
		Owned: r.cfg.Owned(row.ID), Age: now.Sub(row.CreatedAt), CreateLong: r.cfg.CreateLimit,
		Absent: r.timeSince(r.absent, row.ID, status == nil, now), AbsentLong: r.cfg.AbsentFor,
		Odd: r.timeSince(r.odd, row.ID, odd(row.State, status), now), OddLong: r.cfg.SettleFor,
	})
	switch v.Do {
	case End:
		return r.record(ctx, row, v) == nil
	case MakeRunning:
		_, err := r.cfg.Store.Runs(ctx, row, store.Run{Deadline: v.At, Start: v.Start})
		r.note(row, sandbox.Running, err)
	case MakePaused:
		_, err := r.cfg.Store.Paused(ctx, row, v.Pause)
		r.note(row, sandbox.Paused, err)
	case StillPaused:
		_, err := r.cfg.Store.StillPaused(ctx, row)
		r.note(row, sandbox.Paused, err)
	case NoteSaved:
		r.noteSaved(ctx, row, v)
	case MoveDeadline:
		if _, err := r.cfg.Store.SetDeadline(ctx, row, v.At); err != nil {
			r.note(row, row.State, err)
		}
	case NoteFrozen:
		r.noteFrozen(ctx, row, v.Frozen)
	case Destroy:
		r.begin(row, v.Cause)
	}
	return false
}

func (r *Reconciler) noteFrozen(ctx context.Context, row store.Sandbox, why sandbox.Freeze) {
	if _, err := r.cfg.Store.SetFrozen(ctx, row, why); err != nil {
		r.note(row, row.State, err)
		return
	}
	r.cfg.Log.Info("frozen or thawed", "sandbox", row.ID, "host", row.Host, "op", "reconcile", "frozen", why)
}

func (r *Reconciler) noteSaved(ctx context.Context, row store.Sandbox, v Verdict) {
	if _, err := r.cfg.Store.SetSaved(ctx, row, v.Pause.Saved, v.PauseError); err != nil {
		r.note(row, row.State, err)
		return
	}
	if v.PauseError != "" && v.PauseError != row.PauseError {
		r.cfg.Log.Warn("automatic pause failed", "sandbox", row.ID, "host", row.Host, "op", "reconcile", "err", v.PauseError)
	}
}

func (r *Reconciler) record(ctx context.Context, row store.Sandbox, v Verdict) error {
	if v.At.IsZero() {
		v.At = r.cfg.Now()
	}
	after, err := r.cfg.Store.End(ctx, row, v.Cause, v.Detail, v.At)
	r.note(row, v.Cause.End(), err)
	if err == nil {
		r.cfg.Ended(after)
	}
	return err
}

// note writes the one line of a change of state. A row that somebody else
// changed meanwhile is looked at again by the next pass.
func (r *Reconciler) note(row store.Sandbox, to sandbox.State, err error) {
	switch {
	case err == nil:
		r.cfg.Log.Info("state changed", "sandbox", row.ID, "host", row.Host, "op", "reconcile", "from", row.State, "to", to)
	case sandbox.Is(err, sandbox.KindConflict):
		r.Kick()
	default:
		r.cfg.Log.Error("state not recorded", "sandbox", row.ID, "op", "reconcile", "to", to, "err", err)
	}
}

// since says for each sandbox since when something is so.
type since map[sandbox.ID]time.Time

// timeSince says for how long something has been so without a break.
func (r *Reconciler) timeSince(of since, id sandbox.ID, so bool, now time.Time) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !so {
		delete(of, id)
		return 0
	}
	first, ok := of[id]
	if !ok {
		of[id] = now
		return 0
	}
	return now.Sub(first)
}

func (r *Reconciler) forgetTimes(rows []store.Sandbox) {
	r.mu.Lock()
	defer r.mu.Unlock()
	known := map[sandbox.ID]bool{}
	for _, row := range rows {
		known[row.ID] = true
	}
	for _, of := range []since{r.absent, r.odd} {
		for id := range of {
			if !known[id] {
				delete(of, id)
			}
		}
	}
}

// leftOver handles what the host has and no living row names. It says whether
// the host may forget it.
func (r *Reconciler) leftOver(ctx context.Context, id string, status *hostv1.SandboxStatus) (done bool) {
	row, err := r.cfg.Store.Sandbox(ctx, sandbox.ID(id))
	switch {
	case sandbox.Is(err, sandbox.KindNotFound):
		r.stranger(id, status)
	case err != nil:
		r.cfg.Log.Error("read sandbox", "sandbox", id, "op", "reconcile", "err", err)
	case !row.State.Ended():
		// It was asked for after the rows were read.
	case status.GetState() == hostv1.State_STATE_ENDED:
		return true
	default:
		r.begin(row, row.Cause)
	}
	return false
}

// stranger logs, once, a sandbox that this database never had. It may belong to
// a database that was restored from an old copy, so it is not ours to destroy;
// its deadline ends it.
func (r *Reconciler) stranger(id string, status *hostv1.SandboxStatus) {
	r.mu.Lock()
	known := r.strangers[id]
	r.strangers[id] = true
	r.mu.Unlock()
	if !known {
		r.cfg.Log.Warn("the host has a sandbox that the database does not know; it is left alone",
			"sandbox", id, "host", r.cfg.HostName, "state", status.GetState())
	}
}

// forgetStrangers drops those that the host no longer has.
func (r *Reconciler) forgetStrangers(reports map[string]*hostv1.SandboxStatus) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id := range r.strangers {
		if reports[id] == nil {
			delete(r.strangers, id)
		}
	}
}

func (r *Reconciler) acknowledge(ctx context.Context, ids []string) error {
	if len(ids) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, r.cfg.CallLimit)
	defer cancel()
	_, err := r.cfg.Host.AcknowledgeEnded(ctx, connect.NewRequest(&hostv1.AcknowledgeEndedRequest{Ids: ids}))
	if err != nil {
		return fmt.Errorf("acknowledge ended sandboxes: %w", hostapi.FromConnect(err))
	}
	return nil
}
