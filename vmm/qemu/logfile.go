package qemu

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
)

// logFile is an append-only file that another process writes and that keeps its
// newest bytes. What is older is punched out of it, so an offset in the file is
// an offset in the stream (plus base), for every process that opens it and for
// ever; the file's apparent size grows, its blocks do not.
//
// The writer needs nobody for writing. Somebody has to call trim, and to let the
// writer write on (see limit.go); while nobody does, what it writes is dropped.
type logFile struct {
	file *os.File
	keep int64
	base int64 // where in the file the stream begins; 0 in logs of earlier versions
}

// createLog makes a new file, for writing by a child and reading by us.
func createLog(dir, name string, keep int64) (*logFile, *os.File, error) {
	path := filepath.Join(dir, name)
	writer, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, nil, err
	}
	err = writer.Truncate(logBase)
	var log *logFile
	if err == nil {
		log, err = openLog(dir, name, keep)
	}
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
	log := &logFile{file: file, keep: keep}
	end, err := log.end()
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	if end >= logBase {
		log.base = logBase
	}
	return log, nil
}

// trim frees the blocks of what is no longer kept.
func (l *logFile) trim() error {
	const block = 4096 // only whole blocks are freed; the rest of one would be zeroed
	end, err := l.end()
	if err != nil {
		return err
	}
	old := (end - l.keep) / block * block
	if old <= l.base {
		return nil
	}
	return kernel.WithFD(l.file, func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, old)
	})
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
	n, err := l.file.ReadAt(data, l.base+offset)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, 0, fmt.Errorf("read log: %w", err)
	}
	return data[:n], offset + int64(n), nil
}

// tail is the last limit bytes; what cannot be read is empty. A log that was
// brought forward has zeros where nothing was written.
func (l *logFile) tail(limit int) string {
	data, _, err := l.read(-int64(limit), limit)
	if err != nil {
		return ""
	}
	return strings.ReplaceAll(string(data), "\x00", "")
}

// size is how much was ever written.
func (l *logFile) size() (int64, error) {
	end, err := l.end()
	return end - l.base, err
}

// end is the file's apparent size.
func (l *logFile) end() (int64, error) {
	info, err := l.file.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// bringForward makes the file end at this offset, if it ends before it. It never
// cuts off what is written at the same time.
func (l *logFile) bringForward(end int64) error {
	have, err := l.end()
	if err != nil || have >= end {
		return err
	}
	return kernel.WithFD(l.file, func(fd int) error { return unix.Fallocate(fd, 0, end-1, 1) })
}

func (l *logFile) Close() error { return l.file.Close() }
