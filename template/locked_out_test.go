package template_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/dormouse-sandbox/dormouse/template"
)

// TestOthersCannotLockBuilders: flock(2) asks for no more than an open file, so
// nobody else may open what builders wait for; not in a cache that an earlier
// version made, either.
func TestOthersCannotLockBuilders(t *testing.T) {
	cfg := template.Config{Dir: t.TempDir(), Cache: t.TempDir()}
	for _, dir := range []string{"lock", "work"} {
		if err := os.Mkdir(filepath.Join(cfg.Cache, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := template.Open(cfg); err != nil {
		t.Fatal(err)
	}
	for dir, most := range map[string]fs.FileMode{"lock": 0o700, "work": 0o711} {
		info, err := os.Stat(filepath.Join(cfg.Cache, dir))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != most {
			t.Errorf("%s has mode %v, want %v", dir, info.Mode().Perm(), most)
		}
	}
}
