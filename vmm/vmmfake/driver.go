// Package vmmfake is a vmm.Driver without virtual machines, for tests of what
// stands above the seam. Its guests are goroutines of the test.
//
// It keeps the promises of the seam (vmmtest runs over it too): machines live
// in the Driver, not in whoever holds a handle, so a test "restarts the agent"
// by dropping every handle and calling Adopt on the same Driver. What breaks,
// and when, the test decides with FailStarts, Crash and PowerOff.
//
// A guest's memory is real bytes (Memory), and a save and a restore carry them
// truly. Its goroutine cannot be carried: a restored machine runs Guest anew,
// from its first Thaw on, with Inside.Restored set, and what the guest wants to
// know of its past it keeps in memory.
package vmmfake

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// Name is what the fake calls itself in its records.
const Name = "fake"

// firstPID is above every PID that Linux gives out (PID_MAX_LIMIT is 1<<22):
// nothing real can be signalled by mistake.
const firstPID = 1<<22 + 1

// Driver is a fake machine room. The zero value is not ready; use New.
type Driver struct {
	guest  Guest
	bootID string

	mu        sync.Mutex
	machines  map[int]*vm       // by PID, running ones only
	held      map[*machine]bool // handles that were not released
	nextPID   int
	failStart []error
	starts    int
	version   string
}

// Guest is what a fake machine runs. It returns when ctx ends (the machine was
// killed) or when the guest ends itself: nil is a power-off, an error a kernel
// panic with that message, ErrOutOfMemory a guest that ran out of memory. What
// it writes to console is the console log. It listens for the host with
// listen; nobody has to.
type Guest func(ctx context.Context, m Inside) error

// Inside is what a guest sees of its machine.
type Inside struct {
	Spec    vmm.Spec
	Console interface{ Write([]byte) (int, error) }
	// Listener accepts what Driver.Dial opens. It is closed when the machine ends.
	Listener net.Listener
	// Memory is the guest's RAM.
	Memory *Memory
	// Restored says that the machine was not booted: its memory is of another one.
	Restored bool

	vm   *vm
	pass func(done <-chan struct{}) // returns when the machine is not frozen
}

// Disk is the path of what the guest writes its disk to now.
func (m Inside) Disk() string { return m.vm.diskPath() }

// ErrOutOfMemory is returned by a Guest that dies for want of memory.
var ErrOutOfMemory = errors.New("kernel panic: system is deadlocked on memory")

// Idle is a guest that boots and does nothing. Nobody listens: a dialler is
// accepted by the kernel's backlog and never answered, as by a hung boot.
func Idle(ctx context.Context, m Inside) error {
	_, _ = fmt.Fprintln(m.Console, "fake: booted") // the console never fails
	<-ctx.Done()
	return nil
}

// New makes an empty machine room whose machines run guest; nil is Idle.
func New(guest Guest) *Driver {
	if guest == nil {
		guest = Idle
	}
	return &Driver{guest: guest, bootID: "fake-boot", machines: map[int]*vm{}, held: map[*machine]bool{}, nextPID: firstPID, version: "0"}
}

// Capabilities changes with Upgrade only.
func (d *Driver) Capabilities() vmm.Capabilities {
	d.mu.Lock()
	defer d.mu.Unlock()
	return vmm.Capabilities{
		Driver: Name, Version: d.version, Accelerator: "none", Reason: "the fake emulates nothing", Compat: Name + " " + d.version,
	}
}

// Upgrade makes the driver one of another version, which restores nothing that
// was saved before. Machines run on.
func (d *Driver) Upgrade(version string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.version = version
}

// FailStarts makes the next starts return these errors, one each.
func (d *Driver) FailStarts(errs ...error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.failStart = append(d.failStart, errs...)
}

// Starts counts the machines that were started since New.
func (d *Driver) Starts() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.starts
}

// Running lists the sandboxes whose machines run.
func (d *Driver) Running() []sandbox.ID {
	d.mu.Lock()
	defer d.mu.Unlock()
	var ids []sandbox.ID
	for _, v := range d.machines {
		ids = append(ids, v.spec.ID)
	}
	return ids
}

// Reboot ends every machine without a word and changes the boot ID, as a
// restart of the whole host does.
func (d *Driver) Reboot(bootID string) {
	for _, v := range d.all() {
		v.end(vmm.Exit{Cause: sandbox.CauseVMMCrash, Detail: "fake: the host went down"})
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.bootID = bootID
}

// Crash ends a machine as the sudden death of its process does.
func (d *Driver) Crash(id sandbox.ID) error {
	return d.endOne(id, vmm.Exit{Cause: sandbox.CauseVMMCrash, Detail: "fake: killed by signal SIGKILL"})
}

// FailBoot ends a machine as one does whose boot may be tried again.
func (d *Driver) FailBoot(id sandbox.ID) error {
	return d.endOne(id, vmm.Exit{Cause: sandbox.CauseVMMCrash, Detail: "fake: the boot went wrong", Retry: true})
}

// PowerOff ends a machine as its guest's power-off does.
func (d *Driver) PowerOff(id sandbox.ID) error {
	return d.endOne(id, vmm.Exit{Cause: sandbox.CauseGuestExit, Detail: "fake: the guest powered off"})
}

// Reset ends a machine as its guest's reboot does.
func (d *Driver) Reset(id sandbox.ID) error {
	return d.endOne(id, vmm.Exit{Cause: sandbox.CauseGuestExit, Detail: "fake: the guest rebooted", Reset: true})
}

// FailMemory ends a machine as one whose memory could not be served.
func (d *Driver) FailMemory(id sandbox.ID) error {
	return d.endOne(id, vmm.Exit{Cause: sandbox.CausePagerFault, Detail: "fake: its memory could not be read"})
}

// Memory is the RAM of a running machine, for a test that plays the guest: it
// waits like the guest while the machine is frozen.
func (d *Driver) Memory(id sandbox.ID) (*Memory, error) {
	v, err := d.byID(id)
	if err != nil {
		return nil, err
	}
	return v.memory, nil
}

// Disk is the path that a machine writes its disk to now.
func (d *Driver) Disk(id sandbox.ID) (string, error) {
	v, err := d.byID(id)
	if err != nil {
		return "", err
	}
	return v.diskPath(), nil
}

func (d *Driver) endOne(id sandbox.ID, exit vmm.Exit) error {
	v, err := d.byID(id)
	if err != nil {
		return err
	}
	v.end(exit)
	return nil
}

// Dial opens a connection to the guest's Listener.
func (d *Driver) Dial(ctx context.Context, id sandbox.ID) (net.Conn, error) {
	v, err := d.byID(id)
	if err != nil {
		return nil, err
	}
	var dialer net.Dialer
	return dialer.DialContext(ctx, "tcp", v.listener.Addr().String())
}

func (d *Driver) byID(id sandbox.ID) (*vm, error) {
	for _, v := range d.all() {
		if v.spec.ID == id {
			return v, nil
		}
	}
	return nil, sandbox.Errorf(sandbox.KindNotFound, "fake: no machine of %s runs", id)
}

func (d *Driver) all() []*vm {
	d.mu.Lock()
	defer d.mu.Unlock()
	var vms []*vm
	for _, v := range d.machines {
		vms = append(vms, v)
	}
	return vms
}

// Start boots or restores a guest. It asks for the same things of its Spec as a
// real driver.
func (d *Driver) Start(ctx context.Context, spec vmm.Spec) (_ vmm.Machine, err error) {
	if err := errors.Join(ctx.Err(), fault.Point(ctx, "vmmfake/start")); err != nil {
		return nil, fmt.Errorf("start fake VM: %w", err)
	}
	if err := errors.Join(check(spec), d.checkRestore(spec)); err != nil {
		return nil, err
	}
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run(ctx))
		}
	}()
	listener, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, fmt.Errorf("start fake VM: listen for the guest: %w", err)
	}
	u.PushClose("listener", listener.Close)
	life, stop := context.WithCancel(context.WithoutCancel(ctx)) // a VM outlives the call that made it
	u.PushClose("life", func() error { stop(); return nil })
	v := newVM(d, spec, &port{TCPListener: listener}, stop)
	if err := v.plugMemory(spec.Restore); err != nil {
		return nil, fmt.Errorf("start fake VM: %w", err)
	}
	u.PushClose("memory", v.memory.close)
	if err := d.register(v); err != nil {
		return nil, err
	}
	go v.run(life, d.guest)
	return d.hold(v), nil
}

// register gives a machine its identity.
func (d *Driver) register(v *vm) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.failStart) > 0 {
		err := d.failStart[0]
		d.failStart = d.failStart[1:]
		return fmt.Errorf("start fake VM: %w", err)
	}
	pid := d.nextPID
	d.nextPID++
	d.starts++
	v.record = vmm.Record{
		ID: v.spec.ID, Driver: Name, PID: pid, StartTime: uint64(pid), BootID: d.bootID, Dir: v.spec.Dir,
	}
	d.machines[pid] = v
	return nil
}

func (d *Driver) forget(pid int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.machines, pid)
}

// Adopt finds a machine that runs.
func (d *Driver) Adopt(ctx context.Context, record vmm.Record) (vmm.Machine, error) {
	if err := errors.Join(ctx.Err(), fault.Point(ctx, "vmmfake/adopt")); err != nil {
		return nil, fmt.Errorf("adopt fake VM: %w", err)
	}
	d.mu.Lock()
	v := d.machines[record.PID]
	d.mu.Unlock()
	if v == nil || v.record != record {
		return nil, sandbox.Errorf(sandbox.KindNotFound, "adopt fake VM of %s: pid %d is gone", record.ID, record.PID)
	}
	return d.hold(v), nil
}

// hold makes a handle, which keeps its machine from Sweep until its Release.
func (d *Driver) hold(v *vm) *machine {
	d.mu.Lock()
	defer d.mu.Unlock()
	m := &machine{vm: v}
	d.held[m] = true
	return m
}

// Forget drops all handles without releasing them, as the death of an agent does.
func (d *Driver) Forget() {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.held)
}

// Sweep ends the machines below root that nobody holds.
func (d *Driver) Sweep(ctx context.Context, root string) error {
	if err := errors.Join(ctx.Err(), fault.Point(ctx, "vmmfake/sweep")); err != nil {
		return fmt.Errorf("sweep fake VMs: %w", err)
	}
	d.mu.Lock()
	var held []*vm
	for m := range d.held {
		held = append(held, m.vm)
	}
	d.mu.Unlock()
	for _, v := range d.all() {
		rel, err := filepath.Rel(root, v.spec.Dir)
		if err == nil && filepath.IsLocal(rel) && !slices.Contains(held, v) {
			v.end(vmm.Exit{Cause: sandbox.CauseVMMCrash, Detail: "fake: swept"})
		}
	}
	return nil
}

// check looks at what a VMM opens. An empty path is allowed: tests of the host
// need no kernel.
func check(spec vmm.Spec) error {
	for _, f := range []struct{ what, path string }{
		{"kernel", spec.Kernel}, {"initrd", spec.Initrd}, {"disk", spec.DiskPath}, {"directory", spec.Dir},
	} {
		if f.path == "" {
			continue
		}
		if _, err := os.Stat(filepath.Clean(f.path)); err != nil {
			return fmt.Errorf("start fake VM: open %s: %w", f.what, err)
		}
	}
	return nil
}
