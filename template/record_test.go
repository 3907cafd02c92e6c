package template_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/template"
)

// records makes a store with one template and one kernel that are nothing but
// their records.
func records(t testing.TB) (store *template.Store, templateJSON, kernelDir string) {
	t.Helper()
	dir := t.TempDir()
	store, err := template.Open(template.Config{Dir: filepath.Join(dir, "t"), Cache: filepath.Join(dir, "c")})
	if err != nil {
		t.Fatal(err)
	}
	templateJSON, kernelDir = filepath.Join(dir, "t/base/template.json"), filepath.Join(dir, "k")
	if err := errors.Join(
		os.Mkdir(filepath.Dir(templateJSON), 0o755), os.Mkdir(kernelDir, 0o755),
		os.WriteFile(filepath.Join(dir, "t/.image", strings.Repeat("0", 64)+".ext4"), []byte("image"), 0o444),
		os.WriteFile(filepath.Join(kernelDir, "vmlinuz"), nil, 0o444),
	); err != nil {
		t.Fatal(err)
	}
	return store, templateJSON, kernelDir
}

// FuzzRecords: whatever a record says, the files of what it describes are where
// the store keeps them, and a record that is cut short is none.
func FuzzRecords(f *testing.F) {
	whole := `{"name":"base","digest":"sha256:` + strings.Repeat("0", 64) + `","image_bytes":5,"env":{"A":"b"},"has_modules":true}`
	for n := range len(whole) + 1 {
		f.Add([]byte(whole[:n]))
	}
	f.Add([]byte(`{"digest":"sha256:../../../etc/passwd"}`))
	f.Add([]byte(`{"Image":"/etc/passwd","image":"/etc/passwd"}`))
	store, templateJSON, kernelDir := records(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := errors.Join(
			os.WriteFile(templateJSON, data, 0o644), os.WriteFile(filepath.Join(kernelDir, "kernel.json"), data, 0o644),
		); err != nil {
			t.Fatal(err)
		}
		got, err := store.Get("base")
		if err == nil && (got.Name != "base" || got.ImageBytes != 5 || filepath.Base(filepath.Dir(got.Image)) != ".image") {
			t.Errorf("%q is a template: %+v", data, got)
		}
		k, err := template.ReadKernel(kernelDir)
		if err == nil && (filepath.Dir(k.Image) != kernelDir || k.ModulesDir != "" && filepath.Dir(k.ModulesDir) != kernelDir) {
			t.Errorf("%q is a kernel: %+v", data, k)
		}
		if s := string(data); strings.HasPrefix(whole, s) && s != whole && err == nil {
			t.Errorf("%q is taken for whole", data)
		}
	})
}

// TestBrokenTemplateIsLeftOut: it can be asked for by name, with the reason, and
// takes no other one with it.
func TestBrokenTemplateIsLeftOut(t *testing.T) {
	store, templateJSON, _ := records(t)
	whole := `{"digest":"sha256:` + strings.Repeat("0", 64) + `"}`
	broken := filepath.Join(filepath.Dir(filepath.Dir(templateJSON)), "broken")
	if err := errors.Join(
		os.WriteFile(templateJSON, []byte(whole), 0o644), os.Mkdir(broken, 0o755),
		os.WriteFile(filepath.Join(broken, "template.json"), []byte(whole[:10]), 0o644),
	); err != nil {
		t.Fatal(err)
	}
	list, err := store.List()
	if err != nil || len(list) != 1 || list[0].Name != "base" {
		t.Errorf("list: %+v, %v", list, err)
	}
	if _, err := store.Get("broken"); err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("get: %v", err)
	}
}
