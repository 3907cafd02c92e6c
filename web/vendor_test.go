package web_test

import (
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// vendored are the files that test/vendor/VERSIONS lists, with where each is from.
// Whether they are what npm has is a test of test/page.
func vendored(t *testing.T) map[string]string {
	t.Helper()
	text, err := os.ReadFile("test/vendor/VERSIONS")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		f := strings.Fields(line)
		if len(f) != 4 || !regexp.MustCompile(`^\d+\.\d+\.\d+$`).MatchString(f[1]) {
			t.Fatalf("%q is not a package, its version, a path and a name", line)
		}
		out[f[3]] = f[0] + "@" + f[1] + " " + f[2]
	}
	return out
}

func TestVendoredFilesAreListed(t *testing.T) {
	entries, err := os.ReadDir("test/vendor")
	if err != nil {
		t.Fatal(err)
	}
	var there []string
	for _, e := range entries {
		if e.Name() != "VERSIONS" {
			there = append(there, e.Name())
		}
	}
	listed := slices.Sorted(maps.Keys(vendored(t)))
	if diff := cmp.Diff(listed, there); diff != "" {
		t.Errorf("files (-listed in VERSIONS +in the folder):\n%s", diff)
	}
	if !slices.Contains(listed, "xterm.LICENSE.txt") || !slices.Contains(listed, "addon-fit.LICENSE.txt") {
		t.Error("a licence is missing: it goes with every copy")
	}
}
