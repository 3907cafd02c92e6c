package testkit

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
)

// Program puts a program of this module, named by its folder relative to the
// test's ("./testdata/init"), where to says. It is built, or, where DORMOUSE_BIN
// names a folder of programs that were built elsewhere, copied from there: a lab
// has no compiler. There, commands have their own name (dormouse-guest), other
// programs their path in the module (vmm/qemu/testdata/init).
func Program(folder, to string) error {
	if bin := os.Getenv("DORMOUSE_BIN"); bin != "" {
		built, err := builtName(folder)
		if err != nil {
			return err
		}
		data, err := os.ReadFile(filepath.Join(bin, built))
		if err == nil {
			return os.WriteFile(to, data, 0o755)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", to, folder)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", folder, err, out)
	}
	return nil
}

// builtName is where DORMOUSE_BIN has a program.
func builtName(folder string) (string, error) {
	dir, err := filepath.Abs(folder)
	if err != nil {
		return "", err
	}
	if filepath.Base(filepath.Dir(dir)) == "cmd" {
		return filepath.Base(dir), nil
	}
	for root := filepath.Dir(dir); root != "/"; root = filepath.Dir(root) {
		if _, err := os.Stat(filepath.Join(root, "go.mod")); err == nil {
			return filepath.Rel(root, dir)
		}
	}
	return "", fmt.Errorf("no go.mod above %s", dir)
}
