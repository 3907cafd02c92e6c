package disktest

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

const block = disk.BlockBytes

// written is a disk beside what it must hold.
type written struct {
	t      *testing.T
	h      Harness
	config disk.Config
	disk   disk.Disk
	base   []byte // as the guest sees it
	want   []byte
	// switched has the paths that the VMM was told.
	switched []string
}

func newWritten(t *testing.T, h Harness) *written {
	t.Helper()
	w := &written{t: t, h: h, config: configOver(t, Base(t))}
	w.disk = create(t, h, w.config)
	base, err := os.ReadFile(w.config.Base)
	if err != nil {
		t.Fatal(err)
	}
	w.base = append(base, make([]byte, diskSize-baseSize)...)
	w.want = bytes.Clone(w.base)
	return w
}

func (w *written) write(at int64, data []byte) {
	w.t.Helper()
	w.h.Write(w.t, w.disk, at, data)
	copy(w.want[at:], data)
}

// check compares Changes with what a disk held when it had want.
func (w *written) check(c disk.Changes, want []byte) {
	w.t.Helper()
	got := make([]byte, len(want))
	if n, err := c.ReadAt(got, 0); n != len(want) || err != nil {
		w.t.Fatalf("read %d bytes: %v", n, err)
	}
	if at := firstDifference(got, want); at >= 0 {
		w.t.Errorf("byte %d (block %d) is %#x, want %#x", at, at/block, got[at], want[at])
	}
	w.covers(c.Runs(), want)
	w.odd(c, want)
}

// covers says whether every block that is not the base's is in a run.
func (w *written) covers(runs []disk.BlockRun, want []byte) {
	w.t.Helper()
	end := int64(-1)
	for _, r := range runs {
		if r.Start <= end || r.Blocks < 1 || r.End() > int64(len(want))/block {
			w.t.Fatalf("run %v behind block %d", r, end)
		}
		end = r.End()
	}
	for at := range int64(len(want)) / block {
		in := slices.ContainsFunc(runs, func(r disk.BlockRun) bool { return r.Start <= at && at < r.End() })
		if !in && !bytes.Equal(want[at*block:][:block], w.base[at*block:][:block]) {
			w.t.Fatalf("block %d has changed and is in no run: %v", at, runs)
		}
	}
}

// odd reads pieces that are not blocks, and what is not there.
func (w *written) odd(c disk.Changes, want []byte) {
	w.t.Helper()
	for _, r := range [][2]int{{1, 2}, {block - 1, 2}, {3*block + 100, 5 * block}, {len(want) - 7, 7}} {
		got := make([]byte, r[1])
		if n, err := c.ReadAt(got, int64(r[0])); n != len(got) || err != nil || !bytes.Equal(got, want[r[0]:][:r[1]]) {
			w.t.Errorf("%d bytes at %d: %d of them, not the right ones, %v", r[1], r[0], n, err)
		}
	}
	got := make([]byte, 2*block)
	if n, err := c.ReadAt(got, int64(len(want)-block)); n != block || err == nil {
		w.t.Errorf("a read across the end: %d bytes, %v", n, err)
	}
	for _, at := range []int64{-1, int64(len(want)) + 1} {
		if n, err := c.ReadAt(got, at); n != 0 || err == nil {
			w.t.Errorf("a read at %d: %d bytes, %v", at, n, err)
		}
	}
}

func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

func (w *written) changed() disk.Changes {
	w.t.Helper()
	c, err := w.disk.Changed(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

func (w *written) close(c disk.Changes) {
	w.t.Helper()
	if err := c.Close(); err != nil {
		w.t.Error(err)
	}
}

// checkNow compares what the disk is now.
func (w *written) checkNow() {
	w.t.Helper()
	c := w.changed()
	w.check(c, w.want)
	w.close(c)
}

func (w *written) switchTo(_ context.Context, path string) error {
	w.switched = append(w.switched, path)
	return nil
}

func (w *written) next() disk.Changes {
	w.t.Helper()
	before := len(w.switched)
	c, err := w.disk.Next(w.t.Context(), w.switchTo)
	if err != nil {
		w.t.Fatal(err)
	}
	if len(w.switched) > before && w.switched[before] != w.disk.Path() {
		w.t.Errorf("the VMM was told %s, the disk is %s", w.switched[before], w.disk.Path())
	}
	return c
}

// restart is what a server does that starts while nothing runs.
func (w *written) restart() {
	w.t.Helper()
	if err := w.disk.Close(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	w.adopt()
}

// adopt is what a server does that starts and finds a VM.
func (w *written) adopt() {
	w.t.Helper()
	d, err := w.h.Driver.Restore(w.t.Context(), w.config)
	if err != nil {
		w.t.Fatal(err)
	}
	w.disk = d
}

func nothingChanged(t *testing.T, h Harness) {
	w := newWritten(t, h)
	c := w.changed()
	if runs := c.Runs(); len(runs) > 0 {
		t.Errorf("%v", runs)
	}
	w.check(c, w.want)
	w.close(c)
}

func changedHasAll(t *testing.T, h Harness) {
	w := newWritten(t, h)
	w.write(0, []byte("start of disk"))
	w.write(baseSize-mib, make([]byte, 3*block)) // over what the base has
	w.write(mib, make([]byte, block))            // over zeros
	w.write(2*mib-100, make2(200))               // across a block's end
	w.write(diskSize-block, make2(block))
	w.write(8*mib, make2(300*block))
	c := w.changed()
	w.check(c, w.want)
	total := int64(0)
	for _, r := range c.Runs() {
		total += r.Blocks
	}
	if most := int64(1 + 3 + 1 + 2 + 1 + 300); total > most {
		t.Errorf("%d blocks have changed, of %d that were written", total, most)
	}
	w.close(c)
}

func changedSurvives(t *testing.T, h Harness) {
	w := newWritten(t, h)
	w.write(5*block, make2(block))
	w.restart()
	w.checkNow()
	w.write(7*mib, make2(block))
	w.checkNow()
}

func movesOn(t *testing.T, h Harness) {
	w := newWritten(t, h)
	w.write(0, []byte("first"))
	w.write(6*mib, make2(10*block))
	then := bytes.Clone(w.want)
	before := w.next()
	w.check(before, then)
	w.write(0, []byte("later"))
	w.write(6*mib, make([]byte, block))
	w.write(9*mib, make2(block))
	expect(t, h, w.disk, 0, "later")
	expect(t, h, w.disk, baseSize-mib, "end of base")
	w.check(before, then)
	w.checkNow()

	after := bytes.Clone(w.want)
	again := w.next()
	w.write(9*mib, []byte("third"))
	w.check(before, then)
	w.check(again, after)
	w.close(before)
	w.close(again)
	w.checkNow()

	size, err := w.disk.Allocated()
	if err != nil || size < 12*block {
		t.Errorf("with what it was before the disk takes %d bytes (%v)", size, err)
	}
	w.restart()
	expect(t, h, w.disk, 9*mib, "third")
	w.checkNow()
	if err := w.disk.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	empty(t, w.config.Dir)
}

// staysWhereItIs: a sandbox that does nothing can be kept as often as anybody
// likes.
func staysWhereItIs(t *testing.T, h Harness) {
	w := newWritten(t, h)
	for i := range 3 {
		for range disk.MaxOverlays {
			c := w.next()
			w.close(c)
		}
		before := w.next()
		then := bytes.Clone(w.want)
		w.write(int64(i)*mib, []byte("something"))
		w.check(before, then)
		w.close(before)
	}
	w.checkNow()
}

func preparedMove(t *testing.T, h Harness) {
	w := newWritten(t, h)
	w.write(3*mib, make2(block))
	for range 3 {
		if err := w.disk.Prepare(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	w.write(4*mib, make2(block)) // into the overlay that there was
	w.checkNow()
	then := bytes.Clone(w.want)
	before := w.next()
	w.write(4*mib, []byte("behind the move"))
	w.check(before, then)
	w.close(before)
	// A server that dies here has prepared a move that nobody makes.
	if err := w.disk.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.restart()
	expect(t, h, w.disk, 4*mib, "behind the move")
	w.write(4*mib, []byte("another"))
	w.checkNow()
	if err := w.disk.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.disk.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	empty(t, w.config.Dir)
}

func failedMove(t *testing.T, h Harness) {
	w := newWritten(t, h)
	w.write(0, []byte("one"))
	refuse := errors.New("the VMM refuses")
	c, err := w.disk.Next(t.Context(), func(context.Context, string) error { return refuse })
	if err == nil {
		w.close(c) // a driver that asks no VMM
	} else if !errors.Is(err, refuse) || c != nil {
		t.Fatalf("%v, %v", c, err)
	}
	w.checkNow()
	then := bytes.Clone(w.want)
	before := w.next()
	w.write(0, []byte("two"))
	w.check(before, then)
	w.close(before)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if c, err := w.disk.Next(ctx, w.switchTo); err == nil || c != nil {
		t.Errorf("Next on a cancelled context: %v, %v", c, err)
	}
	w.adopt()
	before = w.next()
	then = bytes.Clone(w.want)
	w.write(block, []byte("three"))
	w.check(before, then)
	w.close(before)
	w.checkNow()
}

func movesAreBounded(t *testing.T, h Harness) {
	w := newWritten(t, h)
	for i := range disk.MaxOverlays - 1 {
		w.write(int64(i)*block, []byte("mark"))
		w.close(w.next())
	}
	w.write(0, []byte("last"))
	if err := w.disk.Prepare(t.Context()); err != nil {
		t.Errorf("Prepare, before a move that is refused: %v", err)
	}
	if c, err := w.disk.Next(t.Context(), w.switchTo); !sandbox.Is(err, sandbox.KindConflict) || c != nil {
		t.Errorf("move %d: %v, %v, want kind %s", disk.MaxOverlays, c, err, sandbox.KindConflict)
	}
	w.write(mib, []byte("goes on"))
	w.checkNow()
	w.restart()
	w.checkNow()
}

// atRandom does what a guest, its snapshots and a server do in any order, and
// compares each point with a flat model.
func atRandom(t *testing.T, h Harness) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	w := newWritten(t, h)
	type point struct {
		c    disk.Changes
		want []byte
	}
	var points []point
	for range 40 {
		switch rng.IntN(8) {
		case 0:
			points = append(points, point{w.next(), bytes.Clone(w.want)})
		case 1:
			w.adopt()
		case 2:
			if err := w.disk.Prepare(t.Context()); err != nil {
				t.Fatal(err)
			}
		default:
			data := make2(1 + rng.IntN(20*block))
			if rng.IntN(3) == 0 {
				clear(data)
			}
			at := rng.Int64N(diskSize - int64(len(data)))
			if rng.IntN(2) == 0 {
				at = at / block * block
			}
			w.write(at, data)
		}
	}
	w.checkNow()
	for _, p := range points {
		w.check(p.c, p.want)
		w.close(p.c)
	}
	w.restart()
	w.checkNow()
}
