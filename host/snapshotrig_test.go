package host_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
	"github.com/dormouse-sandbox/dormouse/template"
	"github.com/dormouse-sandbox/dormouse/vmm/vmmfake"
)

var testContext = context.Background()

// snapshotRig is a rig that keeps snapshots, in a real store.
type snapshotRig struct {
	*rig
	store  *snapshot.Store
	images *images
}

func newSnapshotRig(t *testing.T) *snapshotRig {
	t.Helper()
	r := &snapshotRig{rig: newRig(t)}
	r.agentCfg = func(c *host.Config) {
		if r.store != nil {
			_ = r.store.Close() // what an agent before had
		}
		var err error
		if r.store, err = snapshot.Open(snapshot.Config{Dir: filepath.Join(r.dir, "snapshots")}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = r.store.Close() })
		r.images = &images{store: r.store, dir: t.TempDir()}
		c.Snapshots, c.Images, c.Warm = r.store, r.images, true
	}
	return r
}

// images writes whole files of what is composed elsewhere.
type images struct {
	store   *snapshot.Store
	dir     string
	damaged atomic.Bool
}

// Base takes a template's image into the store.
func (i *images) Base(_ context.Context, t template.Template, bytes int64) (*snapshot.Pin, error) {
	b, err := i.store.First(snapshot.Disk, bytes/snapshot.BlockBytes)
	if err != nil {
		return nil, err
	}
	defer func() { _ = b.Abandon() }() // after Publish it does nothing
	data, err := os.ReadFile(t.Image)
	if err != nil {
		return nil, err
	}
	if err := b.Put(testContext, 0, data); err != nil {
		return nil, err
	}
	return b.Publish(testContext)
}

// Disk writes a base out.
func (i *images) Disk(_ context.Context, _ string, d snapshot.Digest) (base, layout string, err error) {
	f, err := i.write(d)
	if err != nil {
		return "", "", err
	}
	return f.Name(), "", f.Close()
}

// Sweep has nothing to do: what the tests take in has no name.
func (i *images) Sweep([]template.Template) error { return nil }

// Damaged says what the test has said.
func (i *images) Damaged(snapshot.Digest) bool { return i.damaged.Load() }

// Memory writes a memory out.
func (i *images) Memory(d snapshot.Digest) (*os.File, error) { return i.write(d) }

func (i *images) write(d snapshot.Digest) (*os.File, error) {
	image, err := i.store.Image(d)
	if err != nil {
		return nil, err
	}
	defer func() { _ = image.Close() }() // it was only read
	f, err := os.CreateTemp(i.dir, "")
	if err != nil {
		return nil, err
	}
	m := image.Manifest()
	if err := f.Truncate(m.Bytes()); err != nil {
		return nil, err
	}
	for n := range m.Extents() {
		e := m.Extent(n)
		if e.Layer == snapshot.Zero {
			continue
		}
		part := io.NewSectionReader(image, e.Start*snapshot.BlockBytes, e.Blocks*snapshot.BlockBytes)
		if _, err := io.Copy(io.NewOffsetWriter(f, e.Start*snapshot.BlockBytes), part); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// told answers /init: a restored guest must have stood still, and be told who it is
// by the name that it had.
func (r *rig) told(m vmmfake.Inside, w http.ResponseWriter, req *http.Request) bool {
	var body guestapi.Init
	if err := json.NewDecoder(req.Body).Decode(&body); err != nil {
		guestapi.WriteError(w, http.StatusBadRequest, err.Error())
		return false
	}
	was := strings.TrimRight(read(m, 4096, 64), "\x00")
	_, _ = m.Memory.WriteAt([]byte(body.SandboxID), 4096) // it never fails
	if !body.Restored {
		w.WriteHeader(http.StatusNoContent)
		return true
	}
	if body.Rehearsal && r.forgets.Load() { // half-way, with its processes standing still
		r.stand(m.Spec.ID, true, nil)
		guestapi.WriteError(w, http.StatusInternalServerError, "it has forgotten its lines")
		return false
	}
	r.stand(m.Spec.ID, false, nil)
	if body.Rehearsal {
		_, _ = m.Memory.WriteAt([]byte("rehearsed"), 4096+64) // it never fails
		_ = json.NewEncoder(w).Encode(guestapi.Identified{})
		return true
	}
	r.mu.Lock()
	r.origins[m.Spec.ID] = was
	r.mu.Unlock()
	_ = json.NewEncoder(w).Encode(guestapi.Identified{Frozen: true})
	return true
}

// stand notes whether a guest's processes stand still.
func (r *rig) stand(id sandbox.ID, still bool, w http.ResponseWriter) {
	r.mu.Lock()
	r.standing[id] = still
	r.mu.Unlock()
	if w != nil {
		w.WriteHeader(http.StatusNoContent)
	}
}

func (r *rig) stands(id sandbox.ID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.standing[id]
}

func (r *rig) inside(id sandbox.ID) vmmfake.Inside {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.insides[id]
}

func read(m vmmfake.Inside, off int64, n int) string {
	p := make([]byte, n)
	if _, err := m.Memory.ReadAt(p, off); err != nil {
		return err.Error()
	}
	return string(p)
}

// truth is a flat model of what a guest's memory and disk hold.
type truth struct{ memory, disk map[int64]byte }

func newTruth() truth { return truth{map[int64]byte{}, map[int64]byte{}} }

func (m truth) copy() truth {
	c := newTruth()
	for k, v := range m.memory {
		c.memory[k] = v
	}
	for k, v := range m.disk {
		c.disk[k] = v
	}
	return c
}

// fill writes a page full of a byte, of memory and of disk; 0 is a page of zeros.
func (r *rig) fill(id sandbox.ID, page int64, value byte, m truth) {
	r.t.Helper()
	data := bytes.Repeat([]byte{value}, 4096)
	inside := r.inside(id)
	_, err := inside.Memory.WriteAt(data, page*4096)
	if err != nil {
		r.t.Fatal(err)
	}
	f, err := os.OpenFile(inside.Disk(), os.O_WRONLY, 0)
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := f.WriteAt(data, page*4096); err != nil {
		r.t.Fatal(err)
	}
	m.memory[page], m.disk[page] = value, value
}

// holds compares every page that the model knows, and some others.
func (r *snapshotRig) holds(id sandbox.ID, m truth) {
	r.t.Helper()
	inside := r.inside(id)
	for page := int64(2); page < 60; page++ {
		want := string(bytes.Repeat([]byte{m.memory[page]}, 4096))
		if got := read(inside, page*4096, 4096); got != want {
			r.t.Errorf("page %d of the memory of %s holds %q…, want %q…", page, id, got[:4], want[:4])
		}
	}
	if err := r.diskHolds(id, m); err != nil {
		r.t.Error(err)
	}
}

// diskHolds looks through the overlay, and where that has a hole at its base.
func (r *snapshotRig) diskHolds(id sandbox.ID, m truth) error {
	path := filepath.Join(r.dir, "host/sandboxes", string(id), "disk")
	r.disks.mu.Lock()
	base := r.disks.bases[path]
	r.disks.mu.Unlock()
	d := &fakeDisk{path: path, base: base}
	changed, err := d.Changed(testContext)
	if err != nil {
		return err
	}
	defer func() { _ = changed.Close() }()
	own := map[int64]bool{}
	for _, run := range changed.Runs() {
		for i := range run.Blocks {
			own[run.Start+i] = true
		}
	}
	lower, err := os.Open(base)
	if err != nil {
		return err
	}
	defer func() { _ = lower.Close() }()
	for block := int64(2); block < 60; block++ {
		got := make([]byte, 4096)
		if own[block] {
			_, err = changed.ReadAt(got, block*4096)
		} else {
			_, err = lower.ReadAt(got, block*4096)
		}
		if err != nil {
			return err
		}
		if want := bytes.Repeat([]byte{m.disk[block]}, 4096); !bytes.Equal(got, want) {
			return fmt.Errorf("block %d of the disk of %s holds %q…, want %q…", block, id, got[:4], want[:4])
		}
	}
	return nil
}
