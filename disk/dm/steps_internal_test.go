package dm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// stage is a rig on which one verb is about to run: a neighbour on the same
// base, and the disk that the verb is about.
type stage struct {
	*rig
	base      string
	content   []byte
	config    disk.Config
	neighbour disk.Disk
	near      disk.Config
	flat      string
	before    []string // what remains when only the neighbour is there
	expected  []byte   // what the disk starts with, once it is there
	moves     int      // how often it has moved on
}

const (
	stageBlocks = 64
	stageDisk   = 80 // the last are zeros
)

// verbs are what can fail, be killed, and be called again.
var verbs = []struct {
	name    string
	prepare func(s *stage)
	do      func(ctx context.Context, s *stage) error
	// fewest says how many steps it has at least: a list that came out short
	// proves nothing.
	fewest int
}{
	{
		// The first disk over its base: with sealing, loop devices and all.
		"create", func(*stage) {},
		func(ctx context.Context, s *stage) error { _, err := s.driver.Create(ctx, s.config); return err }, 40,
	},
	{
		"create beside another", func(s *stage) { s.addNeighbour() },
		func(ctx context.Context, s *stage) error { _, err := s.driver.Create(ctx, s.config); return err }, 20,
	},
	{
		"restore", func(s *stage) { s.addDisk(); s.detach() },
		func(ctx context.Context, s *stage) error { _, err := s.driver.Restore(ctx, s.config); return err }, 18,
	},
	{
		"restore of an attached one", func(s *stage) { s.addNeighbour(); s.addDisk() },
		func(ctx context.Context, s *stage) error { _, err := s.driver.Restore(ctx, s.config); return err }, 2,
	},
	{
		"remove", func(s *stage) { s.addDisk() },
		func(ctx context.Context, s *stage) error { return s.driver.overlay(s.config).Remove(ctx) }, 10,
	},
	{
		"remove beside another", func(s *stage) { s.addNeighbour(); s.addDisk() },
		func(ctx context.Context, s *stage) error { return s.driver.overlay(s.config).Remove(ctx) }, 6,
	},
	{
		"flatten", func(s *stage) { s.addDisk() },
		func(ctx context.Context, s *stage) error { return s.driver.Flatten(ctx, s.config, s.flat) }, 8,
	},
	{
		"flatten of a detached one", func(s *stage) { s.addNeighbour(); s.addDisk(); s.detach() },
		func(ctx context.Context, s *stage) error { return s.driver.Flatten(ctx, s.config, s.flat) }, 20,
	},
	{
		"next", func(s *stage) { s.addNeighbour(); s.addDisk() },
		func(ctx context.Context, s *stage) error { return s.move(ctx) }, 33,
	},
	{
		"next of one that has moved on", func(s *stage) { s.addDisk(); s.addMove() },
		func(ctx context.Context, s *stage) error { return s.move(ctx) }, 33,
	},
	{
		"restore of one that has moved on", func(s *stage) { s.addNeighbour(); s.addDisk(); s.addMove(); s.detach() },
		func(ctx context.Context, s *stage) error { _, err := s.driver.Restore(ctx, s.config); return err }, 18,
	},
	{
		"remove of one that has moved on", func(s *stage) { s.addNeighbour(); s.addDisk(); s.addMove() },
		func(ctx context.Context, s *stage) error { return s.driver.overlay(s.config).Remove(ctx) }, 9,
	},
	{
		"mend of one that was suspended", func(s *stage) { s.addNeighbour(); s.addDisk(); s.halfMove(false) },
		func(ctx context.Context, s *stage) error { _, err := s.driver.Restore(ctx, s.config); return err }, 8,
	},
	{
		"mend of one that was handed over", func(s *stage) { s.addNeighbour(); s.addDisk(); s.halfMove(true) },
		func(ctx context.Context, s *stage) error { _, err := s.driver.Restore(ctx, s.config); return err }, 4,
	},
	{
		"remove of one that was suspended", func(s *stage) { s.addNeighbour(); s.addDisk(); s.halfMove(false) },
		func(ctx context.Context, s *stage) error { return s.driver.overlay(s.config).Remove(ctx) }, 9,
	},
}

func (r *rig) stage(name string, prepare func(*stage)) *stage {
	r.t.Helper()
	s := &stage{rig: r, content: pattern(stageBlocks, 3), flat: filepath.Join(r.dir, name, "out", "flat")}
	s.base = r.file(filepath.Join(name, "base.img"), s.content)
	s.config = r.config(filepath.Join(name, "disk"), s.base, stageDisk)
	s.expected = s.content[:2*blockBytes]
	if err := os.Mkdir(filepath.Dir(s.flat), 0o755); err != nil {
		r.t.Fatal(err)
	}
	prepare(s)
	return s
}

func (s *stage) addNeighbour() {
	s.t.Helper()
	s.near = s.rig.config(filepath.Base(filepath.Dir(s.base))+"/neighbour", s.base, stageDisk)
	s.neighbour = s.create(s.near)
	s.write(s.neighbour, 5*blockBytes, []byte("of the neighbour"))
	s.before = s.remains()
}

func (s *stage) addDisk() {
	s.t.Helper()
	d := s.create(s.config)
	s.expected = slices.Clone(s.expected)
	copy(s.expected[100:], "written by the guest")
	s.write(d, 100, []byte("written by the guest"))
}

// move moves the disk on, and looks at what it was.
func (s *stage) move(ctx context.Context) error {
	before, err := s.driver.overlay(s.config).Next(ctx, nil)
	if err != nil {
		return err
	}
	got := make([]byte, len(s.expected))
	_, err = before.ReadAt(got, 0)
	if err == nil && !bytes.Equal(got, s.expected) {
		err = errors.New("what the disk was is not what it was")
	}
	return errors.Join(err, before.Close())
}

// addMove moves the disk on, and writes to it.
func (s *stage) addMove() {
	s.t.Helper()
	if err := s.move(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	s.moves++
	text := fmt.Sprintf("behind move %d", s.moves)
	copy(s.expected[200:], text)
	s.write(s.driver.overlay(s.config), 200, []byte(text))
}

// halfMove leaves a disk as a process does that dies while it is suspended, before
// or after the kernel has handed over what it knows.
func (s *stage) halfMove(handedOver bool) {
	s.t.Helper()
	o, ctx := s.driver.overlay(s.config), s.t.Context()
	m, err := o.beginMove(ctx)
	must(s.t, err, o.prepare(ctx, m.live+1))
	part, err := o.makePart(ctx, m)
	must(s.t, err, o.loadNext(ctx, m.live+1, part), s.driver.k.Suspend(o.name))
	if handedOver {
		must(s.t, s.driver.k.Resume(o.part(m.live)))
	}
}

func (s *stage) detach() {
	s.t.Helper()
	if err := s.driver.overlay(s.config).Close(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
}

// had says whether the disk was there before the verb.
func (s *stage) had() bool { return strings.HasPrefix(string(s.expected[100:]), "written") }

// neighbourIsIntact looks at the disk that the verb was not about.
func (s *stage) neighbourIsIntact() {
	s.t.Helper()
	if s.neighbour != nil {
		s.expect(s.neighbour, 5*blockBytes, []byte("of the neighbour"))
		s.expect(s.neighbour, blockBytes, s.content[blockBytes:2*blockBytes])
	}
}

// diskIsThere restores the disk and reads it.
func (s *stage) diskIsThere() {
	s.t.Helper()
	d := s.restore(s.config)
	s.expect(d, 0, s.expected)
	s.expect(d, stageBlocks*blockBytes, make([]byte, blockBytes))
}

func (s *stage) recorded() bool {
	_, err := os.Lstat(filepath.Join(s.config.Dir, recordFile))
	return err == nil
}

// again calls the verb once more, which must work, and takes everything down.
func (s *stage) again(name string, do func(context.Context, *stage) error) {
	s.t.Helper()
	if err := do(s.t.Context(), s); err != nil {
		s.t.Fatalf("%s again: %v", name, err)
	}
	switch {
	case strings.HasPrefix(name, "remove"):
		if s.recorded() {
			s.t.Errorf("after %s the record is still there", name)
		}
	default:
		s.diskIsThere()
	}
	if strings.HasPrefix(name, "next") {
		s.hasMoved()
	}
	if strings.HasPrefix(name, "flatten") {
		if got, want := s.hashFile(s.flat), s.hash(s.restore(s.config), s.config.SizeBytes); got != want {
			s.t.Errorf("the flat file is another one than the disk")
		}
		if err := os.Remove(s.flat); err != nil {
			s.t.Fatal(err)
		}
	}
	s.neighbourIsIntact()
	s.removeAll()
	s.nothingRemains("after " + name + " again")
}

// hasMoved writes to a disk that has moved on, and looks where that went.
func (s *stage) hasMoved() {
	s.t.Helper()
	d := s.restore(s.config)
	before := slices.Clone(s.expected)
	s.addMove() // nothing was written since: it stays where it is
	c, err := d.Next(s.t.Context(), nil)
	if err != nil {
		s.t.Fatal(err)
	}
	got := make([]byte, len(s.expected))
	if _, err := c.ReadAt(got, 0); err != nil || !bytes.Equal(got, s.expected) || bytes.Equal(got, before) {
		s.t.Errorf("what the disk was is not what it was: %v", err)
	}
	if err := c.Close(); err != nil {
		s.t.Error(err)
	}
	s.diskIsThere()
}

func (s *stage) removeAll() {
	s.t.Helper()
	s.remove(s.driver.overlay(s.config))
	if s.neighbour != nil {
		s.remove(s.neighbour)
	}
}

// TestEachStepFailsOnce fails every step of every verb once, before and after it
// was made: what is left is what was there before, and the same call then works.
func TestEachStepFailsOnce(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		for _, v := range verbs {
			if r.quick(v.name, "create", "restore", "remove", "flatten", "next") {
				continue
			}
			for _, point := range r.some(r.fresh(t).points(v.name, v.prepare, v.do, v.fewest)) {
				t.Run(v.name+" at "+label(point), func(t *testing.T) {
					s := r.fresh(t).stage("stage", v.prepare)
					attached := s.remains()
					disarm := fault.Set(point, fault.Nth(1, fault.Fail))
					err := v.do(t.Context(), s)
					disarm()
					if !errors.Is(err, fault.ErrInjected) {
						t.Errorf("%v, want the injected fault", err)
					}
					s.afterAFailed(v.name, point, attached)
					s.again(v.name, v.do)
				})
			}
		}
	})
}

// points lists a verb's steps.
func (r *rig) points(name string, prepare func(*stage), do func(context.Context, *stage) error, fewest int) []string {
	r.t.Helper()
	s := r.stage("stage", prepare)
	var err error
	points := pointsOf(func() { err = do(r.t.Context(), s) })
	if err != nil {
		r.t.Fatal(err)
	}
	for _, p := range points {
		if !strings.HasPrefix(p, "dm/") && !strings.HasPrefix(p, "osfs/disk-") {
			r.t.Errorf("%s is not a step of this package", p)
		}
	}
	if len(points) < fewest {
		r.t.Errorf("%s passes %d steps, not %d: %v", name, len(points), fewest, points)
	}
	_ = os.Remove(s.flat) // of flatten only
	s.removeAll()
	return points
}

// quick says whether a verb is left out, and some which steps are taken: over a
// real kernel only what is asked of it, once each, in the simplest form, unless
// there is time. A call that fails before it is made leaves what the one before
// it left.
func (r *rig) quick(verb string, in ...string) bool {
	return r.fake == nil && !testkit.IsLong() && !slices.Contains(in, verb)
}

func (r *rig) some(points []string) []string {
	if r.fake != nil || testkit.IsLong() {
		return points
	}
	return slices.DeleteFunc(points, func(p string) bool {
		return !strings.HasPrefix(p, "dm/") || strings.HasPrefix(p, "dm/seal/") || !strings.HasSuffix(p, "/done")
	})
}

func label(parts ...string) string {
	return strings.NewReplacer("/", "-", " ", "-").Replace(strings.Join(parts, "-"))
}

// afterAFailed says what a verb that answered with an error may have left.
func (s *stage) afterAFailed(name, point string, attached []string) {
	s.t.Helper()
	s.neighbourIsIntact()
	switch {
	case strings.HasPrefix(name, "create"):
		if left := s.files(); s.neighbour == nil && len(left) > 0 {
			s.t.Errorf("left %v", left)
		}
		if left := s.remains(); !slices.Equal(left, s.before) {
			s.t.Errorf("left %v, before there was %v", left, s.before)
		}
		if entries, _ := os.ReadDir(s.config.Dir); len(entries) > 0 {
			s.t.Errorf("left %v", entries)
		}
	case strings.HasPrefix(name, "remove"):
		// Half removed is what the next call is for; until the record is gone
		// the disk is all there.
		if s.recorded() {
			s.diskIsThere()
		}
	case strings.HasPrefix(name, "next"):
		s.movedOrNot(attached)
	case strings.HasPrefix(name, "mend"):
		s.diskIsThere()
	default:
		detaching := strings.HasPrefix(point, "dm/node/remove") || strings.Contains(point, "/drop")
		if left := s.remains(); !detaching && !slices.Equal(left, attached) {
			s.t.Errorf("left %v, before there was %v", left, attached)
		}
		if _, err := os.Lstat(s.flat); err == nil {
			s.t.Error("a flat file came with the error")
		}
		for _, f := range s.files() {
			if strings.Contains(f, ".tmp-") {
				s.t.Errorf("left %s", f)
			}
		}
		s.diskIsThere()
		if !slices.Equal(s.remains(), attached) {
			s.detach()
		}
	}
}

// movedOrNot says whether a disk whose move failed is whole, here or there.
func (s *stage) movedOrNot(attached []string) {
	s.t.Helper()
	parts := func(names []string) (n int) {
		for _, name := range names {
			if strings.Contains(name, "-p-") || strings.Contains(name, "/disk/overlay.") {
				n++
			}
		}
		return n
	}
	left := s.remains()
	if more := len(left) - len(attached); more != 0 && more != 2 || parts(left)-parts(attached) != more {
		s.t.Errorf("left %v, before there was %v", left, attached)
	}
	for _, f := range s.files() {
		if strings.Contains(f, ".tmp-") {
			s.t.Errorf("left %s", f)
		}
	}
	s.expect(s.driver.overlay(s.config), 0, s.expected) // it is not suspended
	s.diskIsThere()
}

// TestKilledAtEachStep kills the process at every step of every verb: another
// one finds the neighbour intact and brings the rest in order.
func TestKilledAtEachStep(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		for _, v := range verbs {
			if r.quick(v.name, "create beside another", "remove", "next") {
				continue
			}
			for _, point := range r.some(r.fresh(t).points(v.name, v.prepare, v.do, v.fewest)) {
				t.Run(v.name+" at "+label(point), func(t *testing.T) {
					s := r.fresh(t).stage("stage", v.prepare)
					defer s.kill(v.name, point, v.do)()
					s.afterAKill(v.name)
					s.again(v.name, v.do)
				})
			}
		}
	})
}

// kill runs a verb in a process that dies at a step, and starts a new driver.
// The function it returns ends what is left of the dead process in this one.
func (s *stage) kill(name, point string, do func(context.Context, *stage) error) (revive func()) {
	s.t.Helper()
	if s.fake == nil {
		verb, _, _ := strings.Cut(name, " ")
		s.send(errand{Config: s.config, Do: verb, To: s.flat}, point)
		s.start()
		return func() {}
	}
	dead := *s
	reached, forever, over := make(chan struct{}), make(chan struct{}), make(chan struct{})
	disarm := fault.Set(point, fault.Nth(1, func(context.Context, string) error {
		close(reached)
		<-forever // nothing of a dead process goes on
		return fault.ErrInjected
	}))
	go func() {
		defer close(over)
		_ = do(context.Background(), &dead) // it died
	}()
	<-reached
	disarm()
	s.process.kill()
	for n := range 3 {
		s.fake.unlock(filepath.Join(s.config.Dir, cowName(n)))
	}
	s.fake.unlock(s.base)
	s.start()
	return func() {
		close(forever)
		<-over
	}
}

// afterAKill brings in order what a dead process left, as a host does that
// starts: first the disks that it knows, then the sweep.
func (s *stage) afterAKill(name string) {
	s.t.Helper()
	if s.neighbour != nil {
		s.neighbour = s.restore(s.near)
	}
	s.neighbourIsIntact()
	keep := []string{s.near.Dir}
	switch {
	case s.had() && s.recorded(): // restore, flatten; remove before the record went
		s.diskIsThere()
		keep = append(keep, s.config.Dir)
	case s.had() && !strings.HasPrefix(name, "remove"):
		s.t.Error("the record is gone")
	default: // created, but nobody got to know: it is not kept
		if err := s.driver.Discard(s.t.Context(), s.config.Dir); err != nil {
			s.t.Errorf("discard: %v", err)
		}
	}
	if err := s.driver.Sweep(s.t.Context(), keep); err != nil {
		s.t.Errorf("sweep: %v", err)
	}
	s.neighbourIsIntact()
	if len(keep) == 1 && !slices.Equal(s.remains(), s.before) {
		s.t.Errorf("left %v, before there was %v", s.remains(), s.before)
	}
	if err := osfs.SweepTemp(filepath.Dir(s.flat)); err != nil { // that folder is the caller's of Flatten
		s.t.Error(err)
	}
	_ = os.Remove(s.flat) // whole if it is there, and the caller's
}
