package server_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/auth"
	"github.com/dormouse-sandbox/dormouse/control/hostfake"
	"github.com/dormouse-sandbox/dormouse/control/reconcile"
	"github.com/dormouse-sandbox/dormouse/control/server"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

var (
	raceSeed  = flag.Uint64("seed", 0, "of the one race to run")
	raceTrace = flag.Bool("trace", false, "show each step of that race")
)

// TestRaces lets pauses, resumes, forks, snapshots, destroys, commands, automatic
// pauses, crashes and restarts of control meet in every order that a seed comes
// to. Every call to the host stands still on its way there, in its middle and on
// its way back, until the seed says that it goes on, that it is lost, or that its
// answer is; time passes when the seed says so. What happens between two steps
// happens at once. So a seed is the same race every time, or nearly: where one step
// wakes several goroutines, or one by two channels, the scheduler has its say. Run it
// a few times with -count.
func TestRaces(t *testing.T) {
	if *raceSeed != 0 {
		race(t, *raceSeed)
		return
	}
	first := rand.Uint64()
	for i := range uint64(6) {
		race(t, first+i)
	}
}

func TestManyRaces(t *testing.T) {
	testkit.Long(t, "it runs a thousand races")
	first := rand.Uint64()
	for i := range uint64(1000) {
		race(t, first+i)
	}
}

func race(t *testing.T, seed uint64) {
	t.Run(fmt.Sprint(seed), func(t *testing.T) {
		cryptotest.SetGlobalRandom(t, seed) // IDs are the same in every run
		dir := ramFolder(t)
		synctest.Test(t, func(t *testing.T) {
			w := &racers{
				t: t, rand: rand.New(rand.NewPCG(seed, seed)), path: filepath.Join(dir, "db"), host: hostfake.New(),
				arrived: make(chan *gate, 10000), answered: make(chan reply, 10000),
				gates: map[*gate]bool{}, names: map[string]string{}, under: map[string]bool{}, doomed: map[string]bool{}, marked: map[string]string{}, shots: map[string]bool{},
			}
			defer func() {
				if t.Failed() || *raceTrace {
					t.Logf("seed %d; again with: go test ./control/server -run TestRaces -seed %d\n%s", seed, seed, w.story())
				}
			}()
			for _, point := range points {
				defer fault.Set(point, w.point)()
			}
			w.run()
		})
	})
}

// points are where control itself stands still, between two things that it does.
var points = []string{
	"control/change/begin", "control/pause/paused", "control/resume/resumed", "control/fork/forked", "control/snapshot/recorded",
	"control/snapshot/made", "control/snapshot/deleting", "control/snapshot/deleted", "control/destroy/begin", "control/destroy/destroyed", "control/create/bounded",
}

// ramFolder is where a database's syncs cost nothing, if there is such a place.
func ramFolder(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "dormouse-race-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // what is left is in memory, and says so
	return dir
}

// racers are the world of one race. All of it is used by the goroutine that drives
// the race, while the others stand still.
type racers struct {
	t     *testing.T
	rand  *rand.Rand
	path  string
	host  *hostfake.Host
	key   string
	db    *store.DB
	srv   *server.Server
	life  int // of control: how often it has started
	trace []string

	arrived  chan *gate
	answered chan reply
	gates    map[*gate]bool
	names    map[string]string // of IDs, which are others every time
	calm     atomic.Bool       // calls pass by themselves

	ops    int
	under  map[string]bool   // operations under way
	boxes  []string          // that somebody was told of
	doomed map[string]bool   // sandboxes that are being destroyed or have crashed, snapshots that are being deleted
	marked map[string]string // marks whose command was answered for, and where
	shots  map[string]bool   // snapshots that somebody was told of
}

// gate is a call that stands still.
type gate struct {
	method, id, where string
	n                 int
	open              chan error // what the call is to be answered
}

// reply is how an operation ended.
type reply struct {
	op     operation
	status int
	body   []byte
}

// operation is one request.
type operation struct {
	name, verb, box, mark, shot string
	method, path                string
	body                        any
	life                        int
	leaves                      bool // its client does not wait for long
}

var (
	errLost = connect.NewError(connect.CodeUnavailable, errors.New("the connection was lost"))
	errFull = hostapi.ToConnect(sandbox.Errorf(sandbox.KindNoSpace, "the disk of the host is full"))
)

// stand waits at a gate. A call whose caller goes away is answered with that.
func (w *racers) stand(ctx context.Context, method, id, where string) error {
	if w.calm.Load() {
		return nil
	}
	g := &gate{method: method, id: id, where: where, open: make(chan error, 1)}
	w.arrived <- g
	select {
	case err := <-g.open:
		return err
	case <-ctx.Done():
		return connect.NewError(connect.CodeCanceled, ctx.Err())
	}
}

const (
	goes   = "goes"
	comes  = "is answered"
	middle = "is in the middle"
	within = "is reached" // in control
)

// wire is the way to the host and back.
func (w *racers) wire(ctx context.Context, method, id string, do func() error) error {
	if err := w.stand(ctx, method, id, goes); err != nil {
		return err
	}
	err := do()
	if lost := w.stand(ctx, method, id, comes); lost != nil {
		return lost
	}
	return err
}

// point stands still at one of points.
func (w *racers) point(ctx context.Context, name string) error {
	if err := w.stand(ctx, name, "", within); err != nil {
		return sandbox.WithKind(sandbox.KindTransient, err)
	}
	return nil
}

// hook stands still in the middle of the host's verbs.
func (w *racers) hook(ctx context.Context, method, id string) error {
	if !strings.Contains(method, ".") {
		return nil
	}
	if w.stand(ctx, method, id, middle) != nil {
		return sandbox.Errorf(sandbox.KindNoSpace, "the disk of the host is full")
	}
	return nil
}

func (w *racers) log(format string, args ...any) {
	w.trace = append(w.trace, fmt.Sprintf(format, args...))
}

// start is a process of control that begins.
func (w *racers) start() {
	var err error
	if w.db, err = store.OpenSQLite(context.Background(), w.path); err != nil {
		w.t.Fatal(err)
	}
	keys := auth.New(w.db, nil)
	if w.key == "" {
		if w.key, err = keys.EnsureKey(context.Background(), "race"); err != nil {
			w.t.Fatal(err)
		}
	}
	w.srv, err = server.New(server.Config{Host: w.host.Direct(w.wire), Store: w.db, Keys: keys, SweepEvery: 24 * time.Hour, KeyCheck: 24 * time.Hour})
	if err != nil {
		w.t.Fatal(err)
	}
	started := make(chan error, 1)
	go func() { started <- w.srv.Start(context.Background()) }()
	for { // its first pass asks the host
		w.gather()
		select {
		case err := <-started:
			if err != nil {
				w.t.Fatal(err)
			}
			return
		default:
			w.release(false)
		}
	}
}

// stop is one that ends. What it was at on the host goes on there.
func (w *racers) stop() {
	w.life++
	closed := make(chan error, 1)
	srv := w.srv
	go func() { closed <- srv.Close() }()
	for {
		w.gather()
		select {
		case err := <-closed:
			if err = errors.Join(err, w.db.Close()); err != nil {
				w.t.Error(err)
			}
			w.gather()
			return
		default:
		}
		for g := range w.gates { // what stands within control ends with it
			if g.where == within {
				delete(w.gates, g)
				g.open <- errLost
			}
		}
		time.Sleep(time.Second)
	}
}

// gather lets everybody run until nobody can, and takes note of who stands where
// and what was answered.
func (w *racers) gather() {
	synctest.Wait()
	var came []*gate
	for len(w.arrived) > 0 {
		came = append(came, <-w.arrived)
	}
	slices.SortStableFunc(came, w.before)
	for _, g := range came {
		w.name(g.id)
		g.n = len(w.trace)
		w.gates[g] = true
	}
	var ends []reply
	for len(w.answered) > 0 {
		ends = append(ends, <-w.answered)
	}
	slices.SortFunc(ends, func(a, b reply) int { return cmp.Compare(a.op.name, b.op.name) })
	for _, a := range ends {
		w.ended(a)
	}
}

// before puts gates in an order that is the same in every run.
func (w *racers) before(a, b *gate) int {
	return cmp.Or(cmp.Compare(a.method, b.method), cmp.Compare(a.where, b.where), cmp.Compare(w.names[a.id], w.names[b.id]), cmp.Compare(a.n, b.n))
}

// name gives an ID a name that is the same in every run.
func (w *racers) name(id string) string {
	if _, err := sandbox.ParseID(id); err != nil {
		return id
	}
	if w.names[id] == "" {
		w.names[id] = fmt.Sprintf("box%02d", len(w.names)+1)
	}
	return w.names[id]
}

// story is what happened, with names for IDs.
func (w *racers) story() string {
	var pairs []string
	for id, name := range w.names {
		pairs = append(pairs, id, name)
	}
	return strings.NewReplacer(pairs...).Replace(strings.Join(w.trace, "\n"))
}

// release opens one gate; in trouble with an error.
func (w *racers) release(trouble bool) {
	if len(w.gates) == 0 {
		return
	}
	standing := slices.SortedFunc(maps.Keys(w.gates), w.before)
	g := standing[w.rand.IntN(len(standing))]
	var err error
	switch full := w.rand.IntN(2) == 0; {
	case !trouble:
	case g.where == comes, g.where == within, !full && g.where == goes:
		err = errLost
	default:
		err = errFull
	}
	w.log("  %s %s %s: %v", g.method, g.id, g.where, err)
	delete(w.gates, g)
	g.open <- err
}

func (w *racers) run() {
	w.host.SetHook(w.hook)
	w.start()
	w.calm.Store(true)
	for range 2 {
		w.do("create")
		w.gather()
	}
	w.calm.Store(false)
	for range 200 {
		w.gather()
		w.step()
	}
	w.settle()
	w.check()
	w.stop()
}

// verbs are what operations do, the more likely ones more than once.
var verbs = []string{"pause", "pause", "pause", "resume", "resume", "exec", "exec", "exec", "fork", "snapshot", "unsnapshot", "destroy", "limits", "create"}

// step is one of what can happen.
func (w *racers) step() {
	switch n := w.rand.IntN(100); {
	case n < 58:
		w.release(false)
	case n < 61:
		w.release(true)
	case n < 66:
		d := []time.Duration{time.Millisecond, 100 * time.Millisecond, 3 * time.Second, 20 * time.Second}[w.rand.IntN(4)]
		w.log("%v pass", d)
		time.Sleep(d)
	case n < 71:
		if id := w.box(); id != "" {
			w.log("%s has been idle", id)
			go w.host.PauseIdle(context.Background(), id)
		}
	case n == 71 && w.rand.IntN(3) == 0:
		if id := w.box(); id != "" {
			w.log("%s crashes", id)
			w.doomed[id] = true
			w.host.Crash(id, sandbox.CauseVMMCrash, "a race")
		}
	case n == 72:
		w.log("control starts anew")
		w.stop()
		w.start()
	case len(w.under) < 8:
		w.do(verbs[w.rand.IntN(len(verbs))])
	}
}

func (w *racers) box() string {
	if len(w.boxes) == 0 {
		return ""
	}
	return w.boxes[w.rand.IntN(len(w.boxes))]
}

// do begins an operation in a goroutine of its own.
func (w *racers) do(verb string) {
	w.ops++
	op := operation{
		name: fmt.Sprintf("%s#%d", verb, w.ops), verb: verb, box: w.box(), mark: fmt.Sprintf("m%d", w.ops),
		shot: fmt.Sprintf("shot%d", w.rand.IntN(4)), life: w.life, leaves: w.rand.IntN(10) == 0, method: "POST",
	}
	if !w.choose(&op) {
		return
	}
	w.log("%s begins, of %s %s", op.name, op.box, op.shot)
	w.under[op.name] = true
	srv, key := w.srv, w.key
	go func() {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		if op.leaves {
			defer time.AfterFunc(2*time.Second, cancel).Stop()
		}
		status, body := call(ctx, srv, key, op.method, op.path, op.body)
		w.answered <- reply{op, status, body}
	}()
}

// choose says what an operation asks for, and whether it makes sense now.
func (w *racers) choose(op *operation) bool {
	if op.box == "" && op.verb != "create" {
		return false
	}
	at := "/v1/sandboxes/" + op.box
	switch op.verb {
	case "create":
		req := api.CreateSandbox{AutoPauseSeconds: float64(w.rand.IntN(2) * 60), TimeoutSeconds: ptr(86400.0)}
		if len(w.shots) > 0 && w.rand.IntN(2) == 0 {
			req.Template = op.shot
		}
		op.path, op.body = "/v1/sandboxes", req
		return len(w.boxes) <= 6
	case "exec":
		op.path, op.body = at+"/exec", api.Exec{Command: []string{"mark", op.mark}}
	case "fork":
		op.path, op.body = at+"/fork", api.Fork{Count: ptr(1 + w.rand.IntN(2))}
	case "snapshot":
		op.path, op.body = "/v1/snapshots", api.CreateSnapshot{Name: op.shot, SandboxID: op.box}
	case "unsnapshot":
		op.method, op.path = "DELETE", "/v1/snapshots/"+op.shot
		w.doomed[op.shot] = true
	case "destroy":
		if w.rand.IntN(2) == 0 {
			return false // there should be something to race with
		}
		op.method, op.path = "DELETE", at
		w.doomed[op.box] = true
	case "limits":
		op.path, op.body = at+"/timeout", api.Timeout{TimeoutSeconds: 86400, AutoPauseSeconds: ptr(float64(w.rand.IntN(2) * 60))}
	default:
		op.path = at + "/" + op.verb
	}
	return true
}

// call makes one request and returns its answer.
func call(ctx context.Context, srv http.Handler, key, method, path string, body any) (int, []byte) {
	var b []byte
	if body != nil {
		var err error
		if b, err = json.Marshal(body); err != nil {
			panic(err) // our own types can always be encoded
		}
	}
	r := httptest.NewRequestWithContext(ctx, method, path, bytes.NewReader(b))
	r.Header.Set("Authorization", "Bearer "+key)
	rec := httptest.NewRecorder()
	srv.ServeHTTP(rec, r)
	return rec.Code, rec.Body.Bytes()
}

// ended notes what an operation has promised, and whether it may end so.
func (w *racers) ended(a reply) {
	w.log("%s ended: %d %.300s", a.op.name, a.status, bytes.TrimSpace(a.body))
	delete(w.under, a.op.name)
	if a.op.leaves || a.op.life != w.life {
		return // nobody has read that, or the process has ended
	}
	switch a.status {
	case 200, 201, 202:
		w.promised(a)
	case 404, 409, 503, 504, 507:
	default:
		w.t.Errorf("%s ended with %d %s", a.op.name, a.status, a.body)
	}
}

func (w *racers) promised(a reply) {
	var box api.Sandbox
	var forked api.Forked
	switch a.op.verb {
	case "create":
		w.decode(a, &box)
		w.name(box.ID)
		w.boxes = append(w.boxes, box.ID)
	case "fork":
		w.decode(a, &forked)
		for _, id := range ids(forked) {
			w.name(id)
			w.boxes = append(w.boxes, id)
		}
	case "exec":
		w.marked[a.op.mark] = a.op.box
	case "snapshot":
		w.shots[a.op.shot] = true
	case "pause", "resume":
		w.decode(a, &box)
		if want := a.op.verb + "d"; a.op.verb == "pause" && box.State != want || a.op.verb == "resume" && box.State != "running" {
			w.t.Errorf("%s was answered with a sandbox that is %s", a.op.name, box.State)
		}
	}
}

func (w *racers) decode(a reply, into any) {
	if err := json.Unmarshal(a.body, into); err != nil {
		w.t.Errorf("%s was answered %s: %v", a.op.name, a.body, err)
	}
}

// settle lets everything come to its end.
func (w *racers) settle() {
	w.calm.Store(true)
	for range 100 {
		w.gather()
		for len(w.gates) > 0 {
			w.release(false)
		}
		w.gather()
		if len(w.under) == 0 {
			break
		}
		time.Sleep(10 * time.Second)
	}
	for name := range w.under {
		w.t.Errorf("%s never ended", name)
	}
	time.Sleep(15 * time.Minute) // beyond every limit
	w.gather()
}

// check compares what is on record with what the host has, and both with what was
// promised.
func (w *racers) check() {
	rows, err := w.db.Sandboxes(context.Background(), store.Filter{})
	if err != nil {
		w.t.Fatal(err)
	}
	known := map[string]bool{}
	for _, row := range rows {
		known[string(row.ID)] = true
		w.checkBox(row)
	}
	for _, id := range append(w.host.Running(), w.boxes...) {
		if !known[id] {
			w.t.Errorf("%s is not on record", id)
		}
	}
	w.checkSnapshots()
	for mark, id := range w.marked {
		if got := w.host.Marks(id)[mark]; got != 1 && !w.doomed[id] {
			w.t.Errorf("command %s in %s was answered for, and has run %d times", mark, id, got)
		}
	}
}

func (w *racers) checkBox(row store.Sandbox) {
	id := string(row.ID)
	status := w.host.Status(id)
	told := slices.Contains(w.boxes, id)
	switch row.State {
	case sandbox.Running, sandbox.Paused:
		want := map[sandbox.State]hostv1.State{sandbox.Running: hostv1.State_STATE_RUNNING, sandbox.Paused: hostv1.State_STATE_PAUSED}[row.State]
		if status.GetState() != want || reconcile.SavedOf(status.GetSaved()) != row.Saved {
			w.t.Errorf("%s is %s with %+v, its host has %v", id, row.State, row.Saved, status)
		}
		if row.State == sandbox.Running && !status.GetSpec().GetDeadline().AsTime().Equal(row.Deadline) || row.State == sandbox.Paused && !row.Deadline.IsZero() {
			w.t.Errorf("%s is %s and has the deadline %v, on its host %v", id, row.State, row.Deadline, status.GetSpec().GetDeadline().AsTime())
		}
		if code, body := call(context.Background(), w.srv, w.key, "POST", "/v1/sandboxes/"+id+"/exec", api.Exec{Command: []string{"echo"}}); code != 200 {
			w.t.Errorf("a command in %s, which is %s: %d %s", id, row.State, code, body)
		}
	case sandbox.Gone, sandbox.Failed:
		if status != nil {
			w.t.Errorf("%s is %s, its host has %v", id, row.State, status)
		}
		if told && !w.doomed[id] {
			w.t.Errorf("%s has ended (%s: %s), and nobody has asked for that", id, row.Cause, row.CauseDetail)
		}
	default:
		w.t.Errorf("%s is %s for ever", id, row.State)
	}
	for mark, n := range w.host.Marks(id) {
		if n > 1 {
			w.t.Errorf("command %s has run %d times in %s", mark, n, id)
		}
	}
}

func (w *racers) checkSnapshots() {
	rows, err := w.db.Snapshots(context.Background(), "")
	if err != nil {
		w.t.Fatal(err)
	}
	var names []string
	for _, row := range rows {
		names = append(names, row.Name)
		if row.State != sandbox.SnapshotReady {
			w.t.Errorf("snapshot %s is %s", row.Name, row.State)
		}
	}
	slices.Sort(names)
	if has := w.host.Snapshots(); !slices.Equal(names, has) {
		w.t.Errorf("the snapshots %v are on record, the host has %v", names, has)
	}
	for name := range w.shots {
		if !slices.Contains(names, name) && !w.doomed[name] {
			w.t.Errorf("snapshot %s is lost", name)
		}
	}
}
