package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

const (
	trimEvery   = time.Second
	lastEvents  = 2 * time.Second // how long the last events of a dead QEMU are waited for
	scanConsole = 64 << 10        // how much of the console's end is searched for a panic, in bytes
	stateLimit  = 5 * time.Second // for one question to a live QEMU
	timerWatch  = 30 * time.Second
	noTimer     = "APIC frequency too slow, disabling apic timer"
)

// machine is a handle on one QEMU process. Two goroutines belong to it: watch,
// which sees the end, and care, which bounds the logs and looks after a VM that
// QEMU stopped by itself. Release ends both.
type machine struct {
	driver  *Driver
	record  vmm.Record
	held    string // for letGo
	pid     *kernel.PidFD
	monitor *monitor
	console *logFile
	log     *logFile

	logsEnd    int64 // for boundLogs, and so is complained; begin's and then care's
	complained bool

	bootedAt time.Time // by this process; zero for an adopted VM, and for a restored one
	restored bool      // its memory is a mapped file

	stopped chan struct{}      // a token for each time QEMU stopped the VM by itself
	stop    context.CancelFunc // ends the goroutines
	running sync.WaitGroup
	done    chan struct{}
	exit    vmm.Exit // before done is closed: written by watch only

	mu       sync.Mutex // guards what follows
	killed   bool
	fault    string
	retry    bool // fault is one that another start need not have
	shutdown string
	released bool
	ramAt    kernel.Range // where the guest's memory is; empty until it is known
}

// newMachine makes a handle, which keeps the VM from Sweep from here on.
func (d *Driver) newMachine(record vmm.Record, u *undo.Stack) *machine {
	held := d.hold(record.Dir)
	u.PushClose("hold", func() error { d.letGo(held); return nil })
	return &machine{
		driver: d, record: record, held: held, stop: func() {},
		stopped: make(chan struct{}, 1), done: make(chan struct{}),
	}
}

// identify completes the record of a process that was just started.
func (m *machine) identify() (err error) {
	m.record.PID = m.pid.PID()
	if m.record.StartTime, err = kernel.ProcStartTime(m.record.PID); err != nil {
		return err
	}
	m.record.BootID, err = kernel.BootID()
	return err
}

// connect opens the control socket; QEMU greets when the machine is built.
func (m *machine) connect(ctx context.Context, u *undo.Stack) (err error) {
	m.monitor, err = dialMonitor(ctx, filepath.Join(m.record.Dir, socketName), m.note)
	if err != nil {
		return err
	}
	u.PushClose("control connection", m.monitor.Close)
	return nil
}

// begin starts the goroutines; from here on the handle owns everything.
func (m *machine) begin() {
	ctx, stop := context.WithCancel(context.Background()) // their life is the handle's, not a call's
	m.stop = stop
	m.tendLogs()
	m.running.Go(func() { m.watch(ctx) })
	m.running.Go(func() { m.care(ctx) })
}

// note takes events from the monitor's reader.
func (m *machine) note(e event) {
	switch e.Name {
	case "SHUTDOWN":
		var data struct {
			Reason string `json:"reason"`
		}
		if json.Unmarshal(e.Data, &data) != nil {
			return // no reason is no evidence
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		m.shutdown = data.Reason
	case "STOP":
		select {
		case m.stopped <- struct{}{}:
		default: // one token is enough
		}
	}
}

// watch waits for the end of the process and judges it.
func (m *machine) watch(ctx context.Context) {
	if m.pid.Wait(ctx) != nil {
		return // released
	}
	status, err := m.pid.Reap()
	if err != nil {
		status = kernel.Status{} // unknown, which judge says
	}
	select {
	case <-m.monitor.closed: // its last events are read
	case <-time.After(lastEvents):
	case <-ctx.Done():
	}
	m.mu.Lock()
	e := evidence{restored: m.restored, killed: m.killed, fault: m.fault, status: status, shutdown: m.shutdown}
	retry := m.retry && !m.killed
	m.mu.Unlock()
	e.console, e.log = m.console.tail(scanConsole), m.log.tail(4<<10)
	cause, detail := judge(e)
	m.exit = vmm.Exit{Cause: cause, Detail: detail, At: time.Now(), Reset: e.reset(), Retry: retry}
	m.driver.config.Log.Info("vm ended", "sandbox", m.record.ID, "pid", m.record.PID, "cause", cause, "detail", detail)
	close(m.done)
	m.stop() // there is nothing left to care for
}

// care keeps the logs bounded, and ends a VM that QEMU stopped for good.
func (m *machine) care(ctx context.Context) {
	tick := time.NewTicker(trimEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.stopped:
			m.checkStopped(ctx)
		case <-tick.C:
			m.checkTimer()
			m.tendLogs()
		}
	}
}

// checkTimer ends a guest that booted without a timer: it would hang. Under
// emulation the kernel measures its local APIC's timer against the counter for a
// tenth of a second; when the host is so busy that the virtual CPU does not run
// for as long, the measurement is void, and the kernel says so and goes on
// without. Only a young VM is looked at: later the words would be somebody's.
func (m *machine) checkTimer() {
	if m.driver.config.Accelerator != TCG || m.bootedAt.IsZero() || time.Since(m.bootedAt) > timerWatch {
		return
	}
	head, _, err := m.console.read(0, scanConsole)
	if err != nil || !bytes.Contains(head, []byte(noTimer)) {
		return
	}
	m.mu.Lock()
	m.fault, m.retry = "the host was too busy for the guest to measure its timer", true
	m.mu.Unlock()
	_ = m.pid.Signal(syscall.SIGKILL) // fails only when it is gone already
}

// checkStopped ends a VM whose virtual CPUs cannot go on: QEMU would keep the
// process, and the guest would just stand still.
func (m *machine) checkStopped(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, stateLimit)
	defer cancel()
	state, err := m.state(ctx)
	if err != nil || (state != "internal-error" && state != "io-error" && state != "guest-panicked") {
		return
	}
	m.mu.Lock()
	m.fault = "it stopped the VM: " + state
	m.mu.Unlock()
	_ = m.pid.Signal(syscall.SIGKILL) // fails only when it is gone already
}

// state is QEMU's run state.
func (m *machine) state(ctx context.Context) (string, error) {
	var reply struct {
		Status string `json:"status"`
	}
	err := m.monitor.run(ctx, "query-status", nil, &reply)
	return reply.Status, err
}

// Record is what Adopt needs.
func (m *machine) Record() vmm.Record { return m.record }

// Done is closed when the process is gone.
func (m *machine) Done() <-chan struct{} { return m.done }

// Exit says how it ended.
func (m *machine) Exit() vmm.Exit { return m.exit }

// Console reads from the console log; it works after the end too, until Release.
func (m *machine) Console(offset int64, limit int) ([]byte, int64, error) {
	return m.console.read(offset, limit)
}

// Freeze stops the virtual CPUs. QEMU answers when it has drained and flushed
// the disk.
func (m *machine) Freeze(ctx context.Context) error {
	if err := m.monitor.run(ctx, "stop", nil, nil); err != nil {
		return fmt.Errorf("freeze qemu: %w", err)
	}
	return nil
}

// Thaw lets them run on.
func (m *machine) Thaw(ctx context.Context) error {
	if err := m.monitor.run(ctx, "cont", nil, nil); err != nil {
		return fmt.Errorf("thaw qemu: %w", err)
	}
	if err := m.dropSaved(ctx); err != nil {
		m.driver.config.Log.Warn("a thawed vm keeps a descriptor too many", "sandbox", m.record.ID, "err", err)
	}
	return nil
}

// Kill ends the process at once. The disk's overlay stays consistent for
// qemu-img, as after a power cut.
func (m *machine) Kill(ctx context.Context) error {
	m.mu.Lock()
	released := m.released
	m.killed = true
	m.mu.Unlock()
	select {
	case <-m.done:
		return nil
	default:
	}
	if released {
		return errors.New("kill qemu: the handle was released")
	}
	if err := m.pid.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, kernel.ErrGone) {
		return fmt.Errorf("kill qemu: %w", err)
	}
	select {
	case <-m.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("kill qemu: wait for pid %d: %w", m.record.PID, ctx.Err())
	}
}

// Release gives up the handle; a running VM runs on.
func (m *machine) Release() error {
	m.mu.Lock()
	released := m.released
	m.released = true
	m.mu.Unlock()
	if released {
		return nil
	}
	m.stop()
	m.running.Wait()
	m.driver.letGo(m.held)
	return errors.Join(m.monitor.Close(), m.pid.Close(), m.console.Close(), m.log.Close())
}

// destroy ends a process whose Start did not succeed.
func (m *machine) destroy(ctx context.Context) error {
	if err := m.pid.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, kernel.ErrGone) {
		return err
	}
	if err := m.pid.Wait(ctx); err != nil {
		return err
	}
	_, err := m.pid.Reap()
	return errors.Join(err, m.pid.Close())
}
