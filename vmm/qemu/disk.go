package qemu

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
)

// SwitchDisk lays an overlay over the one the VM writes to.
func (m *machine) SwitchDisk(ctx context.Context, path string) error {
	if err := m.switchDisk(ctx, path); err != nil {
		return fmt.Errorf("switch the disk of qemu: %w", err)
	}
	return nil
}

func (m *machine) switchDisk(ctx context.Context, path string) error {
	if err := m.mustBeFrozen(ctx); err != nil {
		return err
	}
	if err := fault.Point(ctx, "qemu/switch-disk"); err != nil {
		return err
	}
	node, err := m.diskNode(ctx)
	if err != nil {
		return err
	}
	return m.monitor.run(ctx, "blockdev-snapshot-sync", map[string]any{
		"node-name": node, "snapshot-file": path, "snapshot-node-name": after(node), "format": "qcow2", "mode": "existing",
	}, nil)
}

// diskNode is the name of the overlay that the VM writes to: rootNode, or what it
// was switched to.
func (m *machine) diskNode(ctx context.Context) (string, error) {
	var devices []struct {
		Inserted *struct {
			Node string `json:"node-name"`
		} `json:"inserted"`
	}
	if err := m.monitor.run(ctx, "query-block", nil, &devices); err != nil {
		return "", err
	}
	for _, d := range devices {
		if d.Inserted != nil && strings.HasPrefix(d.Inserted.Node, rootNode) {
			return d.Inserted.Node, nil
		}
	}
	return "", errors.New("it has no disk")
}

// after names the next overlay: root, root-1, root-2.
func after(node string) string {
	n, _ := strconv.Atoi(strings.TrimPrefix(node, rootNode+"-")) // 0 for the first
	return rootNode + "-" + strconv.Itoa(n+1)
}
