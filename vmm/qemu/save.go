package qemu

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
)

// maxStream bounds the state of the devices, which comes from a process that may
// be in the guest's hands. It is a few kilobytes.
const maxStream = 16 << 20

// saveTag marks the descriptors that QEMU was given to save to.
const saveTag = "dormouse-save"

// Save lets QEMU write the state of its devices to a piece of memory that it gets
// as a descriptor: it may open nothing by name where we could read it, and start
// no program.
//
// The command is one that was made for Xen; it saves neither RAM nor disks, under
// any accelerator. "live" is false because it would else give the disks away, as
// to the other end of a migration.
func (m *machine) Save(ctx context.Context) ([]byte, error) {
	if err := m.driver.canSave(); err != nil {
		return nil, fmt.Errorf("save qemu: %w", err)
	}
	devices, err := m.save(ctx)
	if err != nil {
		return nil, fmt.Errorf("save qemu: %w", err)
	}
	return devices, nil
}

func (m *machine) save(ctx context.Context) ([]byte, error) {
	if err := m.mustBeFrozen(ctx); err != nil {
		return nil, err
	}
	if err := fault.Point(ctx, "qemu/save"); err != nil {
		return nil, err
	}
	s, err := m.shapeNow(ctx)
	if err != nil {
		return nil, err
	}
	file, err := memfd("qemu-save")
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }() // its bytes are read
	if err := m.saveTo(ctx, file); err != nil {
		return nil, err
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	stream, err := io.ReadAll(io.LimitReader(file, maxStream+1))
	if err != nil {
		return nil, err
	}
	if len(stream) == 0 || len(stream) > maxStream {
		return nil, fmt.Errorf("the state of the devices has %d bytes, which cannot be", len(stream))
	}
	return wrap(s, stream)
}

// saveTo gives QEMU a descriptor and lets it write there.
func (m *machine) saveTo(ctx context.Context, file *os.File) error {
	writer, err := os.OpenFile(selfFD(int(file.Fd())), os.O_WRONLY, 0) // QEMU looks for one with just that right
	if err != nil {
		return err
	}
	defer func() { _ = writer.Close() }() // QEMU has its own
	var added struct {
		Set int `json:"fdset-id"`
	}
	if err := m.monitor.runWith(ctx, writer, "add-fd", map[string]any{"opaque": saveTag}, &added); err != nil {
		return err
	}
	if err := fault.Point(ctx, "qemu/save-to"); err != nil {
		return err
	}
	return m.monitor.run(ctx, "xen-save-devices-state", map[string]any{
		"filename": "/dev/fdset/" + strconv.Itoa(added.Set), "live": false,
	}, nil)
}

// dropSaved takes the descriptors back that QEMU was given to save to. It closes
// them only while the VM runs.
func (m *machine) dropSaved(ctx context.Context) error {
	var sets []struct {
		ID  int `json:"fdset-id"`
		FDs []struct {
			Opaque string `json:"opaque"`
		} `json:"fds"`
	}
	if err := m.monitor.run(ctx, "query-fdsets", nil, &sets); err != nil {
		return err
	}
	for _, s := range sets {
		if len(s.FDs) == 0 || s.FDs[0].Opaque != saveTag {
			continue
		}
		if err := m.monitor.run(ctx, "remove-fd", map[string]any{"fdset-id": s.ID}, nil); err != nil {
			return err
		}
	}
	return nil
}

func memfd(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a memory file: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}
