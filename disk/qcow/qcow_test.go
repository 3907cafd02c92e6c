package qcow_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/disk/disktest"
	"github.com/dormouse-sandbox/dormouse/disk/qcow"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func driver(t *testing.T) *qcow.Driver {
	t.Helper()
	testkit.Tool(t, "qemu-img")
	d, err := qcow.New(qcow.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestConformance(t *testing.T) {
	testkit.Tool(t, "qemu-io")
	disktest.Run(t, func(t *testing.T) disktest.Harness {
		return disktest.Harness{Driver: driver(t), Write: write, Read: read}
	})
}

// TestConformanceOfTheNextOne: qemu-img makes the first of a size, and we the next.
func TestConformanceOfTheNextOne(t *testing.T) {
	testkit.Tool(t, "qemu-io")
	disktest.Run(t, func(t *testing.T) disktest.Harness {
		return disktest.Harness{Driver: &experienced{Driver: driver(t), t: t}, Write: write, Read: read}
	})
}

// experienced is a driver that has made a disk like each before.
type experienced struct {
	*qcow.Driver
	t *testing.T
}

func (e *experienced) Create(ctx context.Context, c disk.Config) (disk.Disk, error) {
	before := c
	before.Dir = e.t.TempDir()
	if d, err := e.Driver.Create(ctx, before); err == nil {
		must(e.t, d.Remove(ctx))
	}
	return e.Driver.Create(ctx, c)
}

// TestTheNextOneIsAsQemuImgMakesIt but for the name of what it lies on, and takes less.
func TestTheNextOneIsAsQemuImgMakesIt(t *testing.T) {
	d := driver(t)
	other := filepath.Join(filepath.Dir(disktest.Base(t)), strings.Repeat("long", 20))
	must(t, os.Link(disktest.Base(t), other))
	t.Cleanup(func() { must(t, os.Remove(other)) })
	for _, tt := range []struct {
		what string
		base string
	}{{"the same base", disktest.Base(t)}, {"a longer name", other}, {"the shorter one again", disktest.Base(t)}} {
		first, next, afresh := config(t), config(t), config(t)
		next.Base, afresh.Base = tt.base, tt.base
		_, err := d.Create(t.Context(), first)
		must(t, err)
		ours, err := d.Create(t.Context(), next)
		must(t, err)
		theirs, err := driver(t).Create(t.Context(), afresh)
		must(t, err)
		got, err := os.ReadFile(ours.Path())
		must(t, err)
		want, err := os.ReadFile(theirs.Path())
		must(t, err)
		if !bytes.Equal(got, want) {
			t.Errorf("%s: another file than qemu-img's", tt.what)
		}
		run(t, "qemu-img", "check", "-q", "-f", "qcow2", ours.Path())
		if n, err := ours.Allocated(); err != nil || n > 64<<10 {
			t.Errorf("%s: it takes %d bytes, %v", tt.what, n, err)
		}
		if _, err := d.Restore(t.Context(), next); err != nil {
			t.Errorf("%s: %v", tt.what, err)
		}
	}
}

// write and read go through QEMU's block layer, as a guest does.
func write(t *testing.T, d disk.Disk, offset int64, data []byte) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	qemuIO(t, d, "write -s "+file+" "+strconv.FormatInt(offset, 10)+" "+strconv.Itoa(len(data)))
}

func read(t *testing.T, d disk.Disk, offset int64, length int) []byte {
	t.Helper()
	var data []byte
	for line := range strings.Lines(qemuIO(t, d, "read -v "+strconv.FormatInt(offset, 10)+" "+strconv.Itoa(length))) {
		_, dump, ok := strings.Cut(line, ":  ")
		if !ok {
			continue
		}
		digits, _, _ := strings.Cut(dump, "  ")
		for _, d := range strings.Fields(digits) {
			b, err := strconv.ParseUint(d, 16, 8)
			if err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			data = append(data, byte(b))
		}
	}
	return data
}

func qemuIO(t *testing.T, d disk.Disk, command string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "qemu-io", "-f", d.Format(), "-c", command, d.Path()).CombinedOutput()
	if err != nil || strings.Contains(string(out), "failed") {
		t.Fatalf("qemu-io %s: %v: %s", command, err, out)
	}
	return string(out)
}

func config(t *testing.T) disk.Config {
	return disk.Config{Dir: t.TempDir(), Base: disktest.Base(t), SizeBytes: 16 << 20}
}

func TestCreateOnAFullDisk(t *testing.T) {
	testkit.Root(t)
	c := config(t)
	if err := unix.Mount("tmpfs", c.Dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := testkit.Unmount(c.Dir); err != nil {
			t.Error(err)
		}
	}()
	filler := filepath.Join(c.Dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 60<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := driver(t).Create(t.Context(), c); !sandbox.Is(err, sandbox.KindNoSpace) {
		t.Errorf("error %v, want kind %s", err, sandbox.KindNoSpace)
	}
	d, before := driver(t), config(t)
	if _, err := d.Create(t.Context(), before); err != nil { // by qemu-img; the next is ours
		t.Fatal(err)
	}
	if _, err := d.Create(t.Context(), c); !sandbox.Is(err, sandbox.KindNoSpace) {
		t.Errorf("the next one: error %v, want kind %s", err, sandbox.KindNoSpace)
	}
	entries, err := os.ReadDir(c.Dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("beside the filler: %v, %v", entries, err)
	}
}

func TestCreateSaysWhatTheVMMCannotOpen(t *testing.T) {
	testkit.Root(t)
	for name, spoil := range map[string]func(c disk.Config) string{
		"base":           func(c disk.Config) string { return c.Base },
		"base directory": func(c disk.Config) string { return filepath.Dir(c.Base) },
	} {
		c := config(t)
		c.Dir = filepath.Dir(disktest.Base(t)) // reachable, unlike t.TempDir
		c.UID, c.GID = 65533, 65533
		bad := spoil(c)
		if err := os.Chmod(bad, 0o700); err != nil {
			t.Fatal(err)
		}
		_, err := driver(t).Create(t.Context(), c)
		if !sandbox.Is(err, sandbox.KindInvalid) || !strings.Contains(err.Error(), bad) {
			t.Errorf("%s: error %v does not name %s", name, err, bad)
		}
	}
}

// TestCreateFailsAt breaks each durable step in turn.
func TestCreateFailsAt(t *testing.T) {
	d := driver(t)
	if _, err := d.Create(t.Context(), config(t)); err != nil { // by qemu-img; the next are ours
		t.Fatal(err)
	}
	for _, point := range []string{"qcow/make", "osfs/disk-overlay/rename", "osfs/disk-overlay/fsync-dir"} {
		c := config(t)
		disarm := fault.Set(point, fault.Fail)
		_, err := d.Create(context.Background(), c)
		disarm()
		if err == nil {
			t.Errorf("%s: no error", point)
		}
		if entries, _ := os.ReadDir(c.Dir); len(entries) != 0 {
			t.Errorf("%s left %v", point, entries)
		}
		if _, err := d.Create(t.Context(), c); err != nil {
			t.Errorf("after %s: %v", point, err)
		}
	}
}

func TestCreateAfterACrashInTheMiddle(t *testing.T) {
	d, c := driver(t), config(t)
	if err := os.WriteFile(filepath.Join(c.Dir, ".tmp-overlay.qcow2"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	o, err := d.Create(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if entries, _ := os.ReadDir(c.Dir); len(entries) != 0 {
		t.Errorf("left: %v", entries)
	}
}

// TestRestoreDistrustsTheOverlay: the VMM owns the file and may write anything.
func TestRestoreDistrustsTheOverlay(t *testing.T) {
	d := driver(t)
	for name, spoil := range map[string]func(t *testing.T, c disk.Config, path string){
		"a link to somewhere else": func(t *testing.T, _ disk.Config, path string) {
			must(t, os.Rename(path, path+".real"), os.Symlink(path+".real", path))
		},
		"a pipe": func(t *testing.T, _ disk.Config, path string) {
			must(t, os.Remove(path), syscall.Mkfifo(path, 0o600))
		},
		"another backing file": func(t *testing.T, _ disk.Config, path string) {
			run(t, "qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow", path)
		},
		"a backing file of another format": func(t *testing.T, c disk.Config, path string) {
			run(t, "qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", c.Base, path)
		},
		"a data file": func(t *testing.T, c disk.Config, path string) {
			must(t, os.Remove(path))
			run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file="+path+".data", path, "16M")
		},
		"another format": func(t *testing.T, _ disk.Config, path string) {
			must(t, os.WriteFile(path, make([]byte, 1<<20), 0o600))
		},
		"nothing in it": func(t *testing.T, _ disk.Config, path string) {
			must(t, os.Truncate(path, 0))
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := config(t)
			o, err := d.Create(t.Context(), c)
			must(t, err)
			spoil(t, c, o.Path())
			if _, err := d.Restore(t.Context(), c); err == nil || sandbox.Is(err, sandbox.KindNotFound) {
				t.Errorf("Restore: %v", err)
			}
		})
	}
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", name, err, out)
	}
}
