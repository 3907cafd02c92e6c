package netns

import (
	"os"

	"golang.org/x/sys/unix"
)

const tunDevice = "/dev/net/tun"

// attachTap opens a queue of the TAP called name in the calling thread's
// namespace, and makes the TAP if there is none.
func attachTap(name string) (*os.File, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return nil, err
	}
	// The guest's driver and the VMM agree on a virtio-net header before each
	// frame, which checksum and segmentation offload need.
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: tunDevice, Err: err}
	}
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		_ = unix.Close(fd) // nothing was written
		return nil, os.NewSyscallError("TUNSETIFF "+name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// createTap makes a TAP that outlives the descriptor it was made with.
func createTap(name string) error {
	f, err := attachTap(name)
	if err != nil {
		return err
	}
	conn, err := f.SyscallConn()
	if err == nil {
		var ioctl error
		err = conn.Control(func(fd uintptr) { ioctl = unix.IoctlSetInt(int(fd), unix.TUNSETPERSIST, 1) })
		if err == nil {
			err = os.NewSyscallError("TUNSETPERSIST", ioctl)
		}
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	return err
}
