package kernel

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Range is a part of a process's address space: [Start, End).
type Range struct{ Start, End uint64 }

// add appends a range to ascending ones, and joins neighbours.
func add(ranges []Range, r Range) []Range {
	if last := len(ranges) - 1; last >= 0 && ranges[last].End == r.Start {
		ranges[last].End = r.End
		return ranges
	}
	return append(ranges, r)
}

// OwnPages lists the pages of a range that a process has for itself: of a private
// mapping of a file those that are not the file's any more, of an anonymous one
// those that are not untouched. Pages that are swapped out count, and so may some
// whose bytes never changed. The process must not run on in that range meanwhile;
// that it still lives is for the caller to ask afterwards.
//
// It asks by PAGEMAP_SCAN, which Linux has since 6.7, or else reads
// /proc/PID/pagemap, which takes 8 bytes per page. See
// Documentation/admin-guide/mm/pagemap.rst in the kernel's source.
func OwnPages(pid int, r Range) ([]Range, error) {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/pagemap")
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // read only
	ranges, err := scanPagemap(f, r)
	if errors.Is(err, unix.ENOTTY) {
		ranges, err = readPagemap(f, r)
	}
	if err != nil {
		return nil, fmt.Errorf("pagemap of pid %d: %w", pid, err)
	}
	return ranges, nil
}

// Of include/uapi/linux/fs.h.
const (
	pagemapScan = 0xc0606610 // _IOWR('f', 16, struct pm_scan_arg)

	pageIsFile    = 1 << 2
	pageIsPresent = 1 << 3
	pageIsSwapped = 1 << 4
)

// scanArg is struct pm_scan_arg.
type scanArg struct {
	size, flags           uint64
	start, end, walkEnd   uint64
	vec, vecLen, maxPages uint64
	inverted, mask, anyOf uint64
	returned              uint64
}

// pageRegion is struct page_region.
type pageRegion struct{ start, end, categories uint64 }

// scanPagemap lets the kernel find the pages.
func scanPagemap(f *os.File, r Range) ([]Range, error) {
	found := make([]pageRegion, 4096)
	var ranges []Range
	for r.Start < r.End {
		arg := scanArg{
			start: r.Start, end: r.End, vec: uint64(uintptr(unsafe.Pointer(&found[0]))), vecLen: uint64(len(found)),
			mask: pageIsFile, inverted: pageIsFile, anyOf: pageIsPresent | pageIsSwapped,
		}
		arg.size = uint64(unsafe.Sizeof(arg))
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), pagemapScan, uintptr(unsafe.Pointer(&arg)))
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return nil, errno
		}
		// A scan that got to the end may name an earlier place as that (seen on
		// 6.18): what it found lies behind it then.
		reached := arg.walkEnd
		for _, p := range found[:n] {
			ranges = add(ranges, Range{p.start, p.end})
			reached = max(reached, p.end)
		}
		if reached <= r.Start {
			return nil, fmt.Errorf("the scan stands still at %#x", r.Start)
		}
		r.Start = reached
	}
	return ranges, nil
}

// Bits of a word of /proc/PID/pagemap.
const (
	pagemapFile    = 1 << 61 // of a file, or shared
	pagemapSwapped = 1 << 62
	pagemapPresent = 1 << 63
)

// readPagemap looks at the word of each page.
func readPagemap(f io.ReaderAt, r Range) ([]Range, error) {
	page := uint64(os.Getpagesize())
	words := make([]byte, 64<<10)
	var ranges []Range
	for r.Start < r.End {
		part := words[:min(uint64(len(words)), (r.End-r.Start)/page*8)]
		if n, err := f.ReadAt(part, int64(r.Start/page*8)); n < len(part) {
			return nil, fmt.Errorf("read at %#x: %w", r.Start, errors.Join(err, io.ErrUnexpectedEOF))
		}
		for ; len(part) > 0; part = part[8:] {
			word := binary.NativeEndian.Uint64(part)
			if word&(pagemapPresent|pagemapSwapped) != 0 && word&pagemapFile == 0 {
				ranges = add(ranges, Range{r.Start, r.Start + page})
			}
			r.Start += page
		}
	}
	return ranges, nil
}

// Mapping is a line of /proc/PID/maps.
type Mapping struct {
	Range
	Perms  string // "rw-p"
	Offset uint64
	Device string // "08:01", "00:00" is none
	Inode  uint64 // 0 is anonymous memory
}

// Mappings lists what a process has mapped in a range, in ascending order.
func Mappings(pid int, r Range) ([]Mapping, error) {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/maps")
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // read only
	var found []Mapping
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		m, err := parseMapping(lines.Text())
		if err != nil {
			return nil, fmt.Errorf("read /proc/%d/maps: %w", pid, err)
		}
		if m.Start < r.End && m.End > r.Start {
			found = append(found, m)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read /proc/%d/maps: %w", pid, err)
	}
	return found, nil
}

func parseMapping(line string) (Mapping, error) {
	fields := strings.Fields(line)
	if len(fields) < 5 {
		return Mapping{}, fmt.Errorf("%q has too few fields", line)
	}
	start, end, _ := strings.Cut(fields[0], "-")
	m := Mapping{Perms: fields[1], Device: fields[3]}
	for _, n := range []struct {
		text string
		base int
		to   *uint64
	}{{start, 16, &m.Start}, {end, 16, &m.End}, {fields[2], 16, &m.Offset}, {fields[4], 10, &m.Inode}} {
		var err error
		if *n.to, err = strconv.ParseUint(n.text, n.base, 64); err != nil {
			return Mapping{}, fmt.Errorf("%q: %w", line, err)
		}
	}
	return m, nil
}
