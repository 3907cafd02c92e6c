package kernel

import (
	"errors"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mapped is private memory of this process, of a file of ones or of none.
func mapped(t *testing.T, pages int, file bool) ([]byte, Range) {
	t.Helper()
	fd, flags := -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS
	if file {
		f, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }() // the mapping stays
		if err := f.Truncate(int64(pages * os.Getpagesize())); err != nil {
			t.Fatal(err)
		}
		fd, flags = int(f.Fd()), unix.MAP_PRIVATE
	}
	memory, err := unix.Mmap(fd, 0, pages*os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(memory) })  // the process ends soon
	_ = unix.Madvise(memory, unix.MADV_NOHUGEPAGE) // where there are none it has no effect
	start := addressOf(memory)
	return memory, Range{start, start + uint64(len(memory))}
}

// TestOwnPages asks in both ways, with more ranges than the kernel answers at a time.
func TestOwnPages(t *testing.T) {
	const pages = 20_000
	size := os.Getpagesize()
	for _, file := range []bool{false, true} {
		memory, whole := mapped(t, pages, file)
		looked := byte(0)
		var want []Range
		for i := range pages {
			switch {
			case i%2 == 0 && i < 19_000, i > 19_000 && i < 19_010:
				memory[i*size] = 0 // the same byte is a change, too
				want = add(want, Range{whole.Start + uint64(i*size), whole.Start + uint64((i+1)*size)})
			case file:
				looked |= memory[i*size]
			}
		}
		if looked != 0 {
			t.Fatal("a new file is not empty")
		}
		for name, list := range lists(t) {
			got, err := list(whole)
			if err != nil || !slices.Equal(got, want) {
				t.Errorf("%s, of a file %v: %d ranges, want %d; %v", name, file, len(got), len(want), err)
			}
			for _, part := range []Range{{want[1].Start, want[1].End}, {want[1].Start, want[1].Start}} {
				got, err := list(part)
				if err != nil || len(got) > 1 || len(got) == 1 && got[0] != part {
					t.Errorf("%s of %+v: %+v, %v", name, part, got, err)
				}
			}
		}
	}
}

// lists are the ways to ask.
func lists(t *testing.T) map[string]func(Range) ([]Range, error) {
	t.Helper()
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // read only
	ways := map[string]func(Range) ([]Range, error){
		"OwnPages": func(r Range) ([]Range, error) { return OwnPages(os.Getpid(), r) },
		"a read":   func(r Range) ([]Range, error) { return readPagemap(f, r) },
		"a scan":   func(r Range) ([]Range, error) { return scanPagemap(f, r) },
	}
	if _, err := scanPagemap(f, Range{0, 1 << 30}); errors.Is(err, unix.ENOTTY) {
		delete(ways, "a scan") // before Linux 6.7
	}
	return ways
}

// TestOwnPagesOfAProcessThatEnded: an answer about nothing is none.
func TestOwnPagesOfAProcessThatEnded(t *testing.T) {
	child := exec.Command("sleep", "60")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	pagemap, err := os.Open("/proc/" + strconv.Itoa(child.Process.Pid) + "/pagemap")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = pagemap.Close() }() // read only
	_ = child.Process.Kill()
	_ = child.Wait() // it was killed
	_, whole := mapped(t, 10, false)
	if ranges, err := readPagemap(pagemap, whole); err == nil {
		t.Errorf("a read: %v", ranges)
	}
	if ranges, err := scanPagemap(pagemap, whole); err == nil {
		t.Errorf("a scan: %v", ranges)
	}
	if ranges, err := OwnPages(child.Process.Pid, whole); err == nil {
		t.Errorf("OwnPages: %v", ranges)
	}
}

func TestMappings(t *testing.T) {
	memory, whole := mapped(t, 10, true)
	middle := memory[4*os.Getpagesize() : 5*os.Getpagesize()]
	if err := unix.Mprotect(middle, unix.PROT_READ); err != nil {
		t.Fatal(err)
	}
	got, err := Mappings(os.Getpid(), whole)
	if err != nil || len(got) != 3 {
		t.Fatalf("%+v, %v", got, err)
	}
	page := uint64(os.Getpagesize())
	for i, want := range []Mapping{
		{Range: Range{whole.Start, whole.Start + 4*page}, Perms: "rw-p"},
		{Range: Range{whole.Start + 4*page, whole.Start + 5*page}, Perms: "r--p", Offset: 4 * page},
		{Range: Range{whole.Start + 5*page, whole.End}, Perms: "rw-p", Offset: 5 * page},
	} {
		if got[i].Inode == 0 || got[i].Device == "00:00" {
			t.Errorf("%+v is of no file", got[i])
		}
		got[i].Inode, got[i].Device = 0, ""
		if got[i] != want {
			t.Errorf("%+v, want %+v", got[i], want)
		}
	}
}

func TestLinesThatAreNoMappings(t *testing.T) {
	for _, line := range []string{"", "7f00-8f00 rw-p 0 08:01", "7f00 rw-p 0 08:01 5", "x-8f00 rw-p 0 08:01 5", "7f00-8f00 rw-p 0 08:01 x"} {
		if m, err := parseMapping(line); err == nil {
			t.Errorf("%q: %+v", line, m)
		}
	}
}

func addressOf(p []byte) uint64 { return uint64(uintptr(unsafe.Pointer(&p[0]))) }
