package files

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Metadata of a file travels in headers that begin with metadataHeader, and is
// kept in extended attributes.
const (
	metadataHeader = "X-Metadata-"
	metadataXattr  = "user.e2b."
)

// Bounds of metadata, in bytes. The kernel's own on a name is 255 (XATTR_NAME_MAX).
// ext4 has one block for all attributes of a file.
const (
	maxMetadataKey = 255 - len(metadataXattr)
	maxMetadata    = 4096 // names with their prefix, and values
)

// metadataOf reads an upload's metadata. Keys are lower case; of a header that is
// sent several times the first counts.
func metadataOf(header http.Header) (map[string]string, error) {
	metadata := map[string]string{}
	total := 0
	for name, values := range header {
		key, ok := strings.CutPrefix(name, metadataHeader) // header names are canonical
		if !ok || len(values) == 0 {
			continue
		}
		key, value := strings.ToLower(key), values[0]
		switch {
		case key == "":
			return nil, statusf(http.StatusBadRequest, "a header %s has no key", metadataHeader)
		case len(key) > maxMetadataKey:
			return nil, statusf(http.StatusBadRequest, "the metadata key %.20s… has %d bytes, at most %d are allowed", key, len(key), maxMetadataKey)
		case !printable(key) || !printable(value):
			return nil, statusf(http.StatusBadRequest, "the metadata %q is not printable ASCII", key)
		}
		metadata[key] = value
		total += len(metadataXattr) + len(key) + len(value)
	}
	if total > maxMetadata {
		return nil, statusf(http.StatusBadRequest, "the metadata has %d bytes, at most %d are allowed", total, maxMetadata)
	}
	return metadata, nil
}

func printable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' })
}

// keepMetadata gives a new file its metadata.
func keepMetadata(f *os.File, metadata map[string]string) error {
	for _, key := range slices.Sorted(maps.Keys(metadata)) {
		err := unix.Fsetxattr(int(f.Fd()), metadataXattr+key, []byte(metadata[key]), 0)
		if errors.Is(err, unix.ENOTSUP) {
			return statusf(http.StatusNotImplemented, "the file system of %s keeps no metadata", parent(f.Name()))
		}
		if err != nil {
			return fmt.Errorf("keep the metadata %q: %w", key, err)
		}
	}
	return nil
}

// readMetadata reads what a file, or what a link points to, has. Whatever cannot
// be read, or is no text, is left out: it belongs to somebody else.
func readMetadata(path string) map[string]string {
	var metadata map[string]string
	for _, name := range xattrNames(path) {
		key, ok := strings.CutPrefix(name, metadataXattr)
		if !ok || utf8(key) != key {
			continue
		}
		value := make([]byte, maxMetadata)
		n, err := unix.Getxattr(path, name, value) // a longer one is not ours
		if err != nil || utf8(string(value[:n])) != string(value[:n]) {
			continue
		}
		if metadata == nil {
			metadata = map[string]string{}
		}
		metadata[key] = string(value[:n])
	}
	return metadata
}

func xattrNames(path string) []string {
	size, err := unix.Listxattr(path, nil)
	if err != nil || size == 0 {
		return nil
	}
	list := make([]byte, size)
	n, err := unix.Listxattr(path, list)
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00")
}
