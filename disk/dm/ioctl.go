package dm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// target is one row of a table; start and length are in sectors of 512 bytes.
type target struct {
	start, length uint64
	kind          string // the target's type
	params        string // for a status: what the target says
}

// device is what the kernel says of one mapped device.
type device struct {
	dev       uint64 // as in stat's st_rdev
	open      int    // by processes, mounts and other devices' tables
	active    bool   // a table is in place
	suspended bool
	waiting   bool // a table was loaded that Resume puts in place
	readOnly  bool
}

// listed is one row of the list of all mapped devices.
type listed struct {
	name string
	dev  uint64
}

const (
	headBytes   = unix.SizeofDmIoctl
	specBytes   = unix.SizeofDmTargetSpec
	firstAnswer = 16 << 10
	maxAnswer   = 256 << 20 // a table of a million extents fits
	maxName     = unix.DM_NAME_LEN - 1
)

// quiet is the cookie that comes with the uevents: it tells udev's rules (of
// lvm2, 10-dm.rules) to make no links, and to look into none of these devices,
// whose content a guest wrote. The flags are in the upper 16 bits
// (DM_UDEV_DISABLE_{DM,SUBSYSTEM,DISK,OTHER}_RULES_FLAG in libdevmapper.h).
const quiet = 0xf << 16

// control is an open /dev/mapper/control.
type control struct{ file *os.File }

const controlPath = "/dev/mapper/control"

func openControl() (control, error) {
	f, err := os.OpenFile(controlPath, os.O_RDWR, 0)
	if err != nil {
		return control{}, fmt.Errorf("open device-mapper: %w", err)
	}
	return control{f}, nil
}

// request starts a buffer: a header for the named device, and room for data.
func request(name string, flags uint32, room int) ([]byte, error) {
	if len(name) > maxName {
		return nil, fmt.Errorf("device name %q is longer than %d bytes", name, maxName)
	}
	buf := make([]byte, headBytes+room)
	h := head(buf)
	h.Version = [3]uint32{unix.DM_VERSION_MAJOR, 0, 0} // the kernel takes any minor version up to its own
	h.Data_size, h.Data_start, h.Flags = uint32(len(buf)), headBytes, flags
	copy(h.Name[:], name)
	return buf, nil
}

func head(buf []byte) *unix.DmIoctl { return (*unix.DmIoctl)(unsafe.Pointer(&buf[0])) }

// call makes one ioctl. A device that is not there is fs.ErrNotExist.
func (c control) call(op uintptr, buf []byte) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, c.file.Fd(), op, uintptr(unsafe.Pointer(&buf[0])))
		runtime.KeepAlive(buf)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		case unix.ENXIO: // find_device in dm-ioctl.c
			return fmt.Errorf("%w: %w", fs.ErrNotExist, errno)
		}
		return errno
	}
}

// plain is a call that takes a name and answers with the header.
func (c control) plain(op uintptr, name string, flags, event uint32) (device, error) {
	buf, err := request(name, flags, 0)
	if err != nil {
		return device{}, err
	}
	head(buf).Event_nr = event
	if err := c.call(op, buf); err != nil {
		return device{}, err
	}
	h := head(buf)
	return device{
		dev: h.Dev, open: int(h.Open_count), active: h.Flags&unix.DM_ACTIVE_PRESENT_FLAG != 0,
		suspended: h.Flags&unix.DM_SUSPEND_FLAG != 0, waiting: h.Flags&unix.DM_INACTIVE_PRESENT_FLAG != 0, readOnly: h.Flags&unix.DM_READONLY_FLAG != 0,
	}, nil
}

// Make makes a device without a table.
func (c control) Make(name string) error {
	_, err := c.plain(unix.DM_DEV_CREATE, name, 0, 0)
	return err
}

// Status says how a device is.
func (c control) Status(name string) (device, error) {
	return c.plain(unix.DM_DEV_STATUS, name, 0, 0)
}

// Resume puts the loaded table in place.
func (c control) Resume(name string) error {
	_, err := c.plain(unix.DM_DEV_SUSPEND, name, 0, quiet)
	return err
}

// Suspend waits for what is under way, and lets everything wait that comes. No
// file system of the host's is on it that would have to be frozen.
func (c control) Suspend(name string) error {
	_, err := c.plain(unix.DM_DEV_SUSPEND, name, unix.DM_SUSPEND_FLAG|unix.DM_SKIP_LOCKFS_FLAG, quiet)
	return err
}

// Unload forgets the table that waits, if there is one.
func (c control) Unload(name string) error {
	_, err := c.plain(unix.DM_TABLE_CLEAR, name, 0, 0)
	return err
}

// Drop removes a device; EBUSY says that somebody has it open.
func (c control) Drop(name string) error {
	_, err := c.plain(unix.DM_DEV_REMOVE, name, 0, quiet)
	return err
}

// Load prepares a table. The kernel opens the devices in it now.
func (c control) Load(name string, readOnly bool, table []target) error {
	data, err := encodeTable(table)
	if err != nil {
		return err
	}
	var flags uint32
	if readOnly {
		flags = unix.DM_READONLY_FLAG
	}
	buf, err := request(name, flags, len(data))
	if err != nil {
		return err
	}
	head(buf).Target_count = uint32(len(table))
	copy(buf[headBytes:], data)
	return c.call(unix.DM_TABLE_LOAD, buf)
}

// Info is what the targets say of themselves. It does not wait for their I/O.
func (c control) Info(name string) ([]target, error) {
	h, data, err := c.answer(unix.DM_TABLE_STATUS, name, unix.DM_NOFLUSH_FLAG)
	if err != nil {
		return nil, err
	}
	return decodeTable(data, int(h.Target_count))
}

// Deps are the devices that the table in place uses.
func (c control) Deps(name string) ([]uint64, error) {
	_, data, err := c.answer(unix.DM_TABLE_DEPS, name, 0)
	if err != nil {
		return nil, err
	}
	return decodeDeps(data)
}

// List is every mapped device of the machine.
func (c control) List() ([]listed, error) {
	_, data, err := c.answer(unix.DM_LIST_DEVICES, "", 0)
	if err != nil {
		return nil, err
	}
	return decodeList(data)
}

// answer makes a call whose answer may be of any length.
func (c control) answer(op uintptr, name string, flags uint32) (*unix.DmIoctl, []byte, error) {
	for room := firstAnswer; room <= maxAnswer; room *= 4 {
		buf, err := request(name, flags, room)
		if err != nil {
			return nil, nil, err
		}
		if err := c.call(op, buf); err != nil {
			return nil, nil, err
		}
		h := head(buf)
		if h.Flags&unix.DM_BUFFER_FULL_FLAG != 0 {
			continue
		}
		start, end := int64(h.Data_start), int64(h.Data_size)
		if end <= headBytes { // the answer of a device without a table, for one, is the header alone
			return h, nil, nil
		}
		if start < headBytes || start > end || end > int64(len(buf)) {
			return nil, nil, fmt.Errorf("device-mapper answers with data from %d to %d in %d bytes", start, end, len(buf))
		}
		return h, buf[start:end], nil
	}
	return nil, nil, fmt.Errorf("device-mapper answers with more than %d bytes", maxAnswer)
}

// encodeTable writes rows as DM_TABLE_LOAD takes them: each a dm_target_spec,
// then its text with a NUL, padded so that the next begins at 8 bytes.
func encodeTable(table []target) ([]byte, error) {
	var out []byte
	for _, t := range table {
		if len(t.kind) >= unix.DM_MAX_TYPE_NAME || bytes.IndexByte([]byte(t.params), 0) >= 0 {
			return nil, fmt.Errorf("target %q %q cannot be said to device-mapper", t.kind, t.params)
		}
		next := (specBytes + len(t.params) + 1 + 7) &^ 7
		row := make([]byte, next)
		binary.NativeEndian.PutUint64(row, t.start)
		binary.NativeEndian.PutUint64(row[8:], t.length)
		binary.NativeEndian.PutUint32(row[20:], uint32(next))
		copy(row[24:], t.kind)
		copy(row[specBytes:], t.params)
		out = append(out, row...)
	}
	return out, nil
}

var errShort = errors.New("the answer of device-mapper ends too early")

// decodeTable reads the rows of DM_TABLE_STATUS, whose next counts from the
// start of the data (and not, as in a table that is loaded, from the row).
func decodeTable(data []byte, count int) ([]target, error) {
	if count < 0 || count > len(data)/specBytes {
		return nil, fmt.Errorf("%d targets: %w", count, errShort)
	}
	table := make([]target, 0, count)
	for at := uint64(0); len(table) < count; {
		if at+specBytes > uint64(len(data)) {
			return nil, errShort
		}
		row := data[at:]
		text, _, ok := bytes.Cut(row[specBytes:], []byte{0})
		if !ok {
			return nil, errShort
		}
		kind, _, _ := bytes.Cut(row[24:specBytes], []byte{0})
		table = append(table, target{
			start: binary.NativeEndian.Uint64(row), length: binary.NativeEndian.Uint64(row[8:]),
			kind: string(kind), params: string(text),
		})
		next := uint64(binary.NativeEndian.Uint32(row[20:]))
		if next <= at && len(table) < count {
			return nil, fmt.Errorf("target %d says that the next is at %d: %w", len(table)-1, next, errShort)
		}
		at = next
	}
	return table, nil
}

// decodeList reads a chain of dm_name_list: device, distance to the next, name.
func decodeList(data []byte) ([]listed, error) {
	const nameAt = 12
	var list []listed
	if len(data) == 0 { // there is no device at all
		return nil, nil
	}
	for {
		if len(data) < nameAt {
			return nil, errShort
		}
		dev := binary.NativeEndian.Uint64(data)
		next := binary.NativeEndian.Uint32(data[8:])
		if dev == 0 { // the only row, in older kernels, when there is no device
			return list, nil
		}
		name, _, ok := bytes.Cut(data[nameAt:], []byte{0})
		if !ok {
			return nil, errShort
		}
		list = append(list, listed{name: string(name), dev: dev})
		if next == 0 {
			return list, nil
		}
		if next < nameAt || uint64(next) > uint64(len(data)) {
			return nil, errShort
		}
		data = data[next:]
	}
}

// decodeDeps reads a dm_target_deps: how many, four bytes of nothing, devices.
func decodeDeps(data []byte) ([]uint64, error) {
	if len(data) == 0 { // a device without a table
		return nil, nil
	}
	if len(data) < 8 {
		return nil, errShort
	}
	count := uint64(binary.NativeEndian.Uint32(data))
	data = data[8:]
	if count > uint64(len(data))/8 {
		return nil, errShort
	}
	devs := make([]uint64, count)
	for i := range devs {
		devs[i] = binary.NativeEndian.Uint64(data[8*i:])
	}
	return devs, nil
}
