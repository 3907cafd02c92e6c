package dm

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// TestALoopsNumberIsSoonSomebodyElses: whoever removes a disk waits for its own
// loop device, and not for one of another disk that got its number.
func TestALoopsNumberIsSoonSomebodyElses(t *testing.T) {
	r := fakeRig(t)
	d := r.create(r.config("disk", r.file("base.img", pattern(4, 1)), 4))
	other, err := os.Open(r.file("other", pattern(1, 1)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close() }() // read only
	taken := false
	r.fake.after = func(call, name string) {
		if call == "drop" && name == filepath.Base(d.Path()) && !taken {
			taken = true
			if _, err := r.look.Attach(other, r.driver.prefix()+overlayKind+"other", true); err != nil {
				t.Error(err)
			}
		}
	}
	began := time.Now()
	if err := d.Remove(t.Context()); err != nil || !taken {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
}

// TestOpenedWhileItIsRemoved: somebody opens the device by its number when its
// node is gone already. The node comes back, and with its owner, also when the
// removal does not know him.
func TestOpenedWhileItIsRemoved(t *testing.T) {
	for _, verb := range []string{"Remove", "Discard"} {
		r := fakeRig(t)
		r.cfg.BusyLimit = 50 * time.Millisecond
		r.start()
		config := r.config("disk", r.file("base.img", pattern(4, 1)), 4)
		config.UID, config.GID = owner()
		d := r.create(config)
		r.write(d, 0, []byte("precious"))
		dev, err := r.fake.numberAt(d.Path())
		if err != nil {
			t.Fatal(err)
		}
		r.fake.hook("remove-node", func(string) {
			r.fake.mu.Lock()
			defer r.fake.mu.Unlock()
			r.fake.openers[dev]++
		})
		if verb == "Remove" {
			err = d.Remove(t.Context())
		} else {
			err = r.driver.Discard(t.Context(), config.Dir)
		}
		if !sandbox.Is(err, sandbox.KindBusy) {
			t.Errorf("%s: %v", verb, err)
		}
		var st unix.Stat_t
		if err := unix.Lstat(d.Path(), &st); err != nil || int(st.Uid) != config.UID || int(st.Gid) != config.GID {
			t.Errorf("%s: the node is uid %d's and gid %d's: %v", verb, st.Uid, st.Gid, err)
		}
		r.expect(d, 0, []byte("precious"))
	}
}

// TestALayerIsWantedAgainAtOnce: the last disk over a layer goes, and the next
// first one gets a loop device of the same number over the same file.
func TestALayerIsWantedAgainAtOnce(t *testing.T) {
	r := fakeRig(t)
	base := r.file("base.img", pattern(4, 1))
	d := r.create(r.config("disk", base, 4))
	layers, err := r.driver.devices(layerKind)
	if err != nil || len(layers) != 1 {
		t.Fatal(layers, err)
	}
	tag := layers[0].name
	file, err := os.Open(base)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }() // read only
	next := "dm" + r.cfg.Instance + "-next"
	taken := false
	r.fake.after = func(call, name string) {
		if call != "drop" || name != tag || taken {
			return
		}
		taken = true
		h, err := r.look.Attach(file, tag, true)
		if err == nil {
			err = errors.Join(r.look.Make(next), r.look.Load(next, true, []target{{0, 8, "linear", number(h.dev) + " 0"}}), r.look.Resume(next), h.close())
		}
		if err != nil {
			t.Error(err)
		}
	}
	began := time.Now()
	if err := d.Remove(t.Context()); err != nil || !taken || time.Since(began) > r.cfg.BusyLimit/2 {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
	if err := r.look.Drop(next); err != nil {
		t.Fatal(err)
	}
	r.nothingRemains("by two disks in turn")
}

// TestAStrangerHasTheBaseOpen: that is no reason to keep a disk. What no disk
// needs any more stays until the stranger goes; only a sweep is about that.
func TestAStrangerHasTheBaseOpen(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		r.cfg.BusyLimit = 100 * time.Millisecond
		r.start()
		d := r.create(r.config("disk", r.file("base.img", pattern(4, 1)), 4))
		bases, err := r.driver.devices(baseKind)
		if err != nil || len(bases) != 1 {
			t.Fatal(bases, err)
		}
		node := "dm" + r.cfg.Instance + "-stranger"
		if err := r.look.MakeNode(node, bases[0].dev, 0, 0); err != nil {
			t.Fatal(err)
		}
		stranger, err := r.look.OpenNode(node)
		if err != nil {
			t.Fatal(err)
		}
		r.remove(d)
		if left := r.files(); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
		err = r.driver.Sweep(t.Context(), nil)
		if !sandbox.Is(err, sandbox.KindBusy) || !strings.Contains(err.Error(), bases[0].name) || !strings.Contains(err.Error(), "open in process") {
			t.Errorf("Sweep: %v, want kind %s with the device and who has it", err, sandbox.KindBusy)
		}
		if err := errors.Join(stranger.Close(), r.driver.Sweep(t.Context(), nil)); err != nil {
			t.Error(err)
		}
		r.nothingRemains("when the stranger is gone")
	})
}

// TestABaseIsNotTakenFromUnderADisk: the last disk over a base goes while the
// next is on its way, at the worst moment: when the base is there and nothing
// holds it yet.
func TestABaseIsNotTakenFromUnderADisk(t *testing.T) {
	r := fakeRig(t)
	base := r.file("base.img", pattern(4, 1))
	first := r.create(r.config("first", base, 4))
	config := r.config("second", base, 4)
	reached := false
	r.fake.after = func(call, name string) {
		if call == "make" && strings.Contains(name, "-"+overlayKind+"second-") && !reached {
			reached = true
			r.fake.after = nil
			if err := first.Remove(t.Context()); err != nil {
				t.Error(err)
			}
		}
	}
	second := r.create(config)
	if !reached {
		t.Error("nothing happened between the base and the disk")
	}
	r.expect(second, 0, pattern(4, 1))
	r.remove(second)
	r.nothingRemains("by two disks")
}

// TestNoMemoryIsTriedAgain: for a moment only, and only that.
func TestNoMemoryIsTriedAgain(t *testing.T) {
	r := fakeRig(t)
	config := r.config("disk", r.file("base.img", pattern(4, 1)), 4)
	fails := map[string]int{}
	r.fake.before = func(call, name string) error {
		if call == "load" && fails[name] < 3 {
			fails[name]++
			return unix.ENOMEM
		}
		return nil
	}
	d := r.create(config)
	if len(fails) != 3 { // layer, base, overlay
		t.Errorf("%d devices had a load that failed", len(fails))
	}
	r.remove(d)
	for _, always := range []error{unix.ENOMEM, unix.EINVAL} {
		loads := 0
		r.fake.before = func(call, _ string) error {
			if call == "load" {
				loads++
				return always
			}
			return nil
		}
		if _, err := r.driver.Create(t.Context(), config); !errors.Is(err, always) {
			t.Errorf("%v, want %v", err, always)
		}
		if again := always == unix.ENOMEM; loads > 1 != again {
			t.Errorf("%d loads that failed with %v", loads, always)
		}
		r.nothingRemains("by a table that cannot be loaded")
	}
}

// TestTheLimitIsSleptThrough: a machine that is so busy that the limit passes in
// one call tells nothing about the device. It is asked once more, and not for ever.
func TestTheLimitIsSleptThrough(t *testing.T) {
	d := fakeRig(t).driver
	for _, frees := range []bool{true, false} {
		calls := 0
		err := d.again(t.Context(), time.Nanosecond, unix.EBUSY, func() error {
			calls++
			time.Sleep(20 * time.Millisecond)
			if calls > 1 && frees {
				return nil
			}
			return unix.EBUSY
		})
		if want := !frees; errors.Is(err, unix.EBUSY) != want || calls < 2 {
			t.Errorf("it becomes free: %v; after %d calls: %v", frees, calls, err)
		}
	}
}
