package kernel

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

const mapperControl = "/dev/mapper/control"

// DeviceMapper says whether device-mapper answers and has these targets. Asking
// for one loads its module. It needs Linux 5.5 (DM_GET_TARGET_VERSION).
func DeviceMapper(targets ...string) error {
	f, err := openNode(mapperControl, "load the module dm_mod")
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // nothing was written
	if err := mapperCall(f, unix.DM_VERSION, ""); err != nil {
		return fmt.Errorf("ask device-mapper for its version: %w", err)
	}
	for _, target := range targets {
		err := mapperCall(f, unix.DM_GET_TARGET_VERSION, target)
		switch {
		case errors.Is(err, unix.ENOTTY):
			return errors.New("device-mapper cannot say which targets it has: that needs Linux 5.5")
		case errors.Is(err, unix.EINVAL):
			return fmt.Errorf("device-mapper has no target %s: load the module dm-%s", target, target)
		case err != nil:
			return fmt.Errorf("ask device-mapper for target %s: %w", target, err)
		}
	}
	return nil
}

// mapperCall makes a call with a name; its answer has room and is not read.
func mapperCall(f *os.File, op uintptr, name string) error {
	var buf struct {
		unix.DmIoctl
		answer [256]byte
	}
	buf.Version = [3]uint32{unix.DM_VERSION_MAJOR, 0, 0}
	buf.Data_size, buf.Data_start = uint32(unsafe.Sizeof(buf)), unix.SizeofDmIoctl
	copy(buf.Name[:len(buf.Name)-1], name)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), op, uintptr(unsafe.Pointer(&buf)))
	runtime.KeepAlive(&buf)
	if errno != 0 {
		return errno
	}
	return nil
}

// Loop says whether there are loop devices. What uses them needs Linux 5.8
// (LOOP_CONFIGURE).
func Loop() error {
	f, err := openNode("/dev/loop-control", "load the module loop")
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // nothing was written
	n, err := unix.IoctlRetInt(int(f.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return fmt.Errorf("find a free loop device: %w", err)
	}
	dev, err := openNode(fmt.Sprintf("/dev/loop%d", n), "mount devtmpfs at /dev")
	if err != nil {
		return err
	}
	defer func() { _ = dev.Close() }() // nothing was written
	// A free device has no status: ENXIO. A kernel without the call says EINVAL
	// before it looks at the descriptor, which here is none (EBADF).
	err = unix.IoctlLoopConfigure(int(dev.Fd()), &unix.LoopConfig{Fd: ^uint32(0)})
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOTTY):
		return errors.New("loop devices cannot be made in one call: that needs Linux 5.8 (LOOP_CONFIGURE)")
	case err == nil, errors.Is(err, unix.EBADF), errors.Is(err, unix.EBUSY): // busy: somebody took it just now
		return nil
	}
	return fmt.Errorf("try a loop device: %w", err)
}
