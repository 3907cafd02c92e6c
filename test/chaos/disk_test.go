package chaos_test

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/test/rig"
)

// smallDisk puts the host's state, but not the templates, on a file system of
// its own. It is taken away after the server, before the rig looks for mounts.
func smallDisk(t *testing.T, s *rig.Server, size int64) string {
	t.Helper()
	testkit.Tool(t, "mkfs.ext4")
	dir := filepath.Join(s.Data, "host")
	image := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil { // sparse: it costs what is written
		t.Fatal(err)
	}
	run(t, "mkfs.ext4", "-q", "-m", "0", image)
	if err := os.Mkdir(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	run(t, "mount", "-o", "loop", image, dir)
	t.Cleanup(func() {
		s.Down()
		if err := testkit.Unmount(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// free is how much an unprivileged process may still write.
func free(t testing.TB, dir string) int64 {
	t.Helper()
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Bavail) * st.Bsize
}

// fill leaves about so much space free, and returns how to give it back.
func fill(t testing.TB, dir string, leave int64) (release func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	for chunk := int64(256 << 20); chunk >= 4096; {
		info, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		if free(t, dir)-leave < chunk || syscall.Fallocate(int(f.Fd()), 0, info.Size(), chunk) != nil {
			chunk /= 2
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	}
}

// frozen waits until every one of these sandboxes stands still for want of
// space, or none does.
func frozen(t *testing.T, s *rig.Server, want bool, ids ...string) {
	t.Helper()
	testkit.Eventually(t, 20*time.Second, fmt.Sprint("frozen: ", want), func() bool {
		return !slices.ContainsFunc(ids, func(id string) bool { return (get(t, s, id).Frozen == string(sandbox.FreezeNoSpace)) != want })
	})
}

// TestDiskFull lets the host's disk fill up. Creates are refused with the right
// words and leave nothing, what runs is frozen before its own disk would fail and
// goes on unharmed when there is space, also after a crash in between, and
// destroying, which gives space back, works.
func TestDiskFull(t *testing.T) {
	s := rig.New(t, rig.Options{})
	dir := smallDisk(t, s, 3<<30)
	s.Up()
	w := leave(t, s, create(t, s))
	second := create(t, s)

	release := fill(t, dir, 512<<20)
	_, err := try(t, s)
	var answer *client.Error
	if !errors.As(err, &answer) || answer.Kind != sandbox.KindNoSpace || answer.Status != http.StatusInsufficientStorage {
		t.Errorf("create with 512 MiB left: %v, want no_space and status 507", err)
	}
	t.Logf("create with 512 MiB left: %v", err)
	if id := failedID(err); id != "" {
		wantEnd(t, get(t, s, id), "failed", "create_failed")
	}
	onlyThese(t, s, w.id, second)
	w.check(t, s)
	release()

	release = fill(t, dir, 0)
	t.Logf("%d bytes are left", free(t, dir))
	if _, err := s.Client.SetTimeout(t.Context(), w.id, 2*time.Hour); !sandbox.Is(err, sandbox.KindNoSpace) {
		t.Errorf("a deadline that cannot be written down: %v, want no_space", err)
	}
	frozen(t, s, true, w.id, second)
	if _, err := s.Client.Exec(t.Context(), w.id, api.Exec{Shell: "true"}); !sandbox.Is(err, sandbox.KindNoSpace) {
		t.Errorf("a command in a frozen sandbox: %v, want no_space", err)
	}
	s.Kill()
	s.Up()
	frozen(t, s, true, w.id, second)
	onlyThese(t, s, w.id, second)

	if sb, err := remove(t, s, second); err != nil || sb.State != "gone" {
		t.Errorf("destroying with a full disk: %s, %v", sb.State, err)
	}
	onlyThese(t, s, w.id)
	release()

	frozen(t, s, false, w.id)
	w.check(t, s)
	third := create(t, s)
	if got := sh(t, s, third, "echo works"); got != "works" {
		t.Errorf("with space again a sandbox answers %q", got)
	}
	w.check(t, s)
	onlyThese(t, s, w.id, third)
}
