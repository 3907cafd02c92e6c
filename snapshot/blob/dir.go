package blob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Dir keeps blobs as files below a folder. Other processes may use it too.
type Dir struct{ root string }

// OpenDir opens the store in a folder and makes it at the first time.
func OpenDir(root string) (*Dir, error) {
	if !filepath.IsAbs(root) {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "folder of blobs %q must be an absolute path", root)
	}
	if err := osfs.MkdirAll("blob-dir", root, 0o700); err != nil {
		return nil, fmt.Errorf("open blobs: %w", err)
	}
	return &Dir{root}, nil
}

const hidden = ".tmp-" // what osfs has not published

func (d *Dir) path(key string) (string, error) {
	if err := CheckKey(key); err != nil {
		return "", err
	}
	return filepath.Join(d.root, filepath.FromSlash(key)), nil
}

// Put writes a file.
func (d *Dir) Put(ctx context.Context, key string, data io.Reader, size int64) error {
	path, err := d.path(key)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	err = osfs.MkdirAll("blob-dir", filepath.Dir(path), 0o700)
	if err == nil {
		err = osfs.Replace("blob-put", path, 0o600, func(f *os.File) error {
			return copyExactly(ctx, f, data, size)
		})
	}
	if err != nil {
		return fmt.Errorf("put blob %s: %w", key, err)
	}
	return nil
}

// copyExactly copies size bytes; more or fewer are an error.
func copyExactly(ctx context.Context, to io.Writer, from io.Reader, size int64) error {
	n, err := io.Copy(to, io.LimitReader(untilDone{ctx, from}, size+1))
	if err == nil && n != size {
		err = sandbox.Errorf(sandbox.KindInvalid, "the data has not the %d bytes that were announced", size)
	}
	return err
}

// untilDone stops reading when a context ends.
type untilDone struct {
	ctx context.Context
	io.Reader
}

func (r untilDone) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.Reader.Read(p)
}

// Get opens a file.
func (d *Dir) Get(_ context.Context, key string) (io.ReadCloser, error) {
	path, err := d.path(key)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFound(key)
	}
	if err != nil {
		return nil, fmt.Errorf("get blob %s: %w", key, err)
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(notFound(key), err, f.Close())
	}
	return f, nil
}

// Size asks for the size of a file.
func (d *Dir) Size(_ context.Context, key string) (int64, error) {
	path, err := d.path(key)
	if err != nil {
		return 0, err
	}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
		return 0, notFound(key)
	}
	if err != nil {
		return 0, fmt.Errorf("size of blob %s: %w", key, err)
	}
	return info.Size(), nil
}

// List walks the folder.
func (d *Dir) List(ctx context.Context, prefix string) ([]string, error) {
	var keys []string
	err := filepath.WalkDir(d.root, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // it was deleted just now
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil || e.IsDir() || strings.HasPrefix(e.Name(), hidden) {
			return err
		}
		rel, err := filepath.Rel(d.root, path)
		if key := filepath.ToSlash(rel); err == nil && strings.HasPrefix(key, prefix) {
			keys = append(keys, key)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list blobs: %w", err)
	}
	slices.Sort(keys) // the walk has names in order, not whole keys
	return keys, nil
}

// Delete removes a file.
func (d *Dir) Delete(_ context.Context, key string) error {
	path, err := d.path(key)
	if err != nil {
		return err
	}
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := osfs.Remove("blob-delete", path); err != nil {
		return fmt.Errorf("delete blob %s: %w", key, err)
	}
	return nil
}
