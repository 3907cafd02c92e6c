package dm

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
)

// A copy-on-write file holds a persistent exception store (dm-snap-persistent.c
// in Linux): a header chunk, then areas of one metadata chunk, which has room
// for 256 exceptions of 16 bytes, and the 256 chunks that these are about. The
// metadata chunk of an area is cleared as soon as the area before it is full.
const (
	chunkBytes    = 4096
	chunkSectors  = chunkBytes / sector
	perArea       = chunkBytes / 16
	headerChunks  = 1
	firstBytes    = 3 * chunkBytes // header, first metadata, first data
	cowMagic      = "SnAp"
	cowPrefix     = "overlay."
	cowSuffix     = ".cow"
	cowFile       = "overlay.cow"
	recordFile    = "overlay.json"
	maxDiskRecord = 64 << 10
)

// cowBytes is the size of a copy-on-write file in which every chunk of a disk
// fits.
func cowBytes(diskBytes int64) int64 {
	chunks := (diskBytes + chunkBytes - 1) / chunkBytes
	areas := chunks/perArea + 1 // the last full one clears the next
	return (headerChunks + areas + chunks) * chunkBytes
}

// makeCow publishes an empty file. What is written right at the start is
// allocated now: a full file system says so here, and not as an I/O error.
func makeCow(path string, diskBytes int64) error {
	return osfs.Replace("disk-cow", path, 0o600, func(f *os.File) error {
		if _, err := f.Write(make([]byte, firstBytes)); err != nil {
			return err
		}
		return f.Truncate(cowBytes(diskBytes))
	})
}

func snapshotTable(sectors, origin, cow uint64) []target {
	return []target{{
		length: sectors, kind: "snapshot",
		params: fmt.Sprintf("%s %s P %d", number(origin), number(cow), chunkSectors),
	}}
}

// Fill is how full a copy-on-write file is, as dm-snapshot counts.
type Fill struct {
	Used, Total, Metadata int64 // bytes; Metadata is part of Used
}

// brokenError is an overlay that dm-snapshot has given up, for ever: every error
// of a write to its file leads to that.
type brokenError struct{ status string }

func (e *brokenError) Error() string {
	return fmt.Sprintf("the overlay is broken: device-mapper says %q", e.status)
}

// parseFill reads the status of a snapshot: "used/total metadata" in sectors, or
// a word for what is wrong.
func parseFill(status string) (Fill, error) {
	used, rest, _ := strings.Cut(status, "/")
	total, metadata, _ := strings.Cut(rest, " ")
	var n [3]int64
	for i, f := range []string{used, total, metadata} {
		v, err := strconv.ParseInt(f, 10, 54)
		if err != nil || v < 0 {
			return Fill{}, &brokenError{status}
		}
		n[i] = v * sector
	}
	return Fill{Used: n[0], Total: n[1], Metadata: n[2]}, nil
}

// sameFile reports whether a loop device is over this very file.
func (l loop) sameFile(path string) bool {
	var st unix.Stat_t
	return unix.Lstat(path, &st) == nil && st.Dev == l.fsDev && st.Ino == l.inode
}
