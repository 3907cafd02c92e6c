package main

import (
	"os"
	"path/filepath"
	"testing"
)

// TestCpIntoADirectory: the guest says nothing about where a copy lands.
func TestCpIntoADirectory(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	f.files["work/out.csv"] = "alias ls=..."
	f.liar = "/home/user/.bashrc"
	dir := t.TempDir()
	mine := filepath.Join(dir, ".bashrc")
	if err := os.WriteFile(mine, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := ask(t, "cp", "aaaab:work/out.csv", dir); got.code != 0 {
		t.Errorf("got %+v", got)
	}
	if data, err := os.ReadFile(mine); err != nil || string(data) != "mine" {
		t.Errorf("a file that nobody asked for holds %q, %v", data, err)
	}
	if data, err := os.ReadFile(filepath.Join(dir, "out.csv")); err != nil || string(data) != f.files["work/out.csv"] {
		t.Errorf("the copy holds %q, %v", data, err)
	}
}
