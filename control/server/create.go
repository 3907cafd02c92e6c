package server

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/place"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// creation is one create under way. It belongs to the server, not to the
// request that asked for it.
type creation struct {
	cancel context.CancelCauseFunc
	done   chan struct{} // closed when the fields below are set
	row    store.Sandbox
	phases []api.Phase
	err    error
}

// creates are the creates of this process that are under way.
type creates struct {
	mu     sync.Mutex
	closed bool
	byID   map[sandbox.ID]*creation
}

func (c *creates) init() { c.byID = map[sandbox.ID]*creation{} }

func (c *creates) find(id sandbox.ID) *creation {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.byID[id]
}

func (c *creates) remove(id sandbox.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.byID, id)
}

func (c *creates) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
}

// createSandbox begins a create, or finds the one that the same idempotency key
// began, and answers when it has come to an end.
func (s *Server) createSandbox(w http.ResponseWriter, r *http.Request) error {
	req, err := readCreate(w, r)
	if err != nil {
		return err
	}
	idem, err := idempotency(r, req)
	if err != nil {
		return err
	}
	if idem != nil {
		earlier, found, err := s.cfg.Store.Repeated(r.Context(), *idem, s.cfg.Now())
		if err != nil {
			return err
		}
		if found {
			return s.answerCreate(w, r, s.creates.find(earlier.ID), earlier.ID, http.StatusOK)
		}
	}
	row, err := s.wanted(r.Context(), req)
	if err != nil {
		return err
	}
	c, id, err := s.begin(r.Context(), row, idem, req.Start != nil && !*req.Start)
	if err != nil {
		return err
	}
	status := http.StatusCreated
	if id != row.ID {
		status, c = http.StatusOK, s.creates.find(id)
	}
	return s.answerCreate(w, r, c, id, status)
}

// readCreate reads the body of a create. A size that is given as zero is out of
// bounds; only one that is left out means the default.
func readCreate(w http.ResponseWriter, r *http.Request) (api.CreateSandbox, error) {
	var body struct {
		api.CreateSandbox
		VCPUs   *int `json:"vcpus"` // these hide the fields of the same names
		MemMiB  *int `json:"mem_mib"`
		DiskMiB *int `json:"disk_mib"`
	}
	if err := readBody(w, r, &body); err != nil {
		return api.CreateSandbox{}, err
	}
	req := body.CreateSandbox
	for _, size := range []struct {
		name      string
		given     *int
		into      *int
		min, most int
	}{
		{"vcpus", body.VCPUs, &req.VCPUs, sandbox.MinVCPUs, sandbox.MaxVCPUs},
		{"mem_mib", body.MemMiB, &req.MemMiB, sandbox.MinMemMiB, sandbox.MaxMemMiB},
		{"disk_mib", body.DiskMiB, &req.DiskMiB, sandbox.MinDiskMiB, sandbox.MaxDiskMiB},
	} {
		if size.given == nil {
			continue
		}
		if *size.given == 0 {
			return req, sandbox.Errorf(sandbox.KindInvalid, "%s is 0, must be from %d to %d", size.name, size.min, size.most)
		}
		*size.into = *size.given
	}
	return req, nil
}

// wanted checks a request and makes the row of it.
func (s *Server) wanted(ctx context.Context, req api.CreateSandbox) (store.Sandbox, error) {
	row := store.Sandbox{
		ID: sandbox.NewID(), State: sandbox.Creating, Host: s.cfg.HostName, Metadata: req.Metadata, CreatedAt: s.cfg.Now(),
		AutoResume: req.AutoResume == nil || *req.AutoResume, Timeout: sandbox.DefaultTimeout,
		Spec: sandbox.Spec{
			Template: req.Template, VCPUs: req.VCPUs, MemMiB: req.MemMiB, DiskMiB: req.DiskMiB, Env: req.Env,
			Network: sandbox.Network{Internet: req.Network == nil || req.Network.Internet},
		},
	}
	var err error
	if row.AutoPause, err = autoPause(req.AutoPauseSeconds); err != nil {
		return row, err
	}
	if row.AutoPause > 0 { // it costs little while nobody uses it, and should be there when somebody does
		row.Timeout = sandbox.MaxTimeout
	}
	if req.TimeoutSeconds != nil {
		if row.Timeout, err = seconds("timeout_seconds", *req.TimeoutSeconds, sandbox.MinTimeout, sandbox.MaxTimeout); err != nil {
			return row, err
		}
	}
	if err := sandbox.CheckMetadata(req.Metadata); err != nil {
		return row, err
	}
	if req.Template != "" {
		if err := sandbox.SafeName("template", req.Template); err != nil {
			return row, err
		}
	}
	locked, err := s.fromSnapshot(ctx, &row.Spec)
	if err != nil {
		return row, err
	}
	row.Spec = row.Spec.WithDefaults()
	if err := row.Spec.Check(); err != nil {
		return row, err
	}
	return row, s.choose(ctx, row.Spec, locked)
}

// fromSnapshot gives a spec the shape of its snapshot, if its template is one. That
// is locked: a memory that was saved fits no other.
func (s *Server) fromSnapshot(ctx context.Context, spec *sandbox.Spec) (locked bool, _ error) {
	snap, err := s.cfg.Store.Snapshot(ctx, spec.Template)
	if sandbox.Is(err, sandbox.KindNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if snap.State != sandbox.SnapshotReady {
		return true, snapshotBusy(snap)
	}
	for _, figure := range []struct {
		name, unit string
		asked      *int
		has        int
	}{
		{"vcpus", "", &spec.VCPUs, snap.VCPUs},
		{"mem_mib", " MiB", &spec.MemMiB, snap.MemMiB},
		{"disk_mib", " MiB", &spec.DiskMiB, snap.DiskMiB},
	} {
		if *figure.asked != 0 && *figure.asked != figure.has {
			return true, sandbox.Errorf(sandbox.KindInvalid, "%s is %d, snapshot %s was taken with %d%s, which cannot be changed",
				figure.name, *figure.asked, snap.Name, figure.has, figure.unit)
		}
		*figure.asked = figure.has
	}
	return true, nil
}

// seconds turns a number from outside into a duration within bounds.
func seconds(what string, n float64, least, most time.Duration) (time.Duration, error) {
	if n < least.Seconds() || n > most.Seconds() || n != n {
		return 0, sandbox.Errorf(sandbox.KindInvalid, "%s is %v, must be from %v to %v", what, n, least.Seconds(), most.Seconds())
	}
	return time.Duration(n * float64(time.Second)), nil
}

// idempotency reads the key, if there is one. The hash is of the request as it
// was understood, so that spacing and the order of fields do not matter.
func idempotency(r *http.Request, req any) (*store.Idempotency, error) {
	key := r.Header.Get(api.HeaderIdempotencyKey)
	if key == "" {
		return nil, nil
	}
	if len(key) > api.MaxIdempotencyKey {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "%s has %d bytes, at most %d are allowed",
			api.HeaderIdempotencyKey, len(key), api.MaxIdempotencyKey)
	}
	if strings.ContainsFunc(key, func(c rune) bool { return c < 0x21 || c > 0x7e }) {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "%s must be of printable ASCII without spaces", api.HeaderIdempotencyKey)
	}
	b, err := json.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	sum := sha256.Sum256(b)
	return &store.Idempotency{Owner: askingKey(r.Context()).ID, Key: key, Hash: sum[:], TTL: idempotencyTTL}, nil
}

// choose asks the host what it has, and refuses early and clearly what cannot
// be. The host checks again. The template may be known to be there.
func (s *Server) choose(ctx context.Context, spec sandbox.Spec, known bool) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.CallLimit)
	defer cancel()
	if err := fault.Point(ctx, "control/create/place"); err != nil {
		return err
	}
	h, err := s.cfg.Host.GetHost(ctx, connect.NewRequest(&hostv1.GetHostRequest{}))
	if err != nil {
		return fmt.Errorf("ask the host: %w", hostapi.FromConnect(err))
	}
	_, err = place.Choose([]place.Host{{
		Name: s.cfg.HostName, MemTotalMiB: int(h.Msg.GetMemTotalMib()), MemCommittedMiB: int(h.Msg.GetMemCommittedMib()),
		Sandboxes: int(h.Msg.GetSandboxes()), MaxSandboxes: int(h.Msg.GetMaxSandboxes()),
	}}, spec)
	if err != nil || known {
		return err
	}
	t, err := s.cfg.Host.ListTemplates(ctx, connect.NewRequest(&hostv1.ListTemplatesRequest{}))
	if err != nil {
		return fmt.Errorf("ask the host: %w", hostapi.FromConnect(err))
	}
	snaps, err := s.cfg.Store.Snapshots(ctx, s.cfg.HostName)
	if err != nil {
		return err
	}
	var names []string
	for _, snap := range snaps {
		names = append(names, snap.Name)
	}
	return checkTemplate(t.Msg.GetTemplates(), names, spec)
}

// checkTemplate finds a spec's image among those of a host; names are what other
// templates there are.
func checkTemplate(have []*hostv1.Template, names []string, spec sandbox.Spec) error {
	for _, t := range have {
		if t.GetName() == spec.Template {
			if least := int(t.GetMinDiskMib()); spec.DiskMiB < least {
				return sandbox.Errorf(sandbox.KindInvalid, "disk_mib is %d, template %s needs at least %d", spec.DiskMiB, spec.Template, least)
			}
			return nil
		}
		names = append(names, t.GetName())
	}
	if len(names) == 0 {
		return sandbox.Errorf(sandbox.KindNotFound, "there is no template %s, and no other either", spec.Template)
	}
	slices.Sort(names)
	const most = 20
	if len(names) > most {
		names = append(names[:most], "…")
	}
	return sandbox.Errorf(sandbox.KindNotFound, "there is no template %s; there are: %s", spec.Template, strings.Join(names, ", "))
}

// begin puts the create on record and starts it. From here on it does not
// depend on the request. The registration comes first: a row in state creating
// that nobody owns is the reconciler's. When the idempotency key turns out to be
// in use it starts nothing and returns that sandbox's ID.
func (s *Server) begin(ctx context.Context, row store.Sandbox, idem *store.Idempotency, noStart bool) (*creation, sandbox.ID, error) {
	row.Work = store.Work{Owner: s.owner, Until: row.CreatedAt.Add(s.cfg.CreateLimit)}
	life, cancel := context.WithCancelCause(s.ctx)
	c := &creation{cancel: cancel, done: make(chan struct{})}
	s.creates.mu.Lock()
	if s.creates.closed {
		s.creates.mu.Unlock()
		cancel(nil)
		return nil, "", errStopping
	}
	s.creates.byID[row.ID] = c
	s.wg.Add(1)
	s.creates.mu.Unlock()

	got, made, err := s.cfg.Store.CreateSandbox(context.WithoutCancel(ctx), row, idem)
	if err != nil || !made {
		s.creates.remove(row.ID)
		cancel(nil)
		s.wg.Done()
		return nil, got.ID, err
	}
	go func() {
		defer s.wg.Done()
		defer cancel(nil)
		c.row, c.phases, c.err = s.create(life, got, noStart)
		s.creates.remove(row.ID)
		close(c.done)
		s.reconciler.Kick() // the host's record of a failure can be acknowledged
	}()
	return c, got.ID, nil
}

// answerCreate waits for a create, whoever runs it, and answers with its end. c
// is nil when it is not under way in this process.
func (s *Server) answerCreate(w http.ResponseWriter, r *http.Request, c *creation, id sandbox.ID, status int) error {
	row, phases, err := s.outcome(r.Context(), c, id)
	if err != nil {
		return err
	}
	out := sandboxOut(row)
	out.Phases = phases
	w.Header().Set("Location", "/v1/sandboxes/"+out.ID)
	writeJSON(w, status, out)
	return nil
}

func (s *Server) outcome(ctx context.Context, c *creation, id sandbox.ID) (store.Sandbox, []api.Phase, error) {
	if c != nil {
		select {
		case <-c.done:
			return c.row, c.phases, c.err
		case <-ctx.Done():
			return store.Sandbox{}, nil, ctx.Err() // nobody reads this answer; the create goes on
		}
	}
	row, err := s.afterwards(ctx, id, sandbox.Creating) // another process runs it, or ran it
	if err != nil {
		return store.Sandbox{}, nil, err
	}
	if row.State == sandbox.Failed {
		return row, nil, createError(row, sandbox.KindConflict)
	}
	return row, nil, nil
}

// create takes a recorded sandbox to running, or to failed.
func (s *Server) create(ctx context.Context, row store.Sandbox, noStart bool) (store.Sandbox, []api.Phase, error) {
	start := s.cfg.Now()
	running, phases, err := s.boot(ctx, row, noStart)
	if err != nil {
		running, err = s.createFailed(ctx, row, err)
	}
	if err != nil {
		return running, nil, err
	}
	took := s.cfg.Now().Sub(start)
	s.meters.creates.WithLabelValues("running").Inc()
	s.meters.boot.Observe(took.Seconds())
	s.cfg.Log.Info("state changed", "sandbox", row.ID, "host", row.Host, "op", "create", "from", row.State, "to", running.State, "took", took)
	return running, phases, nil
}

// boot has the host make the sandbox. Its life starts when it runs: until then
// the host has a later deadline, which holds if we die here.
func (s *Server) boot(ctx context.Context, row store.Sandbox, noStart bool) (store.Sandbox, []api.Phase, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.CreateLimit)
	defer cancel()
	if err := fault.Point(ctx, "control/create/recorded"); err != nil {
		return row, nil, err
	}
	deadline := s.cfg.Now().Add(min(s.cfg.CreateLimit+row.Timeout, sandbox.MaxTimeout))
	resp, err := s.cfg.Host.CreateSandbox(ctx, connect.NewRequest(&hostv1.CreateSandboxRequest{
		Spec: specOut(row, deadline), NoStart: noStart,
	}))
	if err != nil {
		return row, nil, hostapi.FromConnect(err)
	}
	if err := fault.Point(ctx, "control/create/created"); err != nil {
		return row, nil, err
	}
	row, err = s.created(ctx, row, resp.Msg.GetStatus())
	if err != nil {
		return row, nil, err
	}
	return row, phasesOut(resp.Msg.GetStatus().GetPhases()), nil
}

// created bounds the life of a sandbox that runs now, and records that it does.
func (s *Server) created(ctx context.Context, row store.Sandbox, status *hostv1.SandboxStatus) (store.Sandbox, error) {
	deadline, err := s.bound(ctx, row, row.Timeout)
	if err != nil {
		return row, fmt.Errorf("set deadline: %w", hostapi.FromConnect(err))
	}
	if err := fault.Point(ctx, "control/create/bounded"); err != nil {
		return row, err
	}
	run := store.Run{Deadline: deadline}
	if start := sandbox.Start(status.GetStart()); start.Valid() {
		run.Start = start
	}
	return s.cfg.Store.Runs(ctx, row, run)
}

var errDestroyed = sandbox.Errorf(sandbox.KindConflict, "the sandbox was destroyed while it was being created")

// createFailed removes what the host may have and records the end. A host that
// does not answer now is told later: what the database has as ended, the
// reconciler destroys. A sandbox that somebody else found running meanwhile, a
// reconciler of another process for example, is no failure and returned as it is.
func (s *Server) createFailed(ctx context.Context, row store.Sandbox, why error) (store.Sandbox, error) {
	if cause := context.Cause(ctx); errors.Is(cause, errDestroyed) || errors.Is(cause, errStopping) {
		why = cause
	}
	kind := sandbox.KindOf(why)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.CallLimit)
	defer cancel()
	if now, err := s.cfg.Store.Sandbox(ctx, row.ID); err == nil && now.State != sandbox.Creating {
		// Whoever changed it sees to the host.
		if now.State.Ended() || now.State == sandbox.Destroying {
			return now, &aboutSandbox{row.ID, errDestroyed}
		}
		return now, nil
	}
	cause, detail := sandbox.CauseCreateFailed, why.Error()
	resp, err := s.cfg.Host.DestroySandbox(ctx, connect.NewRequest(
		&hostv1.DestroySandboxRequest{Id: string(row.ID), Cause: string(cause)}))
	if err != nil {
		s.cfg.Log.Warn("failed create not removed from its host yet", "sandbox", row.ID, "host", row.Host, "op", "create", "err", err)
	} else if st := resp.Msg.GetStatus(); st.GetState() == hostv1.State_STATE_ENDED {
		if told := sandbox.Cause(st.GetCause()); told.Valid() {
			cause = told
		}
		if st.GetCauseDetail() != "" {
			detail = st.GetCauseDetail()
		}
	}
	s.meters.creates.WithLabelValues(string(cause)).Inc()
	s.cfg.Log.Warn("state changed", "sandbox", row.ID, "host", row.Host, "op", "create", "to", cause.End(), "cause", cause, "err", why)
	after, err := s.cfg.Store.End(ctx, row, cause, detail, s.cfg.Now())
	if err != nil {
		// The row stays creating and nobody owns it now: the reconciler ends it.
		return row, &aboutSandbox{row.ID, fmt.Errorf("record the end of a failed create: %w", err)}
	}
	return after, createError(after, kind)
}

// createError tells why a create failed. The cause and its detail are meant for
// whoever asked, who can read them with GET as well.
func createError(row store.Sandbox, kind sandbox.Kind) error {
	return &aboutSandbox{row.ID, &told{sandbox.Errorf(kind,
		"the sandbox could not be created: %s: %s", row.Cause, cut(row.CauseDetail, 2000))}}
}

// told marks an error whose text may be shown even when its kind is internal.
type told struct{ err error }

func (t *told) Error() string { return t.err.Error() }
func (t *told) Unwrap() error { return t.err }
