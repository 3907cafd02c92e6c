package kernel_test

import (
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
)

// TestWithFDLeavesTheFile: a file whose number was used still has its deadlines, and
// so has its duplicate, which lives when the file is closed.
func TestWithFDLeavesTheFile(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Close() }() // nothing is lost
	again, err := kernel.Duplicate(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = again.Close() }() // read only
	for name, f := range map[string]*os.File{"the file": r, "its duplicate": again} {
		if err := f.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if _, err := f.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: a read until its deadline: %v", name, err)
		}
	}
	if err := errors.Join(r.Close(), again.SetReadDeadline(time.Time{})); err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteString("x"); err != nil {
		t.Fatal(err)
	}
	waits := 0
	err = kernel.WithFD(again, func(fd int) (err error) {
		waits, err = unix.IoctlGetInt(fd, unix.TIOCINQ)
		return err
	})
	if err != nil || waits != 1 {
		t.Errorf("%d bytes wait in the duplicate, %v", waits, err)
	}
	if err := kernel.WithFD(again, func(int) error { return unix.EPERM }); !errors.Is(err, unix.EPERM) {
		t.Errorf("a call that fails: %v", err)
	}
	for name, f := range map[string]*os.File{"a closed file": r, "no file": nil} {
		if _, err := kernel.Duplicate(f); err == nil {
			t.Errorf("%s was duplicated", name)
		}
	}
}
