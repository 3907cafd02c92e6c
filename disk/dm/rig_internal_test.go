package dm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// rig is one instance on a kernel: this machine's, where it can, or a fake one.
type rig struct {
	t    *testing.T
	fake *fake // nil over a real kernel
	cfg  Config
	dir  string // of bases and disks

	driver  *Driver
	process *process // of driver, on a fake
	look    kernelCalls
}

// everywhere runs a test over a fake kernel and over the real one, if it has
// device-mapper.
func everywhere(t *testing.T, test func(t *testing.T, r *rig)) {
	t.Helper()
	if !testkit.InLab() { // there time is dear, and the fake was enough for everywhere else
		t.Run("fake", func(t *testing.T) { test(t, fakeRig(t)) })
	}
	t.Run("kernel", func(t *testing.T) { test(t, kernelRig(t)) })
}

// fresh is another instance on a kernel of the same sort.
func (r *rig) fresh(t *testing.T) *rig {
	t.Helper()
	if r.fake != nil {
		return fakeRig(t)
	}
	return kernelRig(t)
}

// requireKernel skips the test where there is no device-mapper.
func requireKernel(t testing.TB) {
	t.Helper()
	testkit.Root(t)
	why := ""
	if err := errors.Join(kernel.DeviceMapper("linear", "zero", "snapshot", "verity"), kernel.Loop()); err != nil {
		why = err.Error()
	}
	testkit.Require(t, "dm", why == "", why)
}

func newRig(t *testing.T) *rig {
	t.Helper()
	// A real kernel shows paths as they are: no links in them.
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return &rig{t: t, dir: dir, cfg: Config{Instance: randomInstance(), BusyLimit: 5 * time.Second}}
}

func randomInstance() string {
	const letters = "abcdefghijklmnopqrstuvwxyz0123456789"
	name := make([]byte, 5)
	for i := range name {
		name[i] = letters[rand.IntN(len(letters))]
	}
	return string(name)
}

func fakeRig(t *testing.T) *rig {
	t.Helper()
	r := newRig(t)
	r.cfg.NodeDir = filepath.Join(r.dir, "dev")
	r.fake = newFake(r.cfg.NodeDir)
	r.look = r.fake.process()
	r.start()
	return r
}

func kernelRig(t *testing.T) *rig {
	t.Helper()
	requireKernel(t)
	r := newRig(t)
	r.cfg.NodeDir = "/dev/dmtest-" + r.cfg.Instance
	ctl, err := openControl()
	if err != nil {
		t.Fatal(err)
	}
	r.look = linux{control: ctl, nodes: nodes{r.cfg.NodeDir}}
	r.start()
	t.Cleanup(func() {
		// What a failed test left must not be the next one's.
		if err := r.driver.Sweep(context.Background(), nil); err != nil {
			t.Errorf("clean up: %v", err)
		}
		if err := errors.Join(r.driver.Close(), r.look.Close(), os.RemoveAll(r.cfg.NodeDir)); err != nil {
			t.Error(err)
		}
	})
	return r
}

// start makes a new driver, which knows nothing of the one before.
func (r *rig) start() {
	r.t.Helper()
	var err error
	if r.fake == nil {
		if r.driver != nil {
			err = r.driver.Close()
		}
		if err == nil {
			r.driver, err = Open(r.cfg)
		}
	} else {
		r.process = r.fake.process()
		r.driver, err = open(r.cfg.withDefaults(), r.process)
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

// pattern is content that is different in every block and for every seed; some
// blocks are zero, as in an image.
func pattern(blocks int, seed uint64) []byte {
	data := make([]byte, blocks*blockBytes)
	random := rand.New(rand.NewPCG(seed, 1))
	for i := range blocks {
		if random.IntN(8) == 0 {
			continue
		}
		block := data[i*blockBytes:][:blockBytes]
		copy(block, fmt.Sprintf("block %d of %d;", i, seed))
		for at := 32; at < blockBytes; at += 509 {
			block[at] = byte(random.Uint32())
		}
	}
	return data
}

func (r *rig) file(name string, data []byte) string {
	r.t.Helper()
	path := filepath.Join(r.dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o644)); err != nil {
		r.t.Fatal(err)
	}
	return path
}

// config is for a disk in a directory of its own.
func (r *rig) config(name, base string, blocks int) disk.Config {
	r.t.Helper()
	dir := filepath.Join(r.dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		r.t.Fatal(err)
	}
	return disk.Config{Dir: dir, Base: base, SizeBytes: int64(blocks) * blockBytes, UID: os.Geteuid(), GID: os.Getegid()}
}

func (r *rig) create(config disk.Config) disk.Disk {
	r.t.Helper()
	d, err := r.driver.Create(r.t.Context(), config)
	if err != nil {
		r.t.Fatal(err)
	}
	return d
}

func (r *rig) restore(config disk.Config) disk.Disk {
	r.t.Helper()
	d, err := r.driver.Restore(r.t.Context(), config)
	if err != nil {
		r.t.Fatal(err)
	}
	return d
}

func (r *rig) remove(disks ...disk.Disk) {
	r.t.Helper()
	for _, d := range disks {
		if err := d.Remove(r.t.Context()); err != nil {
			r.t.Fatal(err)
		}
	}
}

// device is an open disk, whose reads and writes take whole blocks.
type openDevice interface {
	reader
	WriteAt(p []byte, off int64) (int, error)
}

func (r *rig) open(path string) (openDevice, error) {
	if r.fake != nil {
		return r.fake.openDevice(path)
	}
	return os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
}

func (r *rig) mustOpen(d disk.Disk) openDevice {
	r.t.Helper()
	f, err := r.open(d.Path())
	if err != nil {
		r.t.Fatal(err)
	}
	return f
}

func (r *rig) write(d disk.Disk, at int64, data []byte) {
	r.t.Helper()
	if err := r.tryWrite(d, at, data); err != nil {
		r.t.Fatal(err)
	}
}

// tryWrite changes any range, by reading and writing the blocks it touches.
func (r *rig) tryWrite(d disk.Disk, at int64, data []byte) (err error) {
	f, err := r.open(d.Path())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	from := at / blockBytes * blockBytes
	to := (at + int64(len(data)) + blockBytes - 1) / blockBytes * blockBytes
	buf := aligned(int(to - from))
	if at != from || len(data) != len(buf) {
		if _, err := f.ReadAt(buf, from); err != nil {
			return err
		}
	}
	copy(buf[at-from:], data)
	_, err = f.WriteAt(buf, from)
	return err
}

func (r *rig) read(d disk.Disk, at int64, n int) []byte {
	r.t.Helper()
	data, err := r.tryRead(d, at, n)
	if err != nil {
		r.t.Fatal(err)
	}
	return data
}

func (r *rig) tryRead(d disk.Disk, at int64, n int) (_ []byte, err error) {
	f, err := r.open(d.Path())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	from := at / blockBytes * blockBytes
	to := (at + int64(n) + blockBytes - 1) / blockBytes * blockBytes
	buf := aligned(int(to - from))
	if _, err := f.ReadAt(buf, from); err != nil {
		return nil, err
	}
	return buf[at-from:][:n], nil
}

// hash reads a whole disk.
func (r *rig) hash(d disk.Disk, size int64) digest {
	r.t.Helper()
	f := r.mustOpen(d)
	defer func() { _ = f.Close() }() // read only
	sum, buf := sha256.New(), aligned(copyBytes)
	for at := int64(0); at < size; at += copyBytes {
		part := buf[:min(copyBytes, size-at)]
		if _, err := f.ReadAt(part, at); err != nil {
			r.t.Fatalf("read at %d: %v", at, err)
		}
		sum.Write(part)
	}
	return digest(sum.Sum(nil))
}

func (r *rig) expect(d disk.Disk, at int64, want []byte) {
	r.t.Helper()
	if got := r.read(d, at, len(want)); !bytes.Equal(got, want) {
		r.t.Errorf("at byte %d the disk has %.40q, want %.40q", at, got, want)
	}
}

// remains lists everything of this instance: devices, loop devices, nodes.
func (r *rig) remains() []string {
	r.t.Helper()
	var found []string
	all, err := r.driver.devices("")
	if err != nil {
		r.t.Fatal(err)
	}
	for _, l := range all {
		found = append(found, "device "+l.name)
	}
	loops, err := r.look.Loops(r.driver.prefix())
	if err != nil {
		r.t.Fatal(err)
	}
	for _, l := range loops {
		found = append(found, "loop over "+l.path)
	}
	nodes, err := r.look.Nodes(r.driver.prefix())
	if err != nil {
		r.t.Fatal(err)
	}
	for _, n := range nodes {
		found = append(found, "node "+n)
	}
	slices.Sort(found)
	return found
}

// files lists what is below the rig's directory and is not a base, a layout or
// what seals a layer for ever.
func (r *rig) files() []string {
	r.t.Helper()
	var found []string
	err := filepath.WalkDir(r.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if path == r.cfg.NodeDir {
			return fs.SkipDir
		}
		stays := strings.HasPrefix(e.Name(), "base") || strings.HasPrefix(e.Name(), "layer")
		if !e.IsDir() && !stays {
			found = append(found, strings.TrimPrefix(path, r.dir+"/"))
		}
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return found
}

func (r *rig) nothingRemains(when string) {
	r.t.Helper()
	if left := append(r.remains(), r.files()...); len(left) > 0 {
		r.t.Errorf("left %s: %v", when, left)
	}
}

// pointsOf lists the failpoints that fn passes, once each, in order.
func pointsOf(fn func()) []string {
	var mu sync.Mutex
	var seen []string
	fault.Observe(func(point string) {
		mu.Lock()
		defer mu.Unlock()
		if !slices.Contains(seen, point) {
			seen = append(seen, point)
		}
	})
	defer fault.Observe(nil)
	fn()
	mu.Lock()
	defer mu.Unlock()
	return slices.Clone(seen)
}

// errand is what a child process does with a driver of its own.
type errand struct {
	Config disk.Config
	Driver struct{ Instance, NodeDir string }
	Do     string // create, restore, remove, flatten, next, create-ten
	To     string // of flatten
}

const errandVariable = "DORMOUSE_TEST_ERRAND"

func TestMain(m *testing.M) {
	text := os.Getenv(errandVariable)
	if text == "" {
		os.Exit(m.Run())
	}
	var e errand
	err := json.Unmarshal([]byte(text), &e)
	if err == nil {
		err = e.run(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("done")
	// Wait to be killed: whoever started this closes standard input at the latest.
	_, _ = os.Stdin.Read(make([]byte, 1))
}

func (e errand) run(ctx context.Context) error {
	d, err := Open(Config{Instance: e.Driver.Instance, NodeDir: e.Driver.NodeDir})
	if err != nil {
		return err
	}
	switch e.Do {
	case "create":
		_, err = d.Create(ctx, e.Config)
	case "create-ten":
		for i := 0; i < 10 && err == nil; i++ {
			config := e.Config
			config.Dir += fmt.Sprint(i)
			_, err = d.Create(ctx, config)
		}
	case "restore", "mend":
		_, err = d.Restore(ctx, e.Config)
	case "remove":
		var found disk.Disk
		if found, err = d.Restore(ctx, e.Config); err == nil {
			err = found.Remove(ctx)
		}
	case "next":
		var found disk.Disk
		if found, err = d.Restore(ctx, e.Config); err == nil {
			_, err = found.Next(ctx, nil)
		}
	case "flatten":
		err = d.Flatten(ctx, e.Config, e.To)
	default:
		err = fmt.Errorf("%q is not an errand", e.Do)
	}
	return err
}

// send runs an errand in another process, which dies at the failpoint, or, if
// that is empty, by SIGKILL when it is done.
func (r *rig) send(e errand, point string) {
	r.t.Helper()
	e.Driver.Instance, e.Driver.NodeDir = r.cfg.Instance, r.cfg.NodeDir
	text, err := json.Marshal(e)
	if err != nil {
		r.t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		r.t.Fatal(err)
	}
	cmd := exec.CommandContext(r.t.Context(), self)
	cmd.Env = append(os.Environ(), errandVariable+"="+string(text))
	if point != "" {
		cmd.Env = append(cmd.Env, "DORMOUSE_FAULT="+point+"=kill@1")
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	in, err := cmd.StdinPipe()
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = in.Close() }() // it is dead by then
	out, err := cmd.StdoutPipe()
	if err != nil {
		r.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	word := make([]byte, 5)
	if n, _ := out.Read(word); n > 0 { // it is done and waits
		if point != "" {
			r.t.Errorf("%s did not pass %s", e.Do, point)
		}
		if err := cmd.Process.Kill(); err != nil {
			r.t.Fatal(err)
		}
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		r.t.Fatalf("%s ended with %v, want SIGKILL: %s", e.Do, err, said.String())
	}
}
