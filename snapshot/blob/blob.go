// Package blob is the seam to where snapshots are kept beyond one machine: named
// blobs that are written once.
//
// A Store promises that a blob is there whole or not at all, and, when Put has
// returned, stays there. The suite in blobtest says what every store does; Dir is
// a folder, Mem a fake. What is in a blob is none of its business: who reads one
// checks it.
package blob

import (
	"context"
	"io"
	"regexp"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Store keeps blobs. Its methods may be called from any goroutine.
type Store interface {
	// Put writes a blob of exactly size bytes. On an error there is none, or the
	// one that was there before, or, where only the last step of making it last
	// has failed, the new one.
	Put(ctx context.Context, key string, data io.Reader, size int64) error
	// Get opens a blob; one that is not there is a not_found error.
	Get(ctx context.Context, key string) (io.ReadCloser, error)
	// Size is how many bytes a blob has; one that is not there is a not_found
	// error.
	Size(ctx context.Context, key string) (int64, error)
	// List names the blobs whose key begins with prefix, in order.
	List(ctx context.Context, prefix string) ([]string, error)
	// Delete removes a blob; one that is not there is success.
	Delete(ctx context.Context, key string) error
}

var keyForm = regexp.MustCompile(`^([a-z0-9][a-zA-Z0-9._-]{0,127})(/[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}){0,3}$`)

// CheckKey says whether a text can be a key: up to four names with slashes
// between them. None of them can climb or be hidden.
func CheckKey(key string) error {
	if !keyForm.MatchString(key) {
		return sandbox.Errorf(sandbox.KindInvalid, "blob key %q must match %s", key, keyForm)
	}
	return nil
}

func notFound(key string) error {
	return sandbox.Errorf(sandbox.KindNotFound, "there is no blob %s", key)
}
