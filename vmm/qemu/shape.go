package qemu

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// layout counts the changes of our own command line that a saved VM notices: the
// machine type's options, the devices and their order.
const layout = 2

// compat is everything that a saved VM needs to find again. The microvm machine
// has no versions, so QEMU's is one. Under KVM a guest sees the host's processor;
// where that cannot be told, nothing is saved.
func (d *Driver) compat() string {
	cpu := "max"
	if d.config.Accelerator == KVM {
		if cpu = d.cpu; cpu == "" {
			return ""
		}
	}
	return fmt.Sprintf("qemu %s, %s, %s, layout %d", d.version, d.config.Accelerator, cpu, layout)
}

// canSave refuses where a saved VM would not be known again.
func (d *Driver) canSave() error {
	if d.compat() == "" {
		return sandbox.Errorf(sandbox.KindUnsupported, "VMs under KVM can be saved only where /proc/cpuinfo tells the processor")
	}
	return nil
}

// magic begins what Save gives: it, one line of JSON (shape), then QEMU's own
// stream in gzip. The stream has 44 kB for every virtio device, nearly all of them
// zero.
const magic = "dormouse: state of a qemu 1\n"

// shape is what QEMU would not check, or only in words of its own.
type shape struct {
	VCPUs  int  `json:"vcpus"`
	MemMiB int  `json:"mem_mib"`
	Disk   bool `json:"disk"`
	Net    bool `json:"net"`
	TSCkHz int  `json:"tsc_khz,omitempty"` // what the guest keeps time by, under emulation
}

func (d *Driver) shapeOf(spec vmm.Spec) shape {
	return shape{VCPUs: spec.VCPUs, MemMiB: spec.MemMiB, Disk: spec.DiskPath != "", Net: spec.Tap != nil, TSCkHz: d.tscKHz}
}

func (s shape) String() string {
	has := map[bool]string{true: "a", false: "no"}
	return fmt.Sprintf("%d vCPUs, %d MiB, %s disk and %s network", s.VCPUs, s.MemMiB, has[s.Disk], has[s.Net])
}

// wrap puts the shape before QEMU's stream.
func wrap(s shape, stream []byte) ([]byte, error) {
	line, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	fmt.Fprintf(&out, "%s%s\n", magic, line)
	w, err := gzip.NewWriterLevel(&out, gzip.BestSpeed) // the guest stands still meanwhile
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(stream); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

func unwrap(devices []byte) (shape, []byte, error) {
	var s shape
	rest, ok := bytes.CutPrefix(devices, []byte(magic))
	if !ok {
		return s, nil, sandbox.Errorf(sandbox.KindInvalid, "the state of the devices does not begin as one of qemu does")
	}
	line, stream, ok := bytes.Cut(rest, []byte("\n"))
	if !ok {
		return s, nil, sandbox.Errorf(sandbox.KindInvalid, "the state of the devices ends too early")
	}
	if err := json.Unmarshal(line, &s); err != nil {
		return s, nil, sandbox.Errorf(sandbox.KindInvalid, "read the state of the devices: %w", err)
	}
	unpacked, err := unpack(stream)
	if err != nil {
		return s, nil, sandbox.Errorf(sandbox.KindInvalid, "read the state of the devices: %w", err)
	}
	return s, unpacked, nil
}

// unpack reads gzip to its end, where its checksum is.
func unpack(packed []byte) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, err
	}
	stream, err := io.ReadAll(io.LimitReader(r, maxStream+1))
	if err == nil && len(stream) > maxStream {
		err = fmt.Errorf("there are more than %d bytes", maxStream)
	}
	return stream, err
}

// checkRestore refuses what was not saved from such a machine, and returns QEMU's
// stream.
func (d *Driver) checkRestore(spec vmm.Spec) ([]byte, error) {
	from := spec.Restore
	if from == nil {
		return nil, nil
	}
	if mine := d.compat(); from.Compat != mine {
		return nil, sandbox.Errorf(sandbox.KindConflict, "start qemu: the VM was saved by %q, this is %q", from.Compat, mine)
	}
	saved, stream, err := unwrap(from.Devices)
	if err != nil {
		return nil, fmt.Errorf("start qemu: %w", err)
	}
	if err := sameClock(saved.TSCkHz, d.tscKHz); err != nil {
		return nil, err
	}
	want := d.shapeOf(spec)
	saved.TSCkHz = want.TSCkHz
	if saved != want {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "start qemu: the VM was saved with %s, not with %s", saved, want)
	}
	return stream, checkMemory(spec)
}

func checkMemory(spec vmm.Spec) error {
	if spec.Restore.Memory == nil {
		return sandbox.Errorf(sandbox.KindInvalid, "start qemu: there is no memory to restore")
	}
	info, err := spec.Restore.Memory.Stat()
	if err != nil {
		return fmt.Errorf("start qemu: open memory: %w", err)
	}
	if want := int64(spec.MemMiB) << 20; info.Size() != want {
		return sandbox.Errorf(sandbox.KindInvalid, "start qemu: the saved memory has %d bytes, not %d", info.Size(), want)
	}
	return nil
}

// sameClock: an emulated guest keeps time by the host's counter at the frequency
// it was told when it booted, and would gain or lose on another machine. Two
// measurements on one machine differ by less than a thousandth.
func sameClock(saved, here int) error {
	if diff := saved - here; diff > here/500 || -diff > here/500 {
		return sandbox.Errorf(sandbox.KindConflict,
			"start qemu: the VM was saved on a machine whose counter runs at %d kHz, here it is %d kHz", saved, here)
	}
	return nil
}

// shapeNow asks a running QEMU, for whoever saves a VM need not have started it.
func (m *machine) shapeNow(ctx context.Context) (shape, error) {
	var cpus, blocks []json.RawMessage
	var memory struct {
		Base int64 `json:"base-memory"`
	}
	var nics []json.RawMessage
	for _, q := range []struct {
		command string
		to      any
	}{
		{"query-cpus-fast", &cpus},
		{"query-memory-size-summary", &memory},
		{"query-block", &blocks},
		{"query-rx-filter", &nics},
	} {
		if err := m.monitor.run(ctx, q.command, nil, q.to); err != nil {
			return shape{}, err
		}
	}
	return shape{
		VCPUs: len(cpus), MemMiB: int(memory.Base >> 20), Disk: len(blocks) > 0, Net: len(nics) > 0, TSCkHz: m.driver.tscKHz,
	}, nil
}
