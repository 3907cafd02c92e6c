package qemu

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
)

// load makes a VM that waits for it what was saved. It is frozen then.
func (m *machine) load(ctx context.Context, stream []byte) error {
	file, err := memfd("qemu-load")
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }() // QEMU has its own
	if _, err := io.Copy(file, bytes.NewReader(stream)); err != nil {
		return err
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if err := fault.Point(ctx, "qemu/load"); err != nil {
		return err
	}
	return m.loadFrom(ctx, file)
}

func (m *machine) loadFrom(ctx context.Context, file *os.File) error {
	// A migrated VM tells the switches where it is now; ours is behind a link of
	// its own, and must not speak before it is thawed.
	if err := m.monitor.run(ctx, "migrate-set-parameters", map[string]any{"announce-rounds": 0}, nil); err != nil {
		return err
	}
	if err := m.monitor.runWith(ctx, file, "getfd", map[string]any{"fdname": "saved"}, nil); err != nil {
		return err
	}
	if err := fault.Point(ctx, "qemu/load-from"); err != nil {
		return err
	}
	if err := m.monitor.run(ctx, "migrate-incoming", map[string]any{"uri": "fd:saved"}, nil); err != nil {
		return err
	}
	return m.awaitLoad(ctx)
}

// awaitLoad waits until everything is loaded. QEMU ends when it cannot be.
func (m *machine) awaitLoad(ctx context.Context) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		var load struct {
			Status string `json:"status"`
			Error  string `json:"error-desc"`
		}
		err := m.monitor.run(ctx, "query-migrate", nil, &load)
		switch {
		case err != nil:
			return err
		case load.Status == "completed":
			return m.mustBeFrozen(ctx)
		case load.Status == "failed" || load.Status == "cancelled":
			return fmt.Errorf("it %s: %s", load.Status, load.Error)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
