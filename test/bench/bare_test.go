package bench_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/disk/qcow"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/netns"
	"github.com/dormouse-sandbox/dormouse/test/rig"
)

// bareVM starts QEMU without any of us: the command line of a sandbox's VM, on
// a disk and a TAP of its own. No supervision, no journal, no confinement by
// another user or namespace; the kernel, the initramfs, the image and every
// flag that the guest notices are the same.
//
// One that goes on from a warm snapshot has the same memory, from the same page
// server, and the same state of its devices.
type bareVM struct {
	argv  []string
	state string // the file that the state of the devices is in; empty: it boots
	disk  disk.Config
	slot  *netns.Slot
}

// newBareVM reads the command line of the only VM that runs. network is there for
// all of a benchmark's bare VMs, of which one runs at a time.
func newBareVM(b *testing.B, s *rig.Server, slot *netns.Slot) *bareVM {
	b.Helper()
	pids := s.VMs()
	if len(pids) != 1 {
		b.Fatalf("VMs are %v, want one", pids)
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pids[0]))
	if err != nil {
		b.Fatal(err)
	}
	vm := &bareVM{slot: slot}
	argv := strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
	for i := 0; i < len(argv); i++ {
		switch option := argv[i]; {
		case slices.Contains([]string{"-mon", "-add-fd", "-blockdev"}, option):
			i++ // no control socket, no set of descriptors; the disk follows below
		case option == "-chardev":
			i++
			if strings.Contains(argv[i], "id=console") {
				vm.argv = append(vm.argv, option, "stdio,id=console,signal=off")
			}
		case option == "-kernel", option == "-initrd":
			i++
			vm.argv = append(vm.argv, option, opened(b, pids[0], argv[i]))
		case option == "-incoming":
			i++
			vm.state = deviceState(b, filepath.Join(s.Data, "snapshots"))
			vm.argv = append(vm.argv, option, "fd:4")
		case option == "-S": // it runs as soon as it can
		case option == "-object" && strings.Contains(argv[i+1], "mem-path="):
			i++
			object, path, _ := strings.Cut(argv[i], "mem-path=")
			vm.argv = append(vm.argv, option, object+"mem-path="+opened(b, pids[0], path))
		case option == "-netdev":
			i++
			vm.argv = append(vm.argv, option, "tap,id=net0,fd=3,vhost=off")
		default:
			vm.argv = append(vm.argv, option)
		}
	}
	vm.prepare(b, argv)
	return vm
}

// deviceState unwraps what a warm snapshot keeps of a VM's devices. There is one.
func deviceState(b *testing.B, store string) string {
	b.Helper()
	const magic = "dormouse: state of a qemu "
	objects, err := filepath.Glob(filepath.Join(store, "objects", "*"))
	if err != nil {
		b.Fatal(err)
	}
	for _, path := range objects {
		data, err := os.ReadFile(path)
		if err != nil || !bytes.HasPrefix(data, []byte(magic)) {
			continue // a console, or gone again
		}
		parts := bytes.SplitN(data, []byte("\n"), 3) // the magic, the shape, QEMU's own in gzip
		stream, err := gzip.NewReader(bytes.NewReader(parts[2]))
		if err != nil {
			b.Fatal(err)
		}
		state, err := io.ReadAll(stream)
		if err != nil {
			b.Fatal(err)
		}
		file := filepath.Join(b.TempDir(), "devices")
		if err := os.WriteFile(file, state, 0o600); err != nil {
			b.Fatal(err)
		}
		return file
	}
	b.Fatalf("no state of devices in %s", store)
	return ""
}

// opened is the file behind a descriptor of a process.
func opened(b *testing.B, pid int, path string) string {
	b.Helper()
	name, err := os.Readlink(strings.Replace(path, "/self/", "/"+strconv.Itoa(pid)+"/", 1))
	if err != nil {
		b.Fatal(err)
	}
	return name
}

// prepare finds what the disk is made from.
func (vm *bareVM) prepare(b *testing.B, argv []string) {
	b.Helper()
	var node struct {
		File struct{ Filename string }
	}
	at := slices.Index(argv, "-blockdev")
	if at < 0 || json.Unmarshal([]byte(argv[at+1]), &node) != nil {
		b.Fatalf("%q has no disk", argv)
	}
	out, err := exec.Command("qemu-img", "info", "-U", "--output=json", node.File.Filename).Output()
	if err != nil {
		b.Fatal(err)
	}
	var info struct {
		Size int64  `json:"virtual-size"`
		Base string `json:"full-backing-filename"`
	}
	if err := json.Unmarshal(out, &info); err != nil || info.Base == "" {
		b.Fatalf("%s: %v", out, err)
	}
	vm.disk = disk.Config{Base: info.Base, SizeBytes: info.Size}
}

// newSlot makes the TAP of bare VMs.
func newSlot(b *testing.B) *netns.Slot {
	b.Helper()
	ctx := context.Background()
	cfg := netns.Config{Instance: "bench"}
	network, err := netns.Open(ctx, cfg)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := network.Close(); err != nil {
			b.Error(err)
		}
		if err := netns.Remove(ctx, cfg); err != nil {
			b.Error(err)
		}
	})
	slot, err := network.Acquire(ctx)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := slot.Close(ctx); err != nil {
			b.Error(err)
		}
	})
	return slot
}

// run starts the VM on a fresh disk, and times the first byte on its console, if it
// boots, and the guest agent's first answer, in milliseconds.
func (vm *bareVM) run(b *testing.B) (console, agent float64) {
	b.Helper()
	disks, err := qcow.New(qcow.Config{})
	if err != nil {
		b.Fatal(err)
	}
	config := vm.disk
	config.Dir = filepath.Join(b.TempDir(), strconv.FormatInt(time.Now().UnixNano(), 36))
	if err := os.Mkdir(config.Dir, 0o700); err != nil {
		b.Fatal(err)
	}
	d, err := disks.Create(b.Context(), config)
	if err != nil {
		b.Fatal(err)
	}
	node, err := json.Marshal(map[string]any{
		"driver": "qcow2", "node-name": "root", "discard": "unmap",
		"file": map[string]any{"driver": "file", "filename": d.Path(), "discard": "unmap"},
	})
	if err != nil {
		b.Fatal(err)
	}
	tap, err := vm.slot.OpenTap()
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = tap.Close() }() // QEMU has its own

	ctx, cancel := context.WithTimeout(b.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, vm.argv[0], withDisk(vm.argv[1:], string(node))...)
	cmd.ExtraFiles = []*os.File{tap}
	if vm.state != "" {
		state, err := os.Open(vm.state)
		if err != nil {
			b.Fatal(err)
		}
		defer func() { _ = state.Close() }() // read only
		cmd.ExtraFiles = append(cmd.ExtraFiles, state)
	}
	first := &firstByte{at: make(chan time.Time, 1)}
	cmd.Stdout, cmd.Stderr = first, first
	began := time.Now()
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() {
		cancel()
		_ = cmd.Wait() // killed, which is its error
	}()
	if err := vm.await(ctx); err != nil {
		b.Fatalf("bare QEMU: %v; it says:\n%s", err, first.String())
	}
	agent = time.Since(began).Seconds() * 1000
	if vm.state != "" {
		return 0, agent
	}
	select {
	case at := <-first.at:
		return at.Sub(began).Seconds() * 1000, agent
	case <-ctx.Done():
		b.Fatal("bare QEMU: its agent answers and its console is empty")
		return 0, 0
	}
}

// withDisk puts the disk's node in front of the device that uses it.
func withDisk(argv []string, node string) []string {
	for i, a := range argv {
		if strings.HasPrefix(a, "virtio-blk-device") {
			return slices.Insert(slices.Clone(argv), i-1, "-blockdev", node)
		}
	}
	return argv
}

// await asks the guest agent until it answers.
func (vm *bareVM) await(ctx context.Context) error {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, address string) (net.Conn, error) { return vm.slot.Dial(ctx, address) }, DisableKeepAlives: true}
	url := "http://" + net.JoinHostPort(vm.slot.Guest().Addr().String(), strconv.Itoa(guestapi.Port)) + "/health"
	for {
		try, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		err := getOnce(try, transport, url)
		cancel()
		if err == nil || ctx.Err() != nil {
			return err
		}
		time.Sleep(5 * time.Millisecond) // how exactly the answer is timed
	}
}

func getOnce(ctx context.Context, transport http.RoundTripper, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// firstByte notes when anything is written to it first. It is an io.Writer and
// nothing else, or a copy would go around Write.
type firstByte struct {
	at   chan time.Time
	mu   sync.Mutex
	said bytes.Buffer
}

func (f *firstByte) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.said.Len() == 0 {
		f.at <- time.Now()
	}
	return f.said.Write(p)
}

func (f *firstByte) String() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.said.String()
}
