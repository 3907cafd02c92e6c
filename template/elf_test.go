package template_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/template"
)

// TestELFIsMadeOnce: the second call finds the first one's file.
func TestELFIsMadeOnce(t *testing.T) {
	kernel := testkit.Asset(t, "vmlinuz")
	s, err := template.Open(template.Config{Dir: filepath.Join(t.TempDir(), "t"), Cache: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	k := template.Kernel{Image: kernel, Digest: "d"}
	var infos [2]os.FileInfo
	for i := range infos {
		path, err := s.ELF(t.Context(), k)
		if err != nil {
			t.Fatal(err)
		}
		if infos[i], err = os.Stat(path); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(path)
		if err != nil || !bytes.HasPrefix(data, []byte("\x7fELF")) {
			t.Fatalf("not an ELF file: %v", err)
		}
	}
	if !os.SameFile(infos[0], infos[1]) {
		t.Error("it was made again")
	}
	if perm := infos[0].Mode().Perm(); perm != 0o444 {
		t.Errorf("mode %v: VMs read it as users of their own", perm)
	}
}
