package server_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/hostfake"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/internal/tree"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func TestFiles(t *testing.T) {
	r := newRig(t)
	id := r.create()
	w, err := r.c.WriteFile(r.ctx(), id, "/d/a b?&.txt", "user", strings.NewReader("hello"))
	if err != nil || w.Size != 5 || w.Path != "/d/a b?&.txt" {
		t.Fatalf("write: %+v, %v", w, err)
	}
	body, size, err := r.c.ReadFile(r.ctx(), id, "/d/a b?&.txt", "")
	if err != nil || size != 5 {
		t.Fatalf("read: %d, %v", size, err)
	}
	b, err := io.ReadAll(body)
	if err != nil || string(b) != "hello" || body.Close() != nil {
		t.Errorf("read %q, %v", b, err)
	}
	if f, err := r.c.Stat(r.ctx(), id, "/d/a b?&.txt", ""); err != nil || f.Size != 5 || f.Type != "file" {
		t.Errorf("stat: %+v, %v", f, err)
	}
	if l, err := r.c.ListDir(r.ctx(), id, "/d", "", 2); err != nil || len(l) != 1 {
		t.Errorf("list: %+v, %v", l, err)
	}
	if f, err := r.c.MakeDir(r.ctx(), id, "/e", ""); err != nil || f.Type != "directory" {
		t.Errorf("mkdir: %+v, %v", f, err)
	}
	_, err = r.c.MakeDir(r.ctx(), id, "/e", "")
	r.wantKind(err, sandbox.KindExists)
	_, _, err = r.c.ReadFile(r.ctx(), id, "/e", "")
	r.wantKind(err, sandbox.KindInvalid)
	if f, err := r.c.Move(r.ctx(), id, "/d/a b?&.txt", "/g", ""); err != nil || f.Path != "/g" {
		t.Errorf("move: %+v, %v", f, err)
	}
	for range 2 {
		if err := r.c.Remove(r.ctx(), id, "/g", ""); err != nil {
			t.Errorf("remove: %v", err)
		}
	}
	_, err = r.c.Stat(r.ctx(), id, "/g", "")
	r.wantKind(err, sandbox.KindNotFound)
	if w, err := r.c.WriteFile(r.ctx(), id, "/empty", "", bytes.NewReader(nil)); err != nil || w.Size != 0 {
		t.Errorf("write of nothing: %+v, %v", w, err)
	}
	if body, size, err := r.c.ReadFile(r.ctx(), id, "/empty", ""); err != nil || size != 0 || body.Close() != nil {
		t.Errorf("read of nothing: %d, %v", size, err)
	}
}

func TestLargeFilesAreWholeAndMemoryFlat(t *testing.T) {
	r := newRig(t)
	id := r.create()
	want := patternHash(t, big)
	grew := watchHeap(t)
	w, err := r.c.WriteFile(r.ctx(), id, "/up", "", hostfake.Pattern(big))
	if err != nil || w.Size != big {
		t.Fatalf("upload: %+v, %v", w, err)
	}
	if got := r.host.Hash(id, "/up"); got != want {
		t.Errorf("upload has hash %s, want %s", got, want)
	}
	body, size, err := r.c.ReadFile(r.ctx(), id, "/pattern/268435456", "")
	if err != nil || size != big {
		t.Fatalf("download: %d, %v", size, err)
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, body); err != nil || body.Close() != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != want {
		t.Errorf("download has hash %s, want %s", got, want)
	}
	if g := grew(); g > flat {
		t.Errorf("the heap grew by %d MiB", g>>20)
	}
}

func TestDownloadThatBreaksOffIsAnError(t *testing.T) {
	r := newRig(t)
	id := r.create()
	pieces := 0
	r.host.SetHook(func(_ context.Context, method, _ string) error {
		if method == "ReadFile.data" {
			if pieces++; pieces > 10 {
				return errors.New("disk on fire")
			}
		}
		return nil
	})
	body, _, err := r.c.ReadFile(r.ctx(), id, "/pattern/67108864", "")
	if err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, body)
	if err == nil {
		t.Errorf("%d bytes of 64 MiB passed for the whole", n)
	}
	_ = body.Close() // broken anyway
}

// broken is a reader that fails after a while.
type broken struct{ r io.Reader }

func (b *broken) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if errors.Is(err, io.EOF) {
		err = errors.New("the disk was pulled out")
	}
	return n, err
}

func TestUploadThatBreaksOffLeavesNoFile(t *testing.T) {
	r := newRig(t)
	id := r.create()
	_, err := r.c.WriteFile(r.ctx(), id, "/part", "", &broken{hostfake.Pattern(4 << 20)})
	if err == nil {
		t.Fatal("a broken upload succeeded")
	}
	testkit.Eventually(t, limit, "asked", func() bool { return r.host.Count("WriteFile") == 1 })
	_, err = r.c.Stat(r.ctx(), id, "/part", "")
	r.wantKind(err, sandbox.KindNotFound)
}

// tarStream is a whole tree: one file of size bytes.
func tarStream(t *testing.T, size int64) io.Reader {
	t.Helper()
	r, w := io.Pipe()
	go func() {
		tw := tar.NewWriter(w)
		err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "f", Mode: 0o644, Size: size})
		if err == nil {
			_, err = io.Copy(tw, hostfake.Pattern(size))
		}
		_ = w.CloseWithError(errors.Join(err, tw.Close())) // the reader is told
	}()
	return r
}

func TestTrees(t *testing.T) {
	r := newRig(t)
	id := r.create()
	made, err := r.c.WriteTree(r.ctx(), id, "/d/a b?", "user", tarStream(t, 1000))
	if want := (api.Tree{Path: "/d/a b?", Files: 1, Bytes: 1000}); err != nil || made != want {
		t.Fatalf("write: %+v, %v", made, err)
	}
	body, err := r.c.ReadTree(r.ctx(), id, "/d/a b?", "")
	if err != nil {
		t.Fatal(err)
	}
	if report, err := tree.Relay(io.Discard, body, nil); err != nil || report.Files != 1 || report.Bytes != 1000 {
		t.Errorf("read: %+v, %v", report, err)
	}
	if err := body.Close(); err != nil {
		t.Error(err)
	}
	if _, err := r.c.WriteFile(r.ctx(), id, "/f", "", strings.NewReader("x")); err != nil {
		t.Fatal(err)
	}
	_, err = r.c.ReadTree(r.ctx(), id, "/f", "")
	r.wantKind(err, sandbox.KindInvalid)
	_, err = r.c.ReadTree(r.ctx(), id, "/nowhere", "")
	r.wantKind(err, sandbox.KindNotFound)
	_, err = r.c.ReadTree(r.ctx(), id, "", "")
	r.wantKind(err, sandbox.KindInvalid)
	_, err = r.c.WriteTree(r.ctx(), id, "/g", "", strings.NewReader(strings.Repeat("no tar", 200)))
	r.wantKind(err, sandbox.KindInvalid)
	_, err = r.c.WriteTree(r.ctx(), string(sandbox.NewID()), "/g", "", tarStream(t, 1<<30))
	r.wantKind(err, sandbox.KindNotFound)
	req, err := http.NewRequestWithContext(r.ctx(), http.MethodPut, r.http.URL+"/v1/sandboxes/"+id+"/files/tree?path=/g", tarStream(t, 10))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+r.key)
	req.Header.Set("Content-Type", "application/zip")
	resp, err := http.DefaultClient.Do(req)
	if err != nil || resp.StatusCode != http.StatusUnsupportedMediaType {
		t.Errorf("another type: %v, %v", resp, err)
	}
	_ = resp.Body.Close() // the status is what counts
}

func TestLargeTreesLeaveMemoryFlat(t *testing.T) {
	r := newRig(t)
	id := r.create()
	grew := watchHeap(t)
	if made, err := r.c.WriteTree(r.ctx(), id, "/up", "", tarStream(t, big)); err != nil || made.Bytes != big {
		t.Fatalf("upload: %+v, %v", made, err)
	}
	body, err := r.c.ReadTree(r.ctx(), id, "/pattern/268435456", "")
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, body); n != big || err != nil || body.Close() != nil {
		t.Errorf("download: %d bytes, %v", n, err)
	}
	if g := grew(); g > flat {
		t.Errorf("the heap grew by %d MiB", g>>20)
	}
}

// TestATreeThatBreaksOffIsAnError: on both ways, also where what has come is a
// whole number of entries.
func TestATreeThatBreaksOffIsAnError(t *testing.T) {
	r := newRig(t)
	id := r.create()
	_, err := r.c.WriteTree(r.ctx(), id, "/part", "", &broken{io.LimitReader(tarStream(t, 512), 1024)})
	if err == nil {
		t.Error("a broken upload succeeded")
	}
	_, err = r.c.WriteTree(r.ctx(), id, "/part", "", io.LimitReader(tarStream(t, 512), 1024))
	r.wantKind(err, sandbox.KindInvalid)
	_, err = r.c.Stat(r.ctx(), id, "/part", "")
	r.wantKind(err, sandbox.KindNotFound)

	pieces := 0
	r.host.SetHook(func(_ context.Context, method, _ string) error {
		if method == "ReadTree.data" {
			if pieces++; pieces > 1 {
				return errors.New("the guest has died")
			}
		}
		return nil
	})
	body, err := r.c.ReadTree(r.ctx(), id, "/pattern/1048576", "")
	if err != nil {
		t.Fatal(err)
	}
	// What came before has the reason at its end, so it must arrive.
	if n, err := io.Copy(io.Discard, body); !sandbox.Is(err, sandbox.KindTransient) || n == 0 || n%512 != 0 {
		t.Errorf("%d bytes of 1 MiB, %v", n, err)
	}
	_ = body.Close() // broken anyway
}

func TestUploadToNowhereIsRefusedEarly(t *testing.T) {
	r := newRig(t)
	_, err := r.c.WriteFile(r.ctx(), string(sandbox.NewID()), "/a", "", hostfake.Pattern(1<<30))
	r.wantKind(err, sandbox.KindNotFound)
}
