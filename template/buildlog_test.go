package template_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// TestLogOfABuildIsKept: with its template, and with one that is the same.
func TestLogOfABuildIsKept(t *testing.T) {
	newFakes(t, fakeRoot+`echo "I: unpacking into $root"`)
	cfg := config(t)
	s := open(t, cfg)
	build(t, s, recipe())
	want := "install packages\n  I: unpacking into /root\nmake image\n"
	log, err := s.Log("small")
	if err != nil || string(log) != want {
		t.Errorf("log: %q, %v", log, err)
	}
	same := recipe()
	same.Name = "same"
	build(t, s, same)
	if log, err := s.Log("same"); err != nil || string(log) != want {
		t.Errorf("log of one that is the same: %q, %v", log, err)
	}
	if err := os.Remove(filepath.Join(cfg.Dir, "small", "build.log")); err != nil {
		t.Fatal(err)
	}
	if log, err := s.Log("small"); err != nil || len(log) > 0 {
		t.Errorf("log of one that has none: %q, %v", log, err)
	}
	for _, name := range []string{"nonesuch", "../small"} {
		if _, err := s.Log(name); !sandbox.Is(err, sandbox.KindNotFound) && !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("log of %q: %v", name, err)
		}
	}
	if err := s.Delete(t.Context(), "small"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Log("small"); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("log of one that is deleted: %v", err)
	}
}

// TestLogIsBounded: the beginning and the end of a long one are there.
func TestLogIsBounded(t *testing.T) {
	newFakes(t, fakeRoot+`seq -f 'line %.0f of a build that has much to say about what it does' 1 20000; head -c 100000 /dev/zero | tr '\0' x; echo; echo last`)
	s := open(t, config(t))
	build(t, s, recipe())
	log, err := s.Log("small")
	if err != nil {
		t.Fatal(err)
	}
	text := string(log)
	for _, part := range []string{"install packages\n  line 1 of", " lines are left out …\n", "  line 20000 of", "  last\nmake image\n"} {
		if !strings.Contains(text, part) {
			t.Errorf("%q is not in it", part)
		}
	}
	if strings.Contains(text, "line 10000 of") || len(text) > 600<<10 {
		t.Errorf("it has %d bytes", len(text))
	}
}
