package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// TestFewDisksAreKept: those that were used last, and everything else in the folder.
func TestFewDisksAreKept(t *testing.T) {
	dir := t.TempDir()
	var want []string
	for i := range maxDisks + 3 {
		name := filepath.Join(dir, fmt.Sprintf("cache-%d.img", i))
		at := time.Unix(int64(1000+i*37%100), 0) // in another order than their names
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(name, at, at); err != nil {
			t.Fatal(err)
		}
	}
	other := filepath.Join(dir, "cache-0.img.part")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// 0 37 74 11 48 85 22 are their times.
	for _, i := range []int{1, 2, 4, 5} {
		want = append(want, fmt.Sprintf("cache-%d.img", i))
	}
	want = append(want, filepath.Base(other))
	slices.Sort(want)
	if err := trimDisks(dir); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if !slices.Equal(got, want) {
		t.Errorf("left are %q, want %q", got, want)
	}
}
