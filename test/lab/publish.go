package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
)

// publish has a file or a folder made, beside where it is to be, and then gives it
// the name out. Another process may have been faster.
func publish(step, out string, fill func(whole string) error) (err error) {
	dir := filepath.Dir(out)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	temp, err := os.MkdirTemp(dir, ".tmp-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	whole := filepath.Join(temp, "whole")
	if err := fill(whole); err != nil {
		return err
	}
	if err := osfs.Rename(step, whole, out); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}
