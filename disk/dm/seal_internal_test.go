package dm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// TestSealingIsDoneOnce: two servers share a base, and both find it without a
// seal. What one that died has left beside it is swept, and not what the other
// is writing.
func TestSealingIsDoneOnce(t *testing.T) {
	a := fakeRig(t)
	b := fakeRig(t)
	base := a.file("base.img", pattern(64, 1))
	left := a.file(".tmp-base.img"+treeSuffix+"-123", []byte("half a tree"))
	other := a.file(".tmp-base.img2"+treeSuffix+"-123", []byte("of another base"))
	reached, on := make(chan struct{}), make(chan struct{})
	trees := 0
	var mu sync.Mutex
	defer fault.Set("osfs/disk-tree/rename", func(context.Context, string) error {
		mu.Lock()
		trees++
		first := trees == 1
		mu.Unlock()
		if first {
			close(reached)
			<-on
		}
		return nil
	})()
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := a.driver.Create(t.Context(), a.config("disk", base, 64)); err != nil {
			t.Error(err)
		}
	})
	<-reached
	if _, err := os.Lstat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what a dead process left is there: %v", err)
	}
	// The second waits: that shows in its giving up with its caller.
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := b.driver.Create(ctx, b.config("disk", base, 64)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while another seals: %v", err)
	}
	wg.Go(func() {
		if _, err := b.driver.Create(t.Context(), b.config("disk", base, 64)); err != nil {
			t.Error(err)
		}
	})
	close(on)
	wg.Wait()
	if trees != 1 {
		t.Errorf("%d trees were written", trees)
	}
	if _, err := os.Lstat(other); err != nil {
		t.Error(err)
	}
	if found, err := filepath.Glob(filepath.Join(a.dir, ".tmp-base.img.*")); err != nil || len(found) > 0 {
		t.Errorf("left: %v, %v", found, err)
	}
}

// TestAnotherFileUnderTheSamePath is no base for a new disk. A disk that is there
// may be restored: what is still right of its base can be read.
func TestAnotherFileUnderTheSamePath(t *testing.T) {
	r := fakeRig(t)
	base := r.file("base.img", pattern(64, 1))
	config := r.config("disk", base, 64)
	d := r.create(config)
	r.write(d, 0, []byte("mine"))
	must(t, d.Close(t.Context()))
	sealed, err := os.Stat(base + recordSuffix)
	must(t, err)
	later := sealed.ModTime().Add(time.Second)

	// Touched, and still the same.
	must(t, os.Chtimes(base, later, later))
	r.remove(r.create(r.config("other", base, 64)))

	// The same size, other content.
	must(t, os.Remove(base))
	r.file("base.img", pattern(64, 2))
	must(t, os.Chtimes(base, later.Add(time.Second), later.Add(time.Second)))
	_, err = r.driver.Create(t.Context(), r.config("other", base, 64))
	if !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), base) {
		t.Errorf("other content: %v, want kind %s", err, sandbox.KindConflict)
	}
	d = r.restore(config)
	r.expect(d, 0, []byte("mine"))
	if data, err := r.tryRead(d, blockBytes, blockBytes); err == nil {
		t.Errorf("the other content is read: %.20q", data)
	}
	r.remove(d)

	// Another size.
	r.file("base.img", pattern(65, 1))
	_, err = r.driver.Create(t.Context(), r.config("other", base, 65))
	if !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), "had 262144 when it was sealed") {
		t.Errorf("another size: %v, want kind %s", err, sandbox.KindConflict)
	}
	must(t, os.RemoveAll(filepath.Join(r.dir, "other")))
	r.nothingRemains("over another base")
}

// TestALostTreeIsMended if the layer still is what was sealed, and only then.
func TestALostTreeIsMended(t *testing.T) {
	r := fakeRig(t)
	content := pattern(300, 1)
	base := r.file("base.img", content)
	config := r.config("disk", base, 300)
	r.remove(r.create(config))
	for _, spoil := range []func() error{
		func() error { return os.Remove(base + treeSuffix) },
		func() error {
			return errors.Join(os.Chmod(base+treeSuffix, 0o600), os.Truncate(base+treeSuffix, blockBytes))
		},
	} {
		must(t, spoil())
		d := r.create(config)
		r.expect(d, 0, content)
		r.remove(d)
	}
	flip(t, base, 100)
	must(t, os.Remove(base+treeSuffix))
	if _, err := r.driver.Create(t.Context(), config); !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), base) {
		t.Errorf("%v, want kind %s", err, sandbox.KindConflict)
	}
	r.nothingRemains("by a damaged base")
}

// TestDamageIsBounded: of a base that is another file altogether not every block
// is listed.
func TestDamageIsBounded(t *testing.T) {
	r := fakeRig(t)
	base := r.file("base.img", pattern(3*maxDamage, 1))
	r.remove(r.create(r.config("disk", base, 3*maxDamage)))
	r.file("base.img", make([]byte, 3*maxDamage*blockBytes))
	found, err := r.driver.Verify(t.Context(), base)
	if err != nil || len(found) != maxDamage+1 {
		t.Fatalf("%d blocks, %v; want %d and how many more", len(found), err, maxDamage)
	}
	if last := found[maxDamage]; !strings.Contains(last.Cause, "and so are") {
		t.Errorf("%v", last)
	}
}
