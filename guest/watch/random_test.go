package watch_test

import (
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/guest/watch"
)

// model is what somebody who only has the events knows of a tree.
type model map[string]bool

func (m model) take(event string) {
	verb, name, _ := strings.Cut(event, " ")
	switch verb {
	case "create":
		m[name] = true
	case "rename", "remove":
		for n := range m {
			if n == name || strings.HasPrefix(n, name+"/") {
				delete(m, n)
			}
		}
	}
}

// randomly changes a tree, with few names, so that they come again soon. It says
// what it has done, if anything.
func randomly(rng *rand.Rand, root string, dirs bool) string {
	names := []string{"a", "b", "c", "d"}
	path := func() string {
		p := root
		for range 1 + rng.IntN(4) {
			p = filepath.Join(p, names[rng.IntN(len(names))])
		}
		return p
	}
	p := path()
	did := ""
	var err error
	switch op := rng.IntN(10); { // most fail, and that is fine: what is tested is what succeeds
	case op < 4:
		did, err = "mkdir -p "+p, os.MkdirAll(p, 0o755)
	case op < 7:
		did, err = "write "+p, os.WriteFile(p, []byte("x"), 0o644)
	case op < 8:
		did, err = "rm -r "+p, os.RemoveAll(p)
	case op < 9:
		did, err = "rm "+p, os.Remove(p)
	case dirs:
		to := path()
		if _, err = os.Lstat(to); err == nil {
			return ""
		}
		did, err = "mv "+p+" "+to, os.Rename(p, to)
	}
	if err != nil {
		return ""
	}
	return strings.ReplaceAll(did, root+"/", "")
}

func tree(t *testing.T, root string) []string {
	t.Helper()
	var names []string
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if rel, _ := filepath.Rel(root, path); rel != "." && !strings.HasPrefix(rel, ".mark-") { // both are absolute
			names = append(names, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	return names
}

// TestTheEventsAddUp changes trees at random and at full speed: whoever follows the
// events knows in the end what there is.
func TestTheEventsAddUp(t *testing.T) {
	for seed := range uint64(24) {
		rng := rand.New(rand.NewPCG(seed, 1))
		root := t.TempDir()
		w := open(t, watch.Config{Dir: root, Recursive: true})
		var events, did []string
		for range 2 {
			for range 200 {
				did = append(did, randomly(rng, root, seed%2 == 0))
			}
			events = append(events, collect(t, w, root)...)
		}
		must(t, w.Close()) // a user may have few instances of inotify
		m := model{}
		for _, event := range events {
			m.take(event)
		}
		known := slices.Sorted(maps.Keys(m))
		if diff := cmp.Diff(tree(t, root), known); diff != "" {
			t.Fatalf("seed %d: %s\ndone:\n%s\ntold:\n%s", seed, diff, strings.Join(did, "\n"), strings.Join(events, "\n"))
		}
	}
}
