package base_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/dormouse-sandbox/dormouse/host/base"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/sparse"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
)

const block = snapshot.BlockBytes

// place is a folder with a store, and the image of a template.
type place struct {
	t     testing.TB
	dir   string
	store *snapshot.Store
	image string
	data  []byte
}

func newPlace(t testing.TB) *place {
	t.Helper()
	p := &place{t: t, dir: t.TempDir(), data: make([]byte, 2000*block)}
	for _, run := range [][2]int{{0, 3}, {100, 300}, {1900, 100}} {
		for at := run[0]; at < run[0]+run[1]; at++ {
			copy(p.data[at*block:], fmt.Sprintf("block %d", at))
		}
	}
	p.image = filepath.Join(p.dir, "image")
	f, err := os.Create(p.image)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sparse.Copy(f, bytes.NewReader(p.data)); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	p.open()
	return p
}

func (p *place) storeDir() string { return filepath.Join(p.dir, "store") }

// open opens the store, as the next server does after a crash.
func (p *place) open() {
	p.t.Helper()
	s, err := snapshot.Open(snapshot.Config{Dir: p.storeDir()})
	if err != nil {
		p.t.Fatal(err)
	}
	p.store = s
	p.t.Cleanup(func() { _ = s.Close() }) // a test may have closed it
}

func (p *place) digest() string { return fmt.Sprintf("sha256:%x", sha256.Sum256(p.data)) }

func (p *place) images() *base.Images { return &base.Images{Store: p.store} }

func (p *place) imported() snapshot.Digest {
	p.t.Helper()
	pin, err := p.images().Import(p.t.Context(), p.image, p.digest())
	if err != nil {
		p.t.Fatal(err)
	}
	pin.Release()
	return pin.Digest
}

// holds says whether a manifest is the image.
func (p *place) holds(d snapshot.Digest) {
	p.t.Helper()
	image, err := p.store.Image(d)
	if err != nil {
		p.t.Fatal(err)
	}
	got := make([]byte, len(p.data))
	if _, err := image.ReadAt(got, 0); err != nil || !bytes.Equal(got, p.data) {
		p.t.Errorf("it is not the image (%v)", err)
	}
	if err := image.Close(); err != nil {
		p.t.Error(err)
	}
}

// files lists what is in the store after a collection.
func (p *place) files() (names []string) {
	p.t.Helper()
	if _, err := p.store.Collect(p.t.Context(), nil); err != nil {
		p.t.Fatal(err)
	}
	for _, dir := range []string{"layers", "manifests", "objects", "refs"} {
		entries, err := os.ReadDir(filepath.Join(p.storeDir(), dir))
		if err != nil {
			p.t.Fatal(err)
		}
		for _, e := range entries {
			names = append(names, dir+"/"+e.Name())
		}
	}
	return names
}

func TestAnImageIsImportedOnce(t *testing.T) {
	p := newPlace(t)
	d := p.imported()
	p.holds(d)
	if err := os.Remove(p.image); err != nil { // it is not needed any more
		t.Fatal(err)
	}
	if again := p.imported(); again != d {
		t.Errorf("%s became %s", d, again)
	}
	if files := p.files(); len(files) != 3 {
		t.Errorf("there is %v", files)
	}
	p.holds(d)
	size, err := sparse.AllocatedAt(filepath.Join(p.storeDir(), "layers"))
	if err != nil || size > 500*block {
		t.Errorf("it takes %d bytes (%v)", size, err)
	}
}

func TestManyWantOneImage(t *testing.T) {
	p := newPlace(t)
	images := p.images()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			pin, err := images.Import(t.Context(), p.image, p.digest())
			if err != nil {
				t.Error(err)
				return
			}
			p.holds(pin.Digest)
			pin.Release()
		})
	}
	wg.Wait()
	if files := p.files(); len(files) != 3 {
		t.Errorf("there is %v", files)
	}
}

// TestAnotherImageIsRefused: what is imported is what was built, to the last bit,
// or has no name.
func TestAnotherImageIsRefused(t *testing.T) {
	p := newPlace(t)
	f, err := os.OpenFile(p.image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{1}, 1000*block); err != nil { // in a hole
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if pin, err := p.images().Import(t.Context(), p.image, p.digest()); !sandbox.Is(err, sandbox.KindConflict) || pin != nil {
		t.Errorf("%v, %v", pin, err)
	}
	for name, digest := range map[string]string{
		"nothing": "", "half of one": p.digest()[:40], "another hash": "md5:" + p.digest()[7:], "capitals": "sha256:" + strings.ToUpper(p.digest()[7:]),
		"a path": "sha256:../../../../../../../../../../../../../../../../../../../../etc/passwd",
	} {
		if _, err := p.images().Import(t.Context(), p.image, digest); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := p.images().Import(t.Context(), p.image+".missing", p.digest()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.images().Import(ctx, p.image, p.digest()); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if files := p.files(); len(files) > 0 {
		t.Errorf("there is %v", files)
	}
}

// TestDamageIsMended, as long as the image is there.
func TestDamageIsMended(t *testing.T) {
	glob := func(p *place, pattern string) string {
		found, err := filepath.Glob(filepath.Join(p.storeDir(), pattern))
		if err != nil || len(found) != 1 {
			t.Fatal(found, err)
		}
		return found[0]
	}
	for name, damage := range map[string]func(p *place) error{
		"a layer is missing":    func(p *place) error { return os.Remove(glob(p, "layers/*")) },
		"a layer is cut short":  func(p *place) error { return os.Truncate(glob(p, "layers/*"), 100) },
		"a manifest is missing": func(p *place) error { return os.Remove(glob(p, "manifests/*")) },
		"a manifest is another": func(p *place) error {
			path := glob(p, "manifests/*")
			return errors.Join(os.Remove(path), os.WriteFile(path, []byte("something"), 0o444))
		},
		"the reference is gone":  func(p *place) error { return os.Remove(glob(p, "refs/*")) },
		"the reference is empty": func(p *place) error { return os.Truncate(glob(p, "refs/*"), 0) },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t)
			d := p.imported()
			if err := damage(p); err != nil {
				t.Fatal(err)
			}
			if again := p.imported(); again != d {
				t.Errorf("%s became %s", d, again)
			}
			p.holds(d)
			if files := p.files(); len(files) != 3 {
				t.Errorf("there is %v", files)
			}
		})
	}
}

// TestAStrangersReferenceStays: what has the name and is about something else is
// not replaced.
func TestAStrangersReferenceStays(t *testing.T) {
	p := newPlace(t)
	d := p.imported()
	refs, err := p.store.Refs()
	if err != nil || len(refs) != 1 {
		t.Fatal(refs, err)
	}
	refs[0].Meta = []byte(`{"image":"sha256:of another"}`)
	if err := p.store.SetRef(refs[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := p.images().Import(t.Context(), p.image, p.digest()); !sandbox.Is(err, sandbox.KindConflict) {
		t.Errorf("%v", err)
	}
	if err := p.images().Sweep(nil); err != nil {
		t.Error(err)
	}
	p.holds(d)
	if files := p.files(); len(files) != 3 {
		t.Errorf("there is %v", files)
	}
}

func TestSweepTakesNamesOnly(t *testing.T) {
	p := newPlace(t)
	d := p.imported()
	if err := p.store.SetRef(snapshot.Ref{Name: "dormouse.base.of-mine", Manifests: map[string]snapshot.Digest{base.Disk: d}}); err != nil {
		t.Fatal(err)
	}
	if err := p.images().Sweep([]string{p.digest()}); err != nil {
		t.Fatal(err)
	}
	if files := p.files(); len(files) != 4 {
		t.Errorf("there is %v", files)
	}
	if err := p.images().Sweep([]string{"sha256:of another"}); err != nil {
		t.Fatal(err)
	}
	if files := p.files(); len(files) != 3 {
		t.Errorf("there is %v", files)
	}
	p.holds(d)
	if err := p.store.RemoveRef("dormouse.base.of-mine"); err != nil {
		t.Fatal(err)
	}
	pin, err := p.images().Import(t.Context(), p.image, p.digest())
	if err != nil {
		t.Fatal(err)
	}
	if err := p.images().Sweep(nil); err != nil { // a template was deleted just now
		t.Fatal(err)
	}
	if files := p.files(); len(files) != 2 {
		t.Errorf("there is %v", files)
	}
	p.holds(pin.Digest)
	pin.Release()
	if files := p.files(); len(files) > 0 {
		t.Errorf("there is %v", files)
	}
}

// steps are those of a first import.
func steps(t *testing.T) (points []string) {
	t.Helper()
	p := newPlace(t)
	var mu sync.Mutex
	fault.Observe(func(point string) {
		mu.Lock()
		defer mu.Unlock()
		if !slices.Contains(points, point) {
			points = append(points, point)
		}
	})
	defer fault.Observe(nil)
	p.imported()
	if len(points) < 15 {
		t.Fatalf("an import passes only %v", points)
	}
	return points
}

func TestImportFailsAt(t *testing.T) {
	for _, point := range steps(t) {
		t.Run(point, func(t *testing.T) {
			p := newPlace(t)
			disarm := fault.Set(point, fault.Nth(1, fault.Fail))
			_, err := p.images().Import(t.Context(), p.image, p.digest())
			disarm()
			if !errors.Is(err, fault.ErrInjected) {
				t.Fatalf("it did not notice: %v", err)
			}
			p.wholeOrNothing()
		})
	}
}

// TestKilledWhileItImports kills the process at every step.
func TestKilledWhileItImports(t *testing.T) {
	for _, point := range steps(t) {
		t.Run(point, func(t *testing.T) {
			p := newPlace(t)
			if err := p.store.Close(); err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestImportInAChild$", "-test.v")
			cmd.Env = append(os.Environ(), "BASE_STORE="+p.storeDir(), "BASE_IMAGE="+p.image, "BASE_DIGEST="+p.digest(), "DORMOUSE_FAULT="+point+"=kill@1")
			if out, err := cmd.CombinedOutput(); err == nil {
				t.Fatalf("the child was not killed:\n%s", out)
			}
			p.open()
			p.wholeOrNothing()
		})
	}
}

// TestImportInAChild is the process that TestKilledWhileItImports kills.
func TestImportInAChild(t *testing.T) {
	dir := os.Getenv("BASE_STORE")
	if dir == "" {
		return // it is another test's process
	}
	s, err := snapshot.Open(snapshot.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (&base.Images{Store: s}).Import(t.Context(), os.Getenv("BASE_IMAGE"), os.Getenv("BASE_DIGEST")); err != nil {
		t.Fatal(err)
	}
}

// wholeOrNothing looks at what an import left that ended early, and does it again.
func (p *place) wholeOrNothing() {
	p.t.Helper()
	files := p.files()
	if len(files) != 0 && len(files) != 3 {
		p.t.Errorf("there is %v", files)
	}
	refs, err := p.store.Refs()
	if err != nil {
		p.t.Fatal(err)
	}
	for _, r := range refs {
		p.holds(r.Manifests[base.Disk])
	}
	p.holds(p.imported())
	if files := p.files(); len(files) != 3 {
		p.t.Errorf("after another import there is %v", files)
	}
}
