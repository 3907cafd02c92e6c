package dm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// loop is what the kernel says of one loop device.
type loop struct {
	dev    uint64 // the loop device itself
	tag    string // what Attach named it
	path   string // of the file, as it is called now; " (deleted)" may follow
	fsDev  uint64 // of the file, with inode
	inode  uint64
	direct bool // direct I/O
}

// held is a loop device that lives at least until close: from then on it lives
// while a table uses it.
type held struct {
	dev   uint64
	close func() error
}

const (
	loopMajor   = 7
	loopTries   = 128 // others take free devices too
	maxTag      = 63  // lo_file_name with its NUL
	sysDevBlock = "/sys/dev/block"
)

// loops are the loop devices of this machine.
type loops struct{}

// Attach puts a loop device over a file. Its size is the file's, now.
func (loops) Attach(file *os.File, tag string, readOnly bool) (held, error) {
	if len(tag) > maxTag {
		return held{}, fmt.Errorf("loop tag %q is longer than %d bytes", tag, maxTag)
	}
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return held{}, err
	}
	defer func() { _ = ctl.Close() }() // nothing was written
	for range loopTries {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return held{}, fmt.Errorf("find a free loop device: %w", err)
		}
		h, err := configure(n, file, tag, readOnly)
		if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENXIO) || errors.Is(err, fs.ErrNotExist) {
			continue // somebody was faster, or removes the device just now
		}
		return h, err
	}
	return held{}, fmt.Errorf("find a free loop device: %d were taken by others: %w", loopTries, unix.EBUSY)
}

// configure binds loop device n. The base is read through the page cache, which
// all its sandboxes share; a copy-on-write file directly, where its file system
// can (the kernel falls back by itself): its blocks are cached above already.
func configure(n int, file *os.File, tag string, readOnly bool) (_ held, err error) {
	mode, flags := os.O_RDWR, uint32(unix.LO_FLAGS_AUTOCLEAR|unix.LO_FLAGS_DIRECT_IO)
	if readOnly {
		mode, flags = os.O_RDONLY, unix.LO_FLAGS_AUTOCLEAR|unix.LO_FLAGS_READ_ONLY
	}
	f, err := os.OpenFile("/dev/loop"+strconv.Itoa(n), mode|unix.O_NONBLOCK, 0)
	if err != nil {
		return held{}, err
	}
	defer func() {
		if err != nil {
			_ = f.Close() // the first error says more
		}
	}()
	config := unix.LoopConfig{Fd: uint32(file.Fd()), Info: unix.LoopInfo64{Flags: flags}}
	copy(config.Info.File_name[:], tag)
	if err := unix.IoctlLoopConfigure(int(f.Fd()), &config); err != nil {
		return held{}, fmt.Errorf("configure loop%d: %w", n, err)
	}
	return held{dev: unix.Mkdev(loopMajor, uint32(n)), close: f.Close}, nil
}

// LoopAt describes the loop device with this number; fs.ErrNotExist if no file
// is behind it.
func (loops) LoopAt(dev uint64) (_ loop, err error) {
	if unix.Major(dev) != loopMajor {
		return loop{}, fmt.Errorf("device %s is no loop device", number(dev))
	}
	dir := filepath.Join(sysDevBlock, number(dev), "loop")
	path, err := os.ReadFile(filepath.Join(dir, "backing_file"))
	if errors.Is(err, unix.ENODEV) { // it was opened, and then the device let go of its file
		return loop{}, fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	if err != nil {
		return loop{}, err
	}
	f, err := os.OpenFile("/dev/loop"+strconv.Itoa(int(unix.Minor(dev))), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return loop{}, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if errors.Is(err, unix.ENXIO) {
		return loop{}, fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	if err != nil {
		return loop{}, fmt.Errorf("ask loop%d: %w", unix.Minor(dev), err)
	}
	return loop{
		dev: dev, tag: unix.ByteSliceToString(info.File_name[:]), path: strings.TrimSuffix(string(path), "\n"),
		fsDev: info.Device, inode: info.Inode, direct: info.Flags&unix.LO_FLAGS_DIRECT_IO != 0,
	}, nil
}

// Loops lists the loop devices whose tag starts with prefix.
func (l loops) Loops(prefix string) ([]loop, error) {
	paths, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var found []loop
	for _, path := range paths {
		name := filepath.Base(filepath.Dir(filepath.Dir(path)))
		n, err := strconv.ParseUint(strings.TrimPrefix(name, "loop"), 10, 20)
		if err != nil {
			continue // not a name that the kernel gives
		}
		info, err := l.LoopAt(unix.Mkdev(loopMajor, uint32(n)))
		if errors.Is(err, fs.ErrNotExist) {
			continue // it went away meanwhile
		}
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(info.tag, prefix) {
			found = append(found, info)
		}
	}
	return found, nil
}

// Clear takes the file from a loop device; while somebody has the device open
// that happens only when they close it.
func (loops) Clear(dev uint64) error {
	f, err := os.OpenFile("/dev/loop"+strconv.Itoa(int(unix.Minor(dev))), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	err = unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0)
	if errors.Is(err, unix.ENXIO) {
		err = nil
	}
	return errors.Join(err, f.Close())
}

// number is a device as tables and sysfs write it.
func number(dev uint64) string { return fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev)) }
