// Package osfs is the durable half of the file system: every operation is
// either done and on the disk when it returns, or has left the old state.
//
// Each call takes the name of its operation. Every system call behind it is a
// failpoint "osfs/<op>/<call>", so that a test can break exactly one.
package osfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
)

// tempPrefix marks files that were not published. SweepTemp removes them.
const tempPrefix = ".tmp-"

func at(op, call string) error {
	return fault.Point(context.Background(), "osfs/"+op+"/"+call)
}

// WriteFile replaces path with data, whole: a reader sees the old bytes or the
// new ones, also after a crash.
func WriteFile(op, path string, data []byte, perm fs.FileMode) error {
	return Replace(op, path, perm, func(f *os.File) error {
		_, err := f.Write(data)
		return err
	})
}

// Replace is WriteFile for content that write produces.
func Replace(op, path string, perm fs.FileMode, write func(*os.File) error) (err error) {
	dir, base := filepath.Split(path)
	if err := at(op, "create"); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, tempPrefix+base+"-*")
	if err != nil {
		return err
	}
	temp := f.Name()
	defer func() {
		if err != nil {
			_ = f.Close()       // closed already, or the first error says more
			_ = os.Remove(temp) // SweepTemp finds what stays
		}
	}()
	if err := f.Chmod(perm); err != nil {
		return err
	}
	if err := errors.Join(at(op, "write"), write(f)); err != nil {
		return err
	}
	if err := errors.Join(at(op, "fsync"), f.Sync()); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return Rename(op, temp, path)
}

// Rename moves from to to and makes it durable. Both are on one file system.
func Rename(op, from, to string) error {
	if err := at(op, "rename"); err != nil {
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	if err := errors.Join(at(op, "fsync-dir"), SyncDir(filepath.Dir(to))); err != nil {
		return err
	}
	if filepath.Dir(from) != filepath.Dir(to) {
		return SyncDir(filepath.Dir(from))
	}
	return nil
}

// Remove deletes one file, durably. A missing file is success.
func Remove(op, path string) error {
	if err := at(op, "remove"); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// RemoveAll deletes a tree, durably: it is renamed away first, so that a crash
// never leaves half of it under its own name.
func RemoveAll(op, path string) error {
	if err := at(op, "remove-all"); err != nil {
		return err
	}
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	dir, base := filepath.Split(filepath.Clean(path))
	doomed, err := os.MkdirTemp(dir, tempPrefix+base+"-*")
	if err != nil {
		return err
	}
	if err := os.Rename(path, filepath.Join(doomed, base)); err != nil {
		return errors.Join(err, os.Remove(doomed))
	}
	if err := SyncDir(dir); err != nil {
		return err
	}
	return os.RemoveAll(doomed)
}

// MkdirAll makes a directory and its parents, durably.
func MkdirAll(op, path string, perm fs.FileMode) error {
	if err := at(op, "mkdir"); err != nil {
		return err
	}
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return nil
	}
	parent := filepath.Dir(path)
	if parent != path {
		if err := MkdirAll(op, parent, perm); err != nil {
			return err
		}
	}
	if err := os.Mkdir(path, perm); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return SyncDir(parent)
}

// SyncDir makes the names in a directory durable.
func SyncDir(dir string) error {
	if dir == "" {
		dir = "."
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	return errors.Join(err, d.Close())
}

// SyncTree makes every regular file and directory below root durable.
func SyncTree(root string) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !d.Type().IsRegular() && !d.IsDir() {
			return nil
		}
		if err := SyncDir(path); err != nil { // fsync is the same call for a file
			return fmt.Errorf("fsync %s: %w", path, err)
		}
		return nil
	})
}

// SweepTemp removes what an interrupted Replace or RemoveAll left in dir.
func SweepTemp(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if len(e.Name()) > len(tempPrefix) && e.Name()[:len(tempPrefix)] == tempPrefix {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// ReadFileLimit reads a file of at most limit bytes.
func ReadFileLimit(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // read only
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, limit)
	}
	return data, nil
}
