package fuse

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Mount mounts a file system that has nobody serving it yet, at an existing
// folder, and does the introductions. Who is to serve it gets a duplicate of the
// descriptor; the caller keeps its own, so that the connection survives whoever
// serves. It needs root.
func Mount(dir string) (_ *os.File, err error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/fuse: %w", err)
	}
	dev := os.NewFile(uintptr(fd), "/dev/fuse")
	defer func() {
		if err != nil {
			err = errors.Join(err, dev.Close())
		}
	}()
	options := fmt.Sprintf("fd=%d,rootmode=40555,user_id=0,group_id=0,allow_other", fd)
	if err := unix.Mount("dormouse", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_NOATIME, options); err != nil {
		return nil, fmt.Errorf("mount fuse at %s: %w", dir, err)
	}
	if err := introduce(fd); err != nil {
		return nil, errors.Join(fmt.Errorf("mount fuse at %s: %w", dir, err), unix.Unmount(dir, unix.MNT_DETACH))
	}
	return dev, nil
}

// Unmount takes the file system away, also while files in it are open. What is
// not mounted is success.
func Unmount(dir string) error {
	err := unix.Unmount(dir, unix.MNT_DETACH)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

// introduce answers INIT, which the kernel has sent with the mount.
func introduce(fd int) error {
	buf := make([]byte, slotBytes)
	n, err := read(fd, buf)
	if err != nil {
		return fmt.Errorf("read INIT: %w", err)
	}
	r, err := parseRequest(buf[:n])
	if err != nil {
		return err
	}
	minor, readahead, flags, err := parseInit(r)
	if err != nil {
		return err
	}
	return answer(fd, r.unique, 0, initOut(minor, readahead, flags))
}

// read reads one request. What was interrupted, or is gone again, is tried anew.
func read(fd int, buf []byte) (int, error) {
	for {
		n, err := unix.Read(fd, buf)
		if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EAGAIN) {
			return n, err
		}
	}
}

// answer writes one answer. A request that nobody waits for any more is fine.
func answer(fd int, unique uint64, errno unix.Errno, body []byte) error {
	var head [outHeadBytes]byte
	if errno != 0 {
		body = nil
	}
	putHead(head[:], unique, outHeadBytes+len(body), errno)
	parts := [][]byte{head[:]}
	if len(body) > 0 {
		parts = append(parts, body)
	}
	for {
		_, err := unix.Writev(fd, parts)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case errors.Is(err, unix.ENOENT): // interrupted, or answered by the server before us
			return nil
		case err != nil:
			return fmt.Errorf("answer: %w", err)
		}
		return nil
	}
}
