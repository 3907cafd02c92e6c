package qemu

import (
	"context"
	"errors"
	"fmt"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// Adopt takes a running VM over. Only a process with the record's PID, start
// time and boot ID is touched; anything else counts as gone, which is a
// not_found error that tells what the console says about the end, if anything.
// A VM that runs but does not answer in time is a transient error, and runs on.
func (d *Driver) Adopt(ctx context.Context, record vmm.Record) (_ vmm.Machine, err error) {
	ctx, cancel := context.WithTimeout(ctx, d.config.StartLimit)
	defer cancel()
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run(ctx))
		}
	}()
	m := d.newMachine(record, &u)
	if err := m.find(&u); err != nil {
		return nil, err
	}
	if err := m.reopen(ctx, &u); err != nil {
		if m.pid.Exited() {
			return nil, gone(record, kernel.ErrGone) // it ended while we looked
		}
		return nil, sandbox.Errorf(sandbox.KindTransient, "adopt qemu, pid %d: %w", record.PID, err)
	}
	m.begin()
	d.config.Log.Info("vm adopted", "sandbox", record.ID, "pid", record.PID)
	return m, nil
}

// find opens the process of the record.
func (m *machine) find(u *undo.Stack) error {
	if m.record.Driver != Name {
		return sandbox.Errorf(sandbox.KindInvalid, "adopt qemu: the record is one of driver %q", m.record.Driver)
	}
	bootID, err := kernel.BootID()
	if err != nil {
		return fmt.Errorf("adopt qemu: %w", err)
	}
	if bootID != m.record.BootID {
		return gone(m.record, errors.New("the machine was restarted since"))
	}
	m.pid, err = kernel.OpenProcess(m.record.PID, m.record.StartTime)
	if errors.Is(err, kernel.ErrGone) {
		return gone(m.record, err)
	}
	if err != nil {
		return fmt.Errorf("adopt qemu: %w", err)
	}
	u.PushClose("pidfd", m.pid.Close)
	return nil
}

// reopen takes up the logs and the control socket, and asks whether QEMU lives.
func (m *machine) reopen(ctx context.Context, u *undo.Stack) (err error) {
	if m.console, err = openLog(m.record.Dir, consoleName, m.driver.config.ConsoleLimit); err != nil {
		return fmt.Errorf("open console log: %w", err)
	}
	u.PushClose("console log", m.console.Close)
	if m.log, err = openLog(m.record.Dir, logName, keepLog); err != nil {
		return fmt.Errorf("open qemu's log: %w", err)
	}
	u.PushClose("qemu's log", m.log.Close)
	if err := m.connect(ctx, u); err != nil {
		return err
	}
	state, err := m.state(ctx)
	if err != nil {
		return err
	}
	if state != "running" {
		m.stopped <- struct{}{} // it may have stopped while nobody listened
	}
	m.restored, err = m.hasMappedMemory(ctx)
	return err
}

// hasMappedMemory asks QEMU whether its memory is a file, as that of a restored
// guest is.
func (m *machine) hasMappedMemory(ctx context.Context) (bool, error) {
	var objects []struct {
		Name string `json:"name"`
		Type string `json:"type"`
	}
	if err := m.monitor.run(ctx, "qom-list", map[string]any{"path": "/objects"}, &objects); err != nil {
		return false, err
	}
	for _, o := range objects {
		if o.Name == "mem" {
			return o.Type == "child<memory-backend-file>", nil
		}
	}
	return false, nil
}

// gone is the error for a VM that runs no more, with its last words.
func gone(record vmm.Record, why error) error {
	err := fmt.Errorf("adopt qemu: %w", why)
	if console, openErr := openLog(record.Dir, consoleName, defaultConsole); openErr == nil {
		if line := panicLine(console.tail(scanConsole)); line != "" {
			err = fmt.Errorf("%w; its console ends with a kernel panic: %s", err, line)
		}
		_ = console.Close() // read only
	}
	return sandbox.WithKind(sandbox.KindNotFound, err)
}
