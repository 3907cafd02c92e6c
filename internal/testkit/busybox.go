package testkit

import (
	"bytes"
	"debug/elf"
	"os"
	"testing"
)

// StaticBusybox is a whole userland in one program that needs no C library: what
// the smallest images are made of.
func StaticBusybox(t testing.TB) string {
	t.Helper()
	const path = "/bin/busybox"
	data, err := os.ReadFile(path)
	Require(t, "busybox-static", err == nil, path+" is missing")
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range f.Progs {
		Require(t, "busybox-static", p.Type != elf.PT_INTERP, path+" is not the static one")
	}
	return string(data)
}
