package dm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// fake is a kernel with device-mapper and loop devices in memory, over real
// files. It keeps what drivers of this package depend on: who holds what, what
// is busy, what a half made device answers, and the format of a copy-on-write
// file. What it says of a call was read in Linux 6.1 and is compared with a real
// kernel in the lab, where the same tests run.
type fake struct {
	nodeDir string

	mu     sync.Mutex
	minors map[uint32]bool
	devs   map[string]*fakeDevice
	loops  map[uint32]*fakeLoop
	// openers has what a test keeps open, by the device.
	openers map[uint64]int
	// before is called, with the lock, when a call is about to be made: it can fail it.
	before func(call, name string) error
	// after is called, without the lock, when a call has been made.
	after func(call, name string)
}

const fakeMapperMajor = 253

type fakeDevice struct {
	name       string
	minor      uint32
	loaded     bool // a table was loaded once: before, sysfs does not know it
	live, next *fakeTable
	suspended  bool
	corrupt    bool // dm-verity has seen damage
}

func (d *fakeDevice) dev() uint64 { return unix.Mkdev(fakeMapperMajor, d.minor) }

type fakeTable struct {
	readOnly bool
	rows     []target
	deps     []uint64
	store    *fakeStore // of a snapshot; nil if it will be handed over
}

// isSnapshot says of a table that it is one of a snapshot, whoever has the store.
func (t *fakeTable) isSnapshot() bool { return t != nil && t.rows[0].kind == "snapshot" }

// pairs says whether two tables are snapshots of one origin with one file.
func (t *fakeTable) pairs(other *fakeTable) bool {
	return t.isSnapshot() && other.isSnapshot() && slices.Equal(t.deps, other.deps)
}

// sharing finds the devices whose live table, or waiting one, pairs with a table.
func (f *fake) sharing(t *fakeTable) (live, waiting []*fakeDevice) {
	for _, d := range f.devs {
		if d.live != t && t.pairs(d.live) && d.live.store.valid {
			live = append(live, d)
		}
		if d.next != t && t.pairs(d.next) {
			waiting = append(waiting, d)
		}
	}
	return live, waiting
}

func (t *fakeTable) sectors() uint64 {
	last := t.rows[len(t.rows)-1]
	return last.start + last.length
}

type fakeLoop struct {
	file     *os.File
	tag      string
	readOnly bool
	held     int // by processes that have it open
	size     int64
}

func newFake(nodeDir string) *fake {
	return &fake{
		nodeDir: nodeDir, minors: map[uint32]bool{}, devs: map[string]*fakeDevice{},
		loops: map[uint32]*fakeLoop{}, openers: map[uint64]int{},
	}
}

// process is one process's view of a fake: what it has open ends with it.
type process struct {
	*fake
	dead   bool // guarded by fake.mu
	held   map[uint32]int
	opened []*opened
}

func (f *fake) process() *process { return &process{fake: f, held: map[uint32]int{}} }

var errDead = errors.New("this process was killed")

// kill takes from a process what it had open; whatever it calls later does nothing.
func (p *process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dead = true
	for _, o := range p.opened {
		o.close()
	}
	for n, count := range p.held {
		p.loops[n].held -= count
		p.settle(n)
	}
	p.held = nil
}

// unlock gives back the lock on a file that a dead process has open still: its
// descriptors are in this process, and not the kernel's to close.
func (f *fake) unlock(path string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	kept := map[int]bool{}
	for _, l := range f.loops {
		kept[int(l.file.Fd())] = true
	}
	links, _ := filepath.Glob("/proc/self/fd/*") // the pattern is right
	for _, link := range links {
		if to, err := os.Readlink(link); err != nil || to != path {
			continue
		}
		if fd, err := strconv.Atoi(filepath.Base(link)); err == nil && !kept[fd] {
			_ = unix.Flock(fd, unix.LOCK_UN) // the test that comes sees whether it worked
		}
	}
}

// reboot forgets everything that is not on a disk.
func (f *fake) reboot() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.devs)
	clear(f.minors)
	clear(f.openers)
	for n, l := range f.loops {
		if err := l.file.Close(); err != nil {
			return err
		}
		delete(f.loops, n)
	}
	return os.RemoveAll(f.nodeDir)
}

// enter begins a call; the lock is held until the function it returns.
func (p *process) enter(call, name string) (leave func(), err error) {
	p.mu.Lock()
	if p.dead {
		p.mu.Unlock()
		return func() {}, errDead
	}
	if p.before != nil {
		err = p.before(call, name)
	}
	return func() {
		after := p.after
		p.mu.Unlock()
		if after != nil {
			after(call, name)
		}
	}, err
}

func (f *fake) find(name string) (*fakeDevice, error) {
	d, ok := f.devs[name]
	if !ok {
		return nil, fmt.Errorf("%w: %w", fs.ErrNotExist, unix.ENXIO)
	}
	return d, nil
}

func (f *fake) byNumber(dev uint64) *fakeDevice {
	for _, d := range f.devs {
		if d.dev() == dev {
			return d
		}
	}
	return nil
}

func (f *fake) holders(dev uint64) int {
	n := 0
	for _, d := range f.devs {
		for _, t := range []*fakeTable{d.live, d.next} {
			if t != nil && slices.Contains(t.deps, dev) {
				n++
			}
		}
	}
	return n
}

// settle clears a loop device that nobody has open.
func (f *fake) settle(n uint32) {
	l, ok := f.loops[n]
	if ok && l.held == 0 && f.holders(unix.Mkdev(loopMajor, n)) == 0 {
		_ = l.file.Close() // it was a duplicate
		delete(f.loops, n)
	}
}

func (f *fake) settleAll() {
	for n := range f.loops {
		f.settle(n)
	}
}

func lowestFree[V any](used map[uint32]V) uint32 {
	n := uint32(0)
	for {
		if _, taken := used[n]; !taken {
			return n
		}
		n++
	}
}

func (p *process) Make(name string) error {
	leave, err := p.enter("make", name)
	defer leave()
	if err != nil {
		return err
	}
	if len(name) > maxName {
		return unix.EINVAL
	}
	if _, ok := p.devs[name]; ok {
		return unix.EBUSY
	}
	d := &fakeDevice{name: name, minor: lowestFree(p.minors)}
	p.minors[d.minor] = true
	p.devs[name] = d
	return nil
}

func (p *process) Load(name string, readOnly bool, table []target) error {
	leave, err := p.enter("load", name)
	defer leave()
	if err != nil {
		return err
	}
	d, err := p.find(name)
	if err != nil {
		return err
	}
	t, err := p.table(readOnly, table)
	if err != nil {
		return err
	}
	d.next, d.loaded = t, true
	p.settleAll()
	return nil
}

// table looks at rows as a target's constructor does.
func (f *fake) table(readOnly bool, rows []target) (*fakeTable, error) {
	if len(rows) == 0 {
		return nil, unix.EINVAL
	}
	t := &fakeTable{readOnly: readOnly, rows: slices.Clone(rows)}
	var at uint64
	for _, row := range rows {
		if row.start != at || row.length == 0 {
			return nil, fmt.Errorf("gap at sector %d: %w", at, unix.EINVAL)
		}
		at += row.length
		if err := f.construct(t, row); err != nil {
			return nil, err
		}
	}
	return t, nil
}

func (f *fake) construct(t *fakeTable, row target) error {
	args := strings.Fields(row.params)
	use := func(arg string, sectors uint64) error {
		dev, size, err := f.device(arg)
		if err != nil {
			return err
		}
		if sectors > size {
			return fmt.Errorf("device %s is too small for target: %w", arg, unix.EINVAL)
		}
		if !slices.Contains(t.deps, dev) {
			t.deps = append(t.deps, dev)
		}
		return nil
	}
	switch {
	case row.kind == "zero" && len(args) == 0:
		return nil
	case row.kind == "linear" && len(args) == 2:
		offset, err := strconv.ParseUint(args[1], 10, 64)
		if err != nil {
			return unix.EINVAL
		}
		if (row.start|row.length|offset)%(blockBytes/sector) != 0 {
			return fmt.Errorf("not aligned to hardware logical block size: %w", unix.EINVAL)
		}
		return use(args[0], offset+row.length)
	case row.kind == "verity" && len(args) == 12:
		return errors.Join(use(args[1], row.length), use(args[2], 0))
	case row.kind == "snapshot" && len(args) == 4 && args[2] == "P" && args[3] == strconv.Itoa(chunkSectors):
		if row.length%(blockBytes/sector) != 0 {
			return fmt.Errorf("not aligned to hardware logical block size: %w", unix.EINVAL)
		}
		if err := errors.Join(use(args[0], 0), use(args[1], 0)); err != nil {
			return err
		}
		dev, _, err := f.device(args[1])
		if err != nil {
			return err
		}
		l := f.loops[unix.Minor(dev)]
		if l == nil || l.readOnly {
			return unix.EACCES
		}
		switch live, waiting := f.sharing(&fakeTable{rows: []target{row}, deps: t.deps}); {
		case len(live) > 1 || len(waiting) > 0:
			return fmt.Errorf("snapshot cow pairing for exception table handover failed: %w", unix.EINVAL)
		case len(live) == 1:
			return nil // its exceptions are handed over when it is resumed
		}
		t.store, err = openStore(l.file, l.size)
		return err
	}
	return fmt.Errorf("target %s %q: %w", row.kind, row.params, unix.EINVAL)
}

// device finds what a table names as major:minor, and its size in sectors.
func (f *fake) device(arg string) (dev, sectors uint64, err error) {
	var major, minor uint32
	if _, err := fmt.Sscanf(arg, "%d:%d", &major, &minor); err != nil {
		return 0, 0, unix.EINVAL
	}
	dev = unix.Mkdev(major, minor)
	if major == loopMajor {
		if l, ok := f.loops[minor]; ok {
			return dev, uint64(l.size / sector), nil
		}
		return 0, 0, unix.ENXIO
	}
	if d := f.byNumber(dev); d != nil && d.live != nil {
		return dev, d.live.sectors(), nil
	}
	return 0, 0, unix.ENXIO
}

func (p *process) Resume(name string) error {
	leave, err := p.enter("resume", name)
	defer leave()
	if err != nil {
		return err
	}
	d, err := p.find(name)
	if err != nil {
		return err
	}
	if d.next == nil && d.live == nil {
		return unix.EINVAL
	}
	if err := p.handOver(d); err != nil {
		return err
	}
	if d.next != nil {
		d.live, d.next = d.next, nil
	}
	d.suspended = false
	p.settleAll()
	return nil
}

// handOver gives a snapshot that is about to be resumed what another one over the
// same file knows of it (snapshot_preresume and snapshot_resume in dm-snap.c).
func (f *fake) handOver(d *fakeDevice) error {
	t := d.next
	if t == nil {
		t = d.live
	}
	live, waiting := f.sharing(t)
	switch {
	case t == d.live && len(waiting) > 0:
		return fmt.Errorf("unable to resume snapshot source until handover completes: %w", unix.EINVAL)
	case t == d.live || len(live) == 0:
		return nil
	case !live[0].suspended:
		return fmt.Errorf("unable to perform snapshot handover until source is suspended: %w", unix.EINVAL)
	}
	from := live[0].live
	t.store, from.store = from.store, &fakeStore{file: from.store.file}
	return nil
}

func (p *process) Suspend(name string) error {
	leave, err := p.enter("suspend", name)
	defer leave()
	if err != nil {
		return err
	}
	d, err := p.find(name)
	if err != nil {
		return err
	}
	if d.suspended {
		return unix.EINVAL
	}
	d.suspended = true
	return nil
}

func (p *process) Unload(name string) error {
	leave, err := p.enter("unload", name)
	defer leave()
	if err != nil {
		return err
	}
	d, err := p.find(name)
	if err != nil {
		return err
	}
	d.next = nil
	p.settleAll()
	return nil
}

func (p *process) Drop(name string) error {
	leave, err := p.enter("drop", name)
	defer leave()
	if err != nil {
		return err
	}
	d, err := p.find(name)
	if err != nil {
		return err
	}
	if p.open(d) > 0 {
		return unix.EBUSY
	}
	delete(p.devs, name)
	delete(p.minors, d.minor)
	p.settleAll()
	return nil
}

func (f *fake) open(d *fakeDevice) int { return f.openers[d.dev()] + f.holders(d.dev()) }

func (p *process) List() ([]listed, error) {
	leave, err := p.enter("list", "")
	defer leave()
	if err != nil {
		return nil, err
	}
	var all []listed
	for _, d := range p.devs {
		all = append(all, listed{name: d.name, dev: d.dev()})
	}
	slices.SortFunc(all, func(a, b listed) int { return strings.Compare(a.name, b.name) })
	return all, nil
}

func (p *process) Status(name string) (device, error) {
	leave, err := p.enter("status", name)
	defer leave()
	if err != nil {
		return device{}, err
	}
	d, err := p.find(name)
	if err != nil {
		return device{}, err
	}
	return device{dev: d.dev(), open: p.open(d), active: d.live != nil, suspended: d.suspended, waiting: d.next != nil, readOnly: d.live != nil && d.live.readOnly}, nil
}

func (p *process) Deps(name string) ([]uint64, error) {
	leave, err := p.enter("deps", name)
	defer leave()
	if err != nil {
		return nil, err
	}
	d, err := p.find(name)
	if err != nil || d.live == nil {
		return nil, err
	}
	return slices.Clone(d.live.deps), nil
}

func (p *process) Info(name string) ([]target, error) {
	leave, err := p.enter("info", name)
	defer leave()
	if err != nil {
		return nil, err
	}
	d, err := p.find(name)
	if err != nil || d.live == nil {
		return nil, err
	}
	rows := slices.Clone(d.live.rows)
	for i := range rows {
		rows[i].params = ""
		switch rows[i].kind {
		case "snapshot":
			rows[i].params = d.live.store.status()
		case "verity":
			rows[i].params = map[bool]string{false: "V", true: "C"}[d.corrupt]
		}
	}
	return rows, nil
}

func (p *process) Holders(dev uint64) (int, error) {
	leave, err := p.enter("holders", number(dev))
	defer leave()
	if err != nil {
		return 0, err
	}
	if d := p.byNumber(dev); unix.Major(dev) == fakeMapperMajor && (d == nil || !d.loaded) {
		return 0, &fs.PathError{Op: "open", Path: "/sys/dev/block/" + number(dev) + "/holders", Err: unix.ENOENT}
	}
	return p.holders(dev), nil
}

func (p *process) Openers(dev uint64) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := p.openers[dev]; n > 0 {
		return []string{fmt.Sprintf("process %d (%d times)", os.Getpid(), n)}
	}
	return nil
}

func (p *process) Attach(file *os.File, tag string, readOnly bool) (held, error) {
	leave, err := p.enter("attach", tag)
	defer leave()
	if err != nil {
		return held{}, err
	}
	info, err := file.Stat()
	if err != nil {
		return held{}, err
	}
	// The kernel keeps this very open file, with the locks on it.
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return held{}, err
	}
	n := lowestFree(p.loops)
	p.loops[n] = &fakeLoop{file: os.NewFile(uintptr(fd), file.Name()), tag: tag, readOnly: readOnly, held: 1, size: info.Size() &^ (sector - 1)}
	p.held[n]++
	return held{dev: unix.Mkdev(loopMajor, n), close: func() error { return p.release(n) }}, nil
}

func (p *process) release(n uint32) error {
	leave, err := p.enter("release", strconv.Itoa(int(n)))
	defer leave()
	if err != nil {
		return err
	}
	p.held[n]--
	if p.held[n] == 0 {
		delete(p.held, n)
	}
	p.loops[n].held--
	p.settle(n)
	return nil
}

func (p *process) LoopAt(dev uint64) (loop, error) {
	leave, err := p.enter("loop-at", number(dev))
	defer leave()
	if err != nil {
		return loop{}, err
	}
	return p.loopAt(dev)
}

func (f *fake) loopAt(dev uint64) (loop, error) {
	l, ok := f.loops[unix.Minor(dev)]
	if unix.Major(dev) != loopMajor || !ok {
		return loop{}, fs.ErrNotExist
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(l.file.Fd()), &st); err != nil {
		return loop{}, err
	}
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", l.file.Fd()))
	return loop{dev: dev, tag: l.tag, path: path, fsDev: st.Dev, inode: st.Ino}, err
}

func (p *process) Loops(prefix string) ([]loop, error) {
	leave, err := p.enter("loops", prefix)
	defer leave()
	if err != nil {
		return nil, err
	}
	var all []loop
	for n, l := range p.loops {
		if strings.HasPrefix(l.tag, prefix) {
			info, err := p.loopAt(unix.Mkdev(loopMajor, n))
			if err != nil {
				return nil, err
			}
			all = append(all, info)
		}
	}
	return all, nil
}

func (p *process) Clear(dev uint64) error {
	leave, err := p.enter("clear", number(dev))
	defer leave()
	if err != nil {
		return err
	}
	p.settle(unix.Minor(dev))
	return nil
}

// Nodes are files with a number in them.
func (p *process) MakeNode(name string, dev uint64, uid, gid int) error {
	leave, err := p.enter("make-node", name)
	defer leave()
	if err != nil {
		return err
	}
	path := filepath.Join(p.nodeDir, name)
	err = errors.Join(os.MkdirAll(p.nodeDir, 0o711), os.WriteFile(path, strconv.AppendUint(nil, dev, 10), 0o600))
	if os.Geteuid() == 0 {
		err = errors.Join(err, os.Lchown(path, uid, gid))
	}
	return err
}

func (p *process) NodeOwner(name string) (uid, gid int, err error) {
	return nodes{p.nodeDir}.NodeOwner(name)
}

func (p *process) RemoveNode(name string) error {
	leave, err := p.enter("remove-node", name)
	defer leave()
	if err != nil {
		return err
	}
	return removeAny(filepath.Join(p.nodeDir, name))
}

func (p *process) Nodes(prefix string) ([]string, error) { return nodes{p.nodeDir}.Nodes(prefix) }

func (p *process) Close() error { return nil }

// numberAt is the device that a node names.
func (f *fake) numberAt(path string) (uint64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(string(data), 10, 64)
}

// opened is an open block device.
type opened struct {
	f      *fake
	dev    uint64
	closed bool
}

func (p *process) OpenNode(name string) (reader, error) {
	leave, err := p.enter("open-node", name)
	defer leave()
	if err != nil {
		return nil, err
	}
	dev, err := p.numberAt(filepath.Join(p.nodeDir, name))
	if err != nil {
		return nil, err
	}
	p.openers[dev]++
	o := &opened{f: p.fake, dev: dev}
	p.opened = append(p.opened, o)
	return o, nil
}

// openDevice opens a device from outside of the driver.
func (f *fake) openDevice(path string) (*opened, error) {
	dev, err := f.numberAt(path)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.byNumber(dev) == nil {
		return nil, unix.ENXIO
	}
	f.openers[dev]++
	return &opened{f: f, dev: dev}, nil
}

func (o *opened) Close() error {
	o.f.mu.Lock()
	defer o.f.mu.Unlock()
	o.close()
	return nil
}

func (o *opened) close() {
	if o.closed {
		return
	}
	o.closed = true
	if o.f.openers[o.dev]--; o.f.openers[o.dev] <= 0 {
		delete(o.f.openers, o.dev)
	}
}

// Sync has nothing to do: nobody caches anything.
func (o *opened) Sync() error { return nil }

// ReadAt and WriteAt take whole blocks, as with O_DIRECT.
func (o *opened) ReadAt(buf []byte, at int64) (int, error) { return o.blocks(buf, at, o.f.readBlock) }

func (o *opened) WriteAt(buf []byte, at int64) (int, error) { return o.blocks(buf, at, o.f.writeBlock) }

func (o *opened) blocks(buf []byte, at int64, do func(*fakeDevice, []byte, int64) error) (int, error) {
	if at%blockBytes != 0 || len(buf)%blockBytes != 0 {
		return 0, unix.EINVAL
	}
	o.f.mu.Lock()
	defer o.f.mu.Unlock()
	d := o.f.byNumber(o.dev)
	if d == nil || d.live == nil {
		return 0, unix.EIO
	}
	if d.suspended { // a kernel would let it wait
		return 0, fmt.Errorf("device %s is suspended: %w", d.name, unix.EAGAIN)
	}
	for n := 0; n < len(buf); n += blockBytes {
		if err := do(d, buf[n:n+blockBytes], at+int64(n)); err != nil {
			return n, err
		}
	}
	return len(buf), nil
}
