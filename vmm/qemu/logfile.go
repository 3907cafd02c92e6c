package qemu

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// logFile is an append-only file that another process writes and that keeps its
// newest bytes. What is older is punched out of it, so an offset in the file is
// an offset in the stream, for every process that opens it and for ever; the
// file's apparent size grows, its blocks do not.
//
// The writer needs nobody for writing, but somebody has to call trim: while no
// agent runs, a guest can fill the disk at the speed of its emulated serial port.
type logFile struct {
	file *os.File
	keep int64
}

// createLog makes a new file, for writing by a child and reading by us.
func createLog(dir, name string, keep int64) (*logFile, *os.File, error) {
	path := filepath.Join(dir, name)
	writer, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, nil, err
	}
	log, err := openLog(dir, name, keep)
	if err != nil {
		return nil, nil, errors.Join(err, writer.Close(), os.Remove(path))
	}
	return log, writer, nil
}

func openLog(dir, name string, keep int64) (*logFile, error) {
	file, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	return &logFile{file, keep}, nil
}

// trim frees the blocks of what is no longer kept.
func (l *logFile) trim() error {
	const block = 4096 // only whole blocks are freed; the rest of one would be zeroed
	size, err := l.size()
	if err != nil {
		return err
	}
	old := (size - l.keep) / block * block
	if old <= 0 {
		return nil
	}
	conn, err := l.file.SyscallConn()
	if err != nil {
		return err
	}
	return errors.Join(conn.Control(func(fd uintptr) {
		err = unix.Fallocate(int(fd), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, old)
	}), err)
}

// read follows the contract of vmm.Machine.Console.
func (l *logFile) read(offset int64, limit int) ([]byte, int64, error) {
	size, err := l.size()
	if err != nil {
		return nil, 0, fmt.Errorf("read log: %w", err)
	}
	if offset < 0 {
		offset += size
	}
	offset = min(max(offset, size-l.keep, 0), size)
	data := make([]byte, min(size-offset, int64(max(limit, 0))))
	n, err := l.file.ReadAt(data, offset)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, 0, fmt.Errorf("read log: %w", err)
	}
	return data[:n], offset + int64(n), nil
}

// tail is the last limit bytes; what cannot be read is empty.
func (l *logFile) tail(limit int) string {
	data, _, err := l.read(-int64(limit), limit)
	if err != nil {
		return ""
	}
	return string(data)
}

func (l *logFile) size() (int64, error) {
	info, err := l.file.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (l *logFile) Close() error { return l.file.Close() }
