package host_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func TestRestartAdopts(t *testing.T) {
	for name, end := range map[string]func(*rig){
		"stopped": func(r *rig) {
			if err := r.agent.Close(); err != nil {
				r.t.Fatal(err)
			}
		},
		"killed": func(r *rig) { r.agent.Abandon() },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.open()
			var ids []sandbox.ID
			for range 5 {
				ids = append(ids, r.mustCreate())
			}
			end(r)
			r.networks.crash()
			r.open()
			for _, id := range ids {
				if _, err := r.agent.Ping(t.Context(), string(id)); err != nil {
					t.Errorf("ping %s: %v", id, err)
				}
			}
			if n := r.vms.Starts(); n != 5 {
				t.Errorf("%d VMs were started, want the same 5", n)
			}
			for _, id := range ids {
				if _, err := r.agent.Destroy(t.Context(), string(id), ""); err != nil {
					t.Error(err)
				}
			}
			if left := r.leftovers(); len(left) > 0 {
				t.Errorf("left on the host: %v", left)
			}
		})
	}
}

func TestRebootEndsAll(t *testing.T) {
	r := newRig(t)
	r.open()
	id := r.mustCreate()
	r.agent.Abandon()
	r.vms.Reboot("second-boot")
	r.networks.crash()
	r.bootID = "second-boot"
	r.open()
	testkit.Eventually(t, 5*time.Second, "ended by the reboot", func() bool {
		s := r.status(id)
		return s.State == "ended" && s.Cause == sandbox.CauseHostReboot
	})
	if left := r.leftovers(); len(left) > 0 {
		t.Errorf("left on the host: %v", left)
	}
}

func TestCrashWhileNobodyWatched(t *testing.T) {
	r := newRig(t)
	r.open()
	id := r.mustCreate()
	r.agent.Abandon()
	if err := r.vms.Crash(id); err != nil {
		t.Fatal(err)
	}
	r.networks.crash()
	r.open()
	testkit.Eventually(t, 5*time.Second, "ended by the crash", func() bool {
		s := r.status(id)
		return s.State == "ended" && s.Cause == sandbox.CauseVMMCrash
	})
	if left := r.leftovers(); len(left) > 0 {
		t.Errorf("left on the host: %v", left)
	}
}

// TestStrandedIsKept: a VM that cannot be adopted right now is not lost, and
// nothing is swept from under it.
func TestStrandedIsKept(t *testing.T) {
	r := newRig(t)
	r.open()
	id := r.mustCreate()
	r.agent.Abandon()
	r.networks.crash()
	r.networks.failAdopt(errors.New("the kernel is out of sorts"))
	r.open()
	if s := r.status(id); s.State != "running" {
		t.Fatalf("status: %+v", s)
	}
	if _, err := r.agent.Ping(t.Context(), string(id)); !sandbox.Is(err, sandbox.KindTransient) {
		t.Errorf("ping: %v, want transient", err)
	}
	if len(r.vms.Running()) != 1 || len(r.networks.inUse()) != 1 {
		t.Fatal("the VM or its network was swept")
	}
	r.networks.failAdopt(nil)
	testkit.Eventually(t, 5*time.Second, "adopted at last", func() bool {
		_, err := r.agent.Ping(t.Context(), string(id))
		return err == nil
	})
}

func TestCrashIsNoticed(t *testing.T) {
	r := newRig(t)
	r.open()
	id := r.mustCreate()
	reading := make(chan error)
	go func() {
		reading <- r.agent.ReadFile(context.Background(), host.FileRef{ID: string(id), Path: "/x"},
			func(int64) error { return nil }, func([]byte) error { return nil })
	}()
	if err := r.vms.Crash(id); err != nil {
		t.Fatal(err)
	}
	if err := <-reading; err == nil {
		t.Error("a download from a dead sandbox succeeded")
	}
	testkit.Eventually(t, 5*time.Second, "ended by the crash", func() bool {
		s := r.status(id)
		return s.State == "ended" && s.Cause == sandbox.CauseVMMCrash
	})
	_, err := r.agent.Ping(t.Context(), string(id))
	if !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), "vmm_crash") {
		t.Errorf("ping: %v, want the cause", err)
	}
	if data, _, err := r.agent.Console(string(id), 0, 0); err != nil || !strings.Contains(string(data), "fake guest") {
		t.Errorf("console of the dead: %q, %v", data, err)
	}
	if left := r.leftovers(); len(left) > 0 {
		t.Errorf("left on the host: %v", left)
	}
}

func TestDeadlineFires(t *testing.T) {
	r := newRig(t)
	r.open()
	req := r.request()
	req.Deadline = time.Now().Add(1500 * time.Millisecond)
	if _, err := r.agent.Create(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	later := r.mustCreate()
	r.restart() // also when the agent was killed in between
	testkit.Eventually(t, 10*time.Second, "ended by its deadline", func() bool {
		s := r.status(req.ID)
		return s.State == "ended" && s.Cause == sandbox.CauseTTL
	})
	if s := r.status(later); s.State != "running" {
		t.Errorf("the other one: %+v", s)
	}
}

func TestSetDeadline(t *testing.T) {
	r := newRig(t)
	r.open()
	id := r.mustCreate()
	want := time.Now().Add(7 * time.Hour).Round(0)
	if err := r.agent.SetDeadline(string(id), want); err != nil {
		t.Fatal(err)
	}
	r.restart()
	if got := r.status(id).Deadline; !got.Equal(want) {
		t.Errorf("deadline after a restart: %v, want %v", got, want)
	}
	if err := r.agent.SetDeadline(string(id), time.Now().Add(-time.Second)); !sandbox.Is(err, sandbox.KindInvalid) {
		t.Errorf("a deadline in the past: %v", err)
	}
}

// TestDestroyFailsAt fails every step of a destroy, until its caller has been
// told: the sandbox ends all the same, a little later, and nothing is left. Where
// only the note of what is to come fails, it ends at once.
func TestDestroyFailsAt(t *testing.T) {
	for _, point := range destroyPoints(t) {
		t.Run(point, func(t *testing.T) {
			r := newRig(t)
			r.open()
			id := r.mustCreate()
			disarm := fault.Set(point, fault.Fail) // not once: the house-keeping could be the first
			defer disarm()
			_, err := r.agent.Destroy(t.Context(), string(id), "")
			disarm()
			if strings.HasPrefix(point, "osfs/destroy-intent/") {
				if s := r.status(id); err != nil || s.State != "ended" {
					t.Fatalf("destroy: %v, the sandbox is %s", err, s.State)
				}
			} else if !errors.Is(err, fault.ErrInjected) {
				t.Fatalf("destroy: %v, want the injected fault", err)
			}
			testkit.Eventually(t, 5*time.Second, "ended", func() bool { return r.status(id).State == "ended" })
			if s := r.status(id); s.Cause != sandbox.CauseUser {
				t.Errorf("cause %s", s.Cause)
			}
			if left := r.leftovers(); len(left) > 0 {
				t.Errorf("left on the host: %v", left)
			}
		})
	}
}

// TestEndWithoutAJournal: a journal that takes nothing holds up no end. What the
// sandbox had is given back at once; why it ended is written down as soon as the
// journal works again.
func TestEndWithoutAJournal(t *testing.T) {
	r := newRig(t)
	r.open()
	id := r.mustCreate()
	for _, op := range []string{"destroy-intent", "destroy-done"} {
		defer fault.Set("osfs/"+op+"/fsync", brokenDisk)()
	}
	if _, err := r.agent.Destroy(t.Context(), string(id), ""); !errors.Is(err, syscall.EIO) {
		t.Errorf("destroy: %v, want what the disk said", err)
	}
	// The house-keeping tries again to write the record, with a temporary file.
	testkit.Eventually(t, 5*time.Second, "nothing is left on the host", func() bool { return len(r.leftovers()) == 0 })
	if s := r.status(id); s.State != "destroying" || s.Cause != sandbox.CauseUser {
		t.Errorf("while it is not recorded: %s (%s)", s.State, s.Cause)
	}
	fault.Set("osfs/destroy-done/fsync", nil)
	testkit.Eventually(t, 5*time.Second, "ended", func() bool { return r.status(id).State == "ended" })
	r.restart()
	if s := r.status(id); s.State != "ended" || s.Cause != sandbox.CauseUser {
		t.Errorf("after a restart: %s (%s)", s.State, s.Cause)
	}
}

func brokenDisk(context.Context, string) error { return syscall.EIO }

// TestEndIsNotedLater: while what the journal did not take is not removed
// either, it is offered again, and the next agent goes on with it.
func TestEndIsNotedLater(t *testing.T) {
	r := newRig(t)
	r.open()
	id := r.mustCreate()
	defer fault.Set("osfs/destroy-intent/write", fault.Nth(1, brokenDisk))()
	disarm := fault.Set("host/destroy/vm", fault.Fail)
	defer disarm()
	if _, err := r.agent.Destroy(t.Context(), string(id), ""); !errors.Is(err, fault.ErrInjected) {
		t.Fatal(err)
	}
	testkit.Eventually(t, 5*time.Second, "in the journal", func() bool {
		data, err := os.ReadFile(filepath.Join(r.dir, "host/journal", string(id)+".json"))
		return err == nil && strings.Contains(string(data), `"state":"destroying"`)
	})
	r.kill()
	disarm()
	r.open()
	testkit.Eventually(t, 5*time.Second, "ended by the user", func() bool {
		s := r.status(id)
		return s.State == "ended" && s.Cause == sandbox.CauseUser
	})
}

// TestEndSparesTheNextOwnerOfItsSlot: a sandbox has ended, which the journal did
// not take; its network slot was given to another; the agent was killed, and the
// next one cannot adopt the other at once. What is left of the first is nothing.
func TestEndSparesTheNextOwnerOfItsSlot(t *testing.T) {
	r := newRig(t)
	r.open()
	first, second := r.request(), r.request()
	if first.ID > second.ID {
		first, second = second, first // the journal is read in this order
	}
	if _, err := r.agent.Create(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	for _, op := range []string{"destroy-intent", "destroy-done"} {
		defer fault.Set("osfs/"+op+"/fsync", brokenDisk)()
	}
	if _, err := r.agent.Destroy(t.Context(), string(first.ID), ""); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	if _, err := r.agent.Create(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	if used := r.networks.inUse(); len(used) != 1 || used[0] != 0 {
		t.Fatalf("slots in use: %v, want the first one's again", used)
	}
	r.kill()
	fault.Set("osfs/destroy-done/fsync", nil)
	defer fault.Set("vmmfake/adopt", fault.Nth(2, fault.Fail))()
	r.open()
	testkit.Eventually(t, 5*time.Second, "the second one adopted", func() bool {
		_, err := r.agent.Ping(t.Context(), string(second.ID))
		return err == nil
	})
	if s := r.status(first.ID); s.State != "ended" {
		t.Errorf("the first one is %s", s.State)
	}
}

func destroyPoints(t *testing.T) []string {
	r := newRig(t)
	r.open()
	id := r.mustCreate()
	points := pointsOf(func() {
		if _, err := r.agent.Destroy(t.Context(), string(id), ""); err != nil {
			t.Fatal(err)
		}
	})
	if len(points) < 8 {
		t.Fatalf("a destroy passes only %v", points)
	}
	return points
}

// TestDestroyKilledAt kills the agent at every step of a destroy.
func TestDestroyKilledAt(t *testing.T) {
	for _, point := range destroyPoints(t) {
		t.Run(point, func(t *testing.T) {
			r := newRig(t)
			r.open()
			id := r.mustCreate()
			r.killAt(point, func(dying *host.Agent) {
				_, _ = dying.Destroy(context.Background(), string(id), "") // it died
			})
			switch s := r.status(id); s.State {
			case "running": // it died before it wrote down what it was asked
				if _, err := r.agent.Ping(t.Context(), string(id)); err != nil {
					t.Errorf("running, but: %v", err)
				}
			case "ended":
				if left := r.leftovers(); len(left) > 0 || s.Cause != sandbox.CauseUser {
					t.Errorf("ended (%s), left on the host: %v", s.Cause, left)
				}
			default:
				t.Errorf("after the restart: %s", s.State)
			}
		})
	}
}

func TestAcknowledge(t *testing.T) {
	r := newRig(t)
	r.open()
	id := r.mustCreate()
	if err := r.agent.Acknowledge([]string{string(id)}); !sandbox.Is(err, sandbox.KindConflict) {
		t.Errorf("acknowledge a running one: %v", err)
	}
	if _, err := r.agent.Destroy(t.Context(), string(id), ""); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := r.agent.Acknowledge([]string{string(id)}); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(r.agent.List()); n != 0 {
		t.Errorf("%d are still listed", n)
	}
	if files, _ := filepath.Glob(filepath.Join(r.dir, "host/journal/*.json")); len(files) > 0 {
		t.Errorf("journal: %v", files)
	}
}

func TestSecondAgentIsRefused(t *testing.T) {
	r := newRig(t)
	first := r.open()
	_, err := host.Open(t.Context(), host.Config{
		Dir: filepath.Join(r.dir, "host"), RunDir: filepath.Join(r.dir, "run"),
		VMM: r.vms, Disks: []disk.Driver{r.disks}, Networks: r.networks, Templates: r, BootID: r.bootID,
	})
	if !sandbox.Is(err, sandbox.KindConflict) {
		t.Errorf("second agent: %v", err)
	}
	r.agent = first
}

// TestUnreadableEntryStopsTheStart: an agent that cannot read what it owns must
// not sweep.
func TestUnreadableEntryStopsTheStart(t *testing.T) {
	r := newRig(t)
	r.open()
	id := r.mustCreate()
	if err := r.agent.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(r.dir, "host/journal", string(id)+".json")
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; n < len(whole); n += 7 { // a file cut short anywhere
		if err := os.WriteFile(path, whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := host.Open(t.Context(), host.Config{
			Dir: filepath.Join(r.dir, "host"), RunDir: filepath.Join(r.dir, "run"),
			VMM: r.vms, Disks: []disk.Driver{r.disks}, Networks: r.networks, Templates: r, BootID: r.bootID,
		})
		if err == nil || !strings.Contains(err.Error(), filepath.Base(path)) {
			t.Fatalf("cut at %d: %v, want an error that names the file", n, err)
		}
	}
	if len(r.vms.Running()) != 1 {
		t.Error("the VM was swept")
	}
	if err := os.WriteFile(path, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	r.networks.crash()
	r.open()
	if _, err := r.agent.Ping(t.Context(), string(id)); err != nil {
		t.Error(err)
	}
}

func FuzzEntry(f *testing.F) {
	f.Add([]byte(`{"version":1,"id":"abcdefghijklmnopqrstuvwx","state":"ended"}`))
	f.Add([]byte(`{"version":1,"id":"../../x","state":"running","vmm":{},"disk":{}}`))
	f.Add([]byte(`{"version":2}`))
	f.Fuzz(func(_ *testing.T, data []byte) {
		_ = host.DecodeEntry(data) // must return, whatever it says
	})
}
