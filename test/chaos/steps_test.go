package chaos_test

import (
	"bufio"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/test/rig"
)

// steps are the failpoints of one verb, in the order in which it passes them.
// Those of restore are the part of create for which a boot can step in. Those of
// recovery are of no verb: what a server passes that starts after a create was killed.
type steps struct{ create, restore, destroy, recovery []string }

var seen *steps

// passed is what observe found, which is asked once.
func passed(t *testing.T) steps {
	t.Helper()
	if seen == nil {
		t.Run("observe", func(t *testing.T) {
			found := observe(t)
			seen = &found
		})
	}
	if seen == nil {
		t.FailNow()
	}
	return *seen
}

// observe takes a sandbox through its life on a server that writes down which
// points it passes. It is not the first one of its shape: that one boots, and the
// tests of host fail each step of that. A step that is added to the product is found here by itself.
// Points that a server passes without being asked too, while it prepares slots
// or takes a sandbox over, are left to the tests of those packages: a server
// in which they are armed does not start.
func observe(t *testing.T) steps {
	t.Helper()
	trace := filepath.Join(t.TempDir(), "points")
	seenIn := "DORMOUSE_FAULT_SEEN=" + trace
	s := rig.New(t, rig.Options{Env: []string{seenIn}})
	s.Up()
	// Its slots are ready: what is passed from here on is passed for the verbs.
	if !testkit.Poll(settleLimit, func() bool { return len(s.Namespaces()) >= preparedSlots }) {
		t.Fatalf("slots are not prepared: %q", s.Namespaces())
	}
	idle := points(t, trace)
	warm(t, s)
	warmed := points(t, trace)
	id := create(t, s)
	afterCreate := points(t, trace)
	s.Kill()
	s.Up()
	afterTakeOver := points(t, trace)
	if _, err := s.Client.Delete(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	afterDestroy := points(t, trace)
	s.Kill()
	s.With(seenIn, kill("host/create/publish"))
	s.Up()
	if _, err := try(t, s); err == nil || !isDead(t, s) {
		t.Fatalf("a create that kills its server answers %v", err)
	}
	afterDeath := points(t, trace)
	s.With(seenIn)
	s.Up()
	for id := range all(t, s) {
		settled(t, s, id)
	}
	onlyThese(t, s)

	out := steps{
		create:  fresh(idle, afterCreate[len(warmed):]),
		destroy: fresh(append(idle, afterTakeOver[len(afterCreate):]...), afterDestroy[len(afterTakeOver):]),

		recovery: fresh(nil, points(t, trace)[len(afterDeath):]),
	}
	from, to := slices.Index(out.create, "host/restore/images"), slices.Index(out.create, "host/create/publish")
	if from < 0 || to < from {
		t.Fatalf("the second create of its shape was no restore; passed were %q", out.create)
	}
	out.restore = out.create[from:to]
	for _, want := range []struct {
		name string
		in   []string
	}{
		{"control/create/recorded", out.create},
		{"host/restore/vm", out.create},
		{"osfs/create-done/rename", out.create},
		{"control/destroy/marked", out.destroy},
		{"host/destroy/vm", out.destroy},
		{"osfs/destroy-done/rename", out.destroy},
	} {
		if !slices.Contains(want.in, want.name) {
			t.Fatalf("%s was not passed; passed were %q and %q", want.name, out.create, out.destroy)
		}
	}
	return out
}

func points(t *testing.T, file string) []string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // read only
	var out []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		out = append(out, lines.Text())
	}
	return out
}

// fresh lists the points of passed that are not in known, each once.
func fresh(known, passed []string) []string {
	var out []string
	for _, p := range passed {
		if strings.Contains(p, "snapshot-collect") { // the collector's, whenever it comes by
			continue
		}
		if !slices.Contains(known, p) && !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	return out
}

// choose is all of the points, or without DORMOUSE_LONG those that stand for
// the others: of a durable write only the rename and what follows, because
// before that all of its system calls leave the same machine.
func choose(t *testing.T, points []string) []string {
	t.Helper()
	if testkit.IsLong() {
		return points
	}
	var out []string
	for _, p := range points {
		if strings.HasPrefix(p, "osfs/") && slices.Contains([]string{"create", "write", "fsync"}, path.Base(p)) {
			continue
		}
		out = append(out, p)
	}
	t.Logf("%d of %d points; DORMOUSE_LONG=1 runs all", len(out), len(points))
	return out
}
