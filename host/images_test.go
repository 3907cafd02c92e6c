package host_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/snapshot"
)

// sealed is a Sealer whose layers all have what they need.
type sealed struct{}

func (sealed) IsSealed(string) (bool, error)      { return true, nil }
func (sealed) Seal(context.Context, string) error { return nil }

// TestALayoutGoesWithItsManifest, or each resume would leave one for ever, and one
// that is older than its layers would be taken for one of theirs.
func TestALayoutGoesWithItsManifest(t *testing.T) {
	dir := t.TempDir()
	store, err := snapshot.Open(snapshot.Config{Dir: filepath.Join(dir, "store")})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = store.Close() }() // nothing is written any more
	b, err := store.First(snapshot.Disk, 8)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = b.Abandon() }() // after Publish it does nothing
	if err := b.Put(t.Context(), 0, bytes.Repeat([]byte{1}, snapshot.BlockBytes)); err != nil {
		t.Fatal(err)
	}
	pin, err := b.Publish(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	images := &host.StoreImages{Store: store, Sealer: sealed{}}
	path, layout, err := images.Disk(t.Context(), "dm", pin.Digest)
	if err != nil || path != "" {
		t.Fatalf("%q, %v", path, err)
	}
	first, err := os.Stat(layout)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := store.Collect(t.Context(), nil); err != nil || c.Files != 0 {
		t.Errorf("of what is in use %+v was collected, %v", c, err)
	}
	if _, again, err := images.Disk(t.Context(), "dm", pin.Digest); err != nil || again != layout {
		t.Errorf("the second disk lies on %q, %v, not on %q", again, err, layout)
	}
	if now, err := os.Stat(layout); err != nil || !os.SameFile(first, now) {
		t.Errorf("the layout was written once more: %v", err)
	}
	pin.Release()
	if c, err := store.Collect(t.Context(), nil); err != nil || c.Files != 3 {
		t.Errorf("%+v was collected, %v, not manifest, layer and layout", c, err)
	}
	if _, err := os.Stat(layout); !os.IsNotExist(err) {
		t.Errorf("the layout is still there: %v", err)
	}
}
