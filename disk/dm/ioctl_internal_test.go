package dm

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

var (
	sameTarget = cmp.AllowUnexported(target{})
	sameListed = cmp.AllowUnexported(listed{})
)

var someTable = []target{
	{0, 8, "linear", "7:3 16"},
	{8, 1 << 40, "zero", ""},
	{8 + 1<<40, 16, "verity", "1 7:1 7:2 4096 4096 2 1 sha256 00 -"},
}

// answered turns rows as they are loaded into rows as they are answered: each
// says where the next is, from the start of all instead of from its own.
func answered(t testing.TB, table []target) []byte {
	t.Helper()
	data, err := encodeTable(table)
	if err != nil {
		t.Fatal(err)
	}
	for at := uint32(0); int(at) < len(data); {
		next := at + binary.NativeEndian.Uint32(data[at+20:])
		binary.NativeEndian.PutUint32(data[at+20:], next)
		at = next
	}
	return data
}

func TestTablesComeBack(t *testing.T) {
	data := answered(t, someTable)
	got, err := decodeTable(data, len(someTable))
	if diff := cmp.Diff(someTable, got, sameTarget); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}
	if len(data)%8 != 0 {
		t.Errorf("%d bytes: the kernel wants rows at multiples of 8", len(data))
	}
	for n := range data {
		if got, err := decodeTable(data[:n], len(someTable)); err == nil && !slices.Equal(got, someTable) {
			t.Fatalf("cut at %d: %+v", n, got)
		}
	}
	for _, count := range []int{-1, len(someTable) + 1, 1 << 30} {
		if got, err := decodeTable(data, count); err == nil {
			t.Errorf("%d targets in %d: %+v", count, len(someTable), got)
		}
	}
}

func TestTablesThatCannotBeSaid(t *testing.T) {
	for _, bad := range []target{{kind: "a-target-with-17-b"}, {kind: "linear", params: "a\x00b"}} {
		if data, err := encodeTable([]target{bad}); err == nil {
			t.Errorf("%+v: %q", bad, data)
		}
	}
	if _, err := request(strings.Repeat("x", maxName+1), 0, 0); err == nil {
		t.Error("a name that would be cut is taken")
	}
}

func FuzzDecodeTable(f *testing.F) {
	f.Add(answered(f, someTable), 3)
	f.Add([]byte{}, 0)
	f.Fuzz(func(t *testing.T, data []byte, count int) {
		got, err := decodeTable(data, count)
		if err == nil && len(got) != count {
			t.Errorf("%d rows of %d", len(got), count)
		}
	})
}

// listOf is what DM_LIST_DEVICES answers: rows at multiples of 8, the last of which has no next.
func listOf(list []listed) []byte {
	var data []byte
	for i, l := range list {
		row := make([]byte, (12+len(l.name)+1+7)&^7)
		binary.NativeEndian.PutUint64(row, l.dev)
		if i < len(list)-1 {
			binary.NativeEndian.PutUint32(row[8:], uint32(len(row)))
		}
		copy(row[12:], l.name)
		data = append(data, row...)
	}
	return data
}

func TestListsComeBack(t *testing.T) {
	list := []listed{{"a", 1}, {"dmabcde-o-some-name", 0xfd00}, {"z", 3}}
	data := listOf(list)
	got, err := decodeList(data)
	if diff := cmp.Diff(list, got, sameListed); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}
	for n := 1; n < len(data); n++ {
		if got, err := decodeList(data[:n]); err == nil && !slices.Equal(got, list) {
			t.Fatalf("cut at %d: %+v", n, got)
		}
	}
	for name, none := range map[string][]byte{"nothing": nil, "a row of no device": make([]byte, 16)} {
		if got, err := decodeList(none); err != nil || len(got) != 0 {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

func FuzzDecodeList(f *testing.F) {
	f.Add(listOf([]listed{{"a", 1}, {"b", 2}}))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := decodeList(data)
		if err == nil && len(got) > len(data)/12 {
			t.Errorf("%d devices in %d bytes", len(got), len(data))
		}
	})
}

func depsOf(devs ...uint64) []byte {
	data := binary.NativeEndian.AppendUint64(nil, uint64(len(devs)))
	for _, d := range devs {
		data = binary.NativeEndian.AppendUint64(data, d)
	}
	return data
}

func TestDepsComeBack(t *testing.T) {
	data := depsOf(5, 0xfd01)
	if got, err := decodeDeps(data); err != nil || !slices.Equal(got, []uint64{5, 0xfd01}) {
		t.Errorf("%v, %v", got, err)
	}
	for n := 1; n < len(data); n++ {
		if got, err := decodeDeps(data[:n]); err == nil {
			t.Fatalf("cut at %d: %v", n, got)
		}
	}
	if got, err := decodeDeps(nil); err != nil || len(got) != 0 {
		t.Errorf("of a device without a table: %v, %v", got, err)
	}
}

func FuzzDecodeDeps(f *testing.F) {
	f.Add(depsOf(5, 6))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		if got, err := decodeDeps(data); err == nil && len(got) > len(data)/8 {
			t.Errorf("%d devices in %d bytes", len(got), len(data))
		}
	})
}

// TestUdevIsToldToLookAway: dmsetup is what udev's rules of lvm2 ask. A cookie
// whose lower half is zero is nobody's semaphore, so that nobody waits for it.
func TestUdevIsToldToLookAway(t *testing.T) {
	testkit.Tool(t, "dmsetup")
	out, err := exec.CommandContext(t.Context(), "dmsetup", "udevflags", strconv.Itoa(quiet)).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, flag := range []string{"DM", "SUBSYSTEM", "DISK", "OTHER"} {
		if want := "DM_UDEV_DISABLE_" + flag + "_RULES_FLAG='1'"; !strings.Contains(string(out), want) {
			t.Errorf("no %s in %s", want, out)
		}
	}
	if out, err := exec.CommandContext(t.Context(), "dmsetup", "udevcomplete", strconv.Itoa(quiet)).CombinedOutput(); err != nil {
		t.Errorf("udevcomplete: %v: %s", err, out)
	}
}

// TestDevicesHalfMade asks a kernel, and the fake, about a device at each stage
// at which somebody who makes one can die.
func TestDevicesHalfMade(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		name := r.driver.prefix() + "test"
		k := r.look
		for _, call := range []func() error{
			func() error { _, err := k.Status(name); return err },
			func() error { _, err := k.Deps(name); return err },
			func() error { _, err := k.Info(name); return err },
			func() error { return k.Resume(name) },
			func() error { return k.Drop(name) },
			func() error { return k.Load(name, true, []target{{0, 8, "zero", ""}}) },
		} {
			if err := call(); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("of a device that is not there: %v", err)
			}
		}
		var dev uint64
		look := func(stage string, active bool) {
			t.Helper()
			s, err := k.Status(name)
			if err != nil || s.active != active || s.suspended || s.open != 0 {
				t.Errorf("%s: %+v, %v", stage, s, err)
			}
			dev = s.dev
			info, err := k.Info(name)
			if err != nil || len(info) != 0 != active {
				t.Errorf("%s: info %+v, %v", stage, info, err)
			}
			if deps, err := k.Deps(name); err != nil || len(deps) != 0 {
				t.Errorf("%s: deps %v, %v", stage, deps, err)
			}
			all, err := k.List()
			if err != nil || !slices.Contains(all, listed{name, dev}) {
				t.Errorf("%s: listed %+v, %v", stage, all, err)
			}
			if n, err := k.Holders(dev); n != 0 || err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: %d holders, %v", stage, n, err)
			}
		}
		mustMake := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		mustMake(k.Make(name))
		look("made", false)
		if err := k.Make(name); !errors.Is(err, unix.EBUSY) {
			t.Errorf("made twice: %v", err)
		}
		mustMake(k.Load(name, true, []target{{0, 8, "zero", ""}}))
		look("loaded", false)
		mustMake(k.Resume(name))
		look("resumed", true)
		mustMake(k.MakeNode(name, dev, 0, 0))
		if got, err := k.Nodes(r.driver.prefix()); err != nil || !slices.Equal(got, []string{name}) {
			t.Errorf("nodes: %v, %v", got, err)
		}
		f, err := r.open(filepath.Join(r.cfg.NodeDir, name))
		if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EROFS) || errors.Is(err, unix.EPERM) { // it is read-only
			var ro reader
			ro, err = k.OpenNode(name)
			f, _ = ro.(openDevice)
		}
		mustMake(err)
		if s, err := k.Status(name); err != nil || s.open != 1 || !s.readOnly {
			t.Errorf("open: %+v, %v", s, err)
		}
		if err := k.Drop(name); !errors.Is(err, unix.EBUSY) {
			t.Errorf("dropped while open: %v", err)
		}
		if who := k.Openers(dev); len(who) != 1 {
			t.Errorf("open in %v", who)
		}
		mustMake(f.Close())
		mustMake(k.Drop(name))
		mustMake(k.RemoveNode(name))
		mustMake(k.RemoveNode(name))
		r.nothingRemains("at the end")
	})
}
