package watch

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	filesystemv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem"
)

// TestALateWriteIsToldOnce: whoever writes is held up between the writing, which
// reading the directory finds, and the kernel's event of it.
func TestALateWriteIsToldOnce(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := os.WriteFile(path, []byte("one"), 0o600); err != nil {
		t.Fatal(err)
	}
	var told []string
	tr := newTree(Config{Dir: dir, Recursive: true}, nil, func(kind filesystemv1.EventType, name string) bool {
		told = append(told, kind.String()+" "+name)
		return true
	})
	found, _, err := tr.readDir(dir, &news{})
	if err != nil {
		t.Fatal(err)
	}
	tr.root.news = &news{found: found, known: map[string]bool{}, over: true}
	late := raw{mask: unix.IN_MODIFY, name: "f"}
	expect := func(want ...string) {
		t.Helper()
		if !slices.Equal(told, want) {
			t.Errorf("told is %q, want %q", told, want)
		}
		told = nil
	}
	if err := tr.tellRest(tr.root); err != nil {
		t.Fatal(err)
	}
	expect(created.String()+" f", written.String()+" f")
	for range 2 {
		if err := tr.inside(tr.root, late); err != nil {
			t.Fatal(err)
		}
	}
	expect()
	later := time.Now().Add(time.Second)
	if err := os.Chtimes(path, later, later); err != nil { // as another writing does
		t.Fatal(err)
	}
	if err := tr.inside(tr.root, late); err != nil {
		t.Fatal(err)
	}
	expect(written.String() + " f")
}
