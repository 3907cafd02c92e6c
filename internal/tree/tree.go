// Package tree packs a directory into a tar stream and unpacks one: what a copy
// between a machine and a sandbox, or between two sandboxes, consists of.
//
// A stream holds regular files, directories, symbolic links and hard links, with
// permission bits and times of modification; names are relative to the directory
// that was packed. Links are never followed. What is something else is left out
// and counted. At its end is a Report, as the comment of a global pax header, which
// every tar program passes over; a packer that has failed says there why, and does
// not end the stream. A stream without its end is an error to Unpack and Relay,
// wherever it was cut.
//
// Both sides take the other one for hostile. Unpack touches nothing outside the
// os.Root it is given, and follows no link inside it either. Memory does not depend
// on the size of the tree. Whose rights apply is the caller's business, and so is
// durability: nothing is synced.
package tree

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// MaxDepth is how deep directories may lie in one another. On each level two
// descriptors are open.
const MaxDepth = 256

// These mark what is not published yet: a new file, and one that will replace
// another. Whoever makes them removes them, and Pack leaves them out.
const (
	TempNew     = ".dormouse-upload-"
	TempReplace = ".dormouse-replace-"
)

// Report is what a tree consists of, or what became of it.
type Report struct {
	Files        int64  `json:"files"` // and links
	Directories  int64  `json:"directories"`
	Bytes        int64  `json:"bytes"`                   // of the files' content
	Skipped      int64  `json:"skipped"`                 // sockets, devices, pipes and file systems that the kernel makes up
	FirstSkipped string `json:"first_skipped,omitempty"` // the name of the first one
}

func (r *Report) skip(name string, n int64) {
	if n > 0 && r.Skipped == 0 {
		r.FirstSkipped = name
	}
	r.Skipped += max(0, n)
}

// at says which entry an error is about, in place of the path that the system has
// for it, and gives it a kind.
func at(name string, err error) error {
	if err == nil {
		return nil
	}
	var path *fs.PathError
	var link *os.LinkError
	switch {
	case errors.As(err, &path):
		err = fmt.Errorf("%s: %w", strings.TrimSuffix(path.Op, "at"), path.Err)
	case errors.As(err, &link):
		err = fmt.Errorf("%s: %w", strings.TrimSuffix(link.Op, "at"), link.Err)
	}
	err = fmt.Errorf("%.300q: %w", name, err)
	switch {
	case sandbox.KindOf(err) != sandbox.KindInternal:
		return err
	case sandbox.DiskFull(err):
		return sandbox.WithKind(sandbox.KindNoSpace, err)
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS), errors.Is(err, syscall.ENAMETOOLONG), errors.Is(err, syscall.EINVAL),
		errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.EFBIG):
		return sandbox.WithKind(sandbox.KindInvalid, err)
	}
	return err
}

func invalid(format string, args ...any) error {
	return sandbox.Errorf(sandbox.KindInvalid, format, args...)
}

func conflict(format string, args ...any) error {
	return sandbox.Errorf(sandbox.KindConflict, format, args...)
}

// split makes the parts of an entry's name; none is the tree itself. A name that
// leads out is refused, wherever it would lead.
func split(name string) ([]string, error) {
	if strings.ContainsRune(name, 0) {
		return nil, invalid("the name has a NUL byte in it")
	}
	if strings.HasPrefix(name, "/") {
		return nil, invalid("the name is absolute")
	}
	var parts []string
	for part := range strings.SplitSeq(name, "/") {
		switch part {
		case "", ".":
		case "..":
			return nil, invalid("the name leads upwards")
		default:
			parts = append(parts, part)
		}
		if len(parts) > MaxDepth {
			return nil, tooDeep()
		}
	}
	return parts, nil
}

func tooDeep() error { return invalid("it lies more than %d directories deep", MaxDepth) }

// describe names what a file of a mode is.
func describe(mode fs.FileMode) string {
	switch {
	case mode.IsRegular():
		return "a file"
	case mode.IsDir():
		return "a directory"
	case mode&fs.ModeSymlink != 0:
		return "a symbolic link"
	}
	return "a device, pipe or socket"
}
