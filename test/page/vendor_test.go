package page_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// TestVendoredFilesAreThoseOfNPM fetches what web/test/vendor/VERSIONS lists again:
// nobody has changed it.
func TestVendoredFilesAreThoseOfNPM(t *testing.T) {
	testkit.Long(t, "it asks npm's registry")
	testkit.Tool(t, "npm")
	fresh := t.TempDir()
	out, err := exec.CommandContext(t.Context(), "../../scripts/vendor-page", fresh).CombinedOutput()
	testkit.Require(t, "npm-registry", err == nil, string(out))
	entries, err := os.ReadDir(fresh)
	if err != nil || len(entries) < 5 {
		t.Fatalf("%d files came, %v", len(entries), err)
	}
	for _, e := range entries {
		want, err := os.ReadFile(filepath.Join(fresh, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		have, err := os.ReadFile(filepath.Join("../../web/test/vendor", e.Name()))
		if err != nil || !bytes.Equal(have, want) {
			t.Errorf("%s is not what npm has, %v: run make vendor-page and commit", e.Name(), err)
		}
	}
}
