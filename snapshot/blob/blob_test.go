package blob_test

import (
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/snapshot/blob"
	"github.com/dormouse-sandbox/dormouse/snapshot/blob/blobtest"
)

func TestDir(t *testing.T) {
	blobtest.Run(t, func(t *testing.T) blob.Store {
		d, err := blob.OpenDir(t.TempDir() + "/blobs")
		if err != nil {
			t.Fatal(err)
		}
		return d
	})
}

func TestMem(t *testing.T) {
	blobtest.Run(t, func(*testing.T) blob.Store { return &blob.Mem{} })
}

// TestDirFailsAt breaks each durable step of a put in turn.
func TestDirFailsAt(t *testing.T) {
	for _, call := range []string{"osfs/blob-put/write", "osfs/blob-put/fsync", "osfs/blob-put/rename", "osfs/blob-dir/mkdir"} {
		d, err := blob.OpenDir(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		disarm := fault.Set(call, fault.Fail)
		err = d.Put(t.Context(), "layers/a", strings.NewReader("x"), 1)
		disarm()
		if err == nil {
			t.Errorf("%s: no error", call)
		}
		if got, err := d.List(t.Context(), ""); err != nil || len(got) > 0 {
			t.Errorf("%s left %v, %v", call, got, err)
		}
	}
}
