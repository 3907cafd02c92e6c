package dm

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// TestOneDevicePerFile: two paths lead to one directory, through a link. A second
// device over the same copy-on-write file would destroy the disk.
func TestOneDevicePerFile(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		r.cfg.BusyLimit = 100 * time.Millisecond
		r.start()
		content := pattern(64, 1)
		config := r.config("disk", r.file("base.img", content), 64)
		d := r.create(config)
		r.write(d, 0, []byte("precious"))
		link := config
		link.Dir = filepath.Join(r.dir, "link")
		if err := os.Symlink(config.Dir, link.Dir); err != nil {
			t.Fatal(err)
		}
		before := strings.Join(r.remains(), "\n")
		if _, err := r.driver.Restore(t.Context(), link); !sandbox.Is(err, sandbox.KindBusy) || !strings.Contains(err.Error(), "another device") {
			t.Errorf("Restore by another path: %v, want kind %s", err, sandbox.KindBusy)
		}
		if _, err := r.driver.Create(t.Context(), link); !sandbox.Is(err, sandbox.KindExists) {
			t.Errorf("Create by another path: %v", err)
		}
		if after := strings.Join(r.remains(), "\n"); after != before {
			t.Errorf("from\n%s\nto\n%s", before, after)
		}
		r.expect(d, 0, []byte("precious"))
		if err := d.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		again := r.restore(link)
		r.expect(again, 0, []byte("precious"))
		r.expect(again, blockBytes, content[blockBytes:])
		if err := errors.Join(again.Remove(t.Context()), os.Remove(link.Dir)); err != nil {
			t.Fatal(err)
		}
		r.nothingRemains("by two paths")
	})
}

// TestRestoreRefuses what is not the disk any more, and says what is wrong.
func TestRestoreRefuses(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(t *testing.T, cow string)
		kind  sandbox.Kind
		want  string
	}{
		{"no copy-on-write file", func(t *testing.T, cow string) { must(t, os.Remove(cow)) }, sandbox.KindNotFound, "has lost its content"},
		{"one that is cut short", func(t *testing.T, cow string) { must(t, os.Truncate(cow, 5*chunkBytes)) }, sandbox.KindConflict, "and 20480 bytes, not 24576"},
		{"an empty one", func(t *testing.T, cow string) { must(t, os.Truncate(cow, 0)) }, sandbox.KindConflict, "and 0 bytes"},
		{"a link to one", func(t *testing.T, cow string) { must(t, os.Rename(cow, cow+".real"), os.Symlink(cow+".real", cow)) }, sandbox.KindConflict, "has mode L"},
		{"one that the kernel has given up", func(t *testing.T, cow string) { flip(t, cow, 4*8) }, sandbox.KindConflict, `device-mapper says "Invalid"`},
		{"one with another magic number", func(t *testing.T, cow string) { flip(t, cow, 0) }, sandbox.KindConflict, `begins with "RnAp"`},
		{"no record", func(t *testing.T, cow string) { must(t, os.Remove(filepath.Join(filepath.Dir(cow), recordFile))) }, sandbox.KindNotFound, recordFile},
		{"half a record", func(t *testing.T, cow string) {
			must(t, os.Truncate(filepath.Join(filepath.Dir(cow), recordFile), 20))
		}, sandbox.KindInternal, recordFile},
		{"a record of another base", func(t *testing.T, cow string) {
			path := filepath.Join(filepath.Dir(cow), recordFile)
			data, err := os.ReadFile(path)
			must(t, err, os.WriteFile(path, []byte(strings.Replace(string(data), `"id": "`, `"id": "0`, 1)), 0o600))
		}, sandbox.KindConflict, "another content"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			everywhere(t, func(t *testing.T, r *rig) {
				config := r.config("disk", r.file("base.img", pattern(4, 1)), 4)
				d := r.create(config)
				r.write(d, 0, pattern(1, 9))
				must(t, d.Close(t.Context()))
				tt.spoil(t, filepath.Join(config.Dir, cowFile))
				_, err := r.driver.Restore(t.Context(), config)
				if !sandbox.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%v, want kind %s and %q", err, tt.kind, tt.want)
				}
				if left := r.remains(); len(left) > 0 {
					t.Errorf("left: %v", left)
				}
				must(t, r.driver.Discard(t.Context(), config.Dir), os.RemoveAll(config.Dir))
			})
		})
	}
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// TestRestoreRefusesABrokenOne that is still attached.
func TestRestoreRefusesABrokenOne(t *testing.T) {
	r := fakeRig(t)
	config := r.config("disk", r.file("base.img", pattern(4, 1)), 4)
	d := r.create(config)
	r.fake.devs[filepath.Base(d.Path())].live.store.valid = false
	if _, err := r.driver.Restore(t.Context(), config); !sandbox.Is(err, sandbox.KindConflict) {
		t.Errorf("%v, want kind %s", err, sandbox.KindConflict)
	}
	if report := r.check(); len(report.Broken) != 1 || report.Broken[0].Dir != config.Dir {
		t.Errorf("%+v", report)
	}
	r.remove(d)
}
