package e2e_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// TestPauseSnapshotFork takes a real VM through all that can be done with its
// state: a process and files go on where they were, copies share the past and
// nothing else, and while it is paused there is nothing of it but what is on disk.
func TestPauseSnapshotFork(t *testing.T) {
	w := shared(t)
	s := w.create(small())
	w.sh(s.ID, "head -c 2000000 /dev/urandom > big; sha256sum big > sum; echo one > past")
	w.sh(s.ID, "nohup sh -c 'echo started >> /tmp/life; while sleep 0.2; do date +%s.%N > /tmp/now; done' > /dev/null 2>&1 & until [ -s /tmp/life ]; do sleep 0.1; done")
	before := len(w.VMs())

	paused, err := w.Client.Pause(within(t, 2*time.Minute), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	if paused.State != string(sandbox.Paused) || len(w.VMs()) != before-1 {
		t.Errorf("after the pause it is %s, and of %d VMs %d run", paused.State, before, len(w.VMs()))
	}
	for _, left := range w.Overlays() {
		if strings.Contains(left, s.ID) {
			t.Errorf("while it is paused there is %s", left)
		}
	}
	// A call resumes it.
	if got := w.sh(s.ID, "sha256sum -c sum; cat /tmp/life"); got != "big: OK\nstarted" {
		t.Errorf("after the resume: %q", got)
	}
	first := w.sh(s.ID, "until [ -s /tmp/now ]; do sleep 0.1; done; cat /tmp/now") // it was paused soon after its start
	within10s := time.Now().Add(time.Minute)
	for w.sh(s.ID, "cat /tmp/now") == first {
		if time.Now().After(within10s) {
			t.Fatal("the process does not run on")
		}
	}

	const name = "e2e-kept"
	snap, err := w.Client.CreateSnapshot(within(t, 2*time.Minute), api.CreateSnapshot{Name: name, SandboxID: s.ID})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("snapshot: %+v", snap)
	w.sh(s.ID, "echo two > past; rm big")
	req := small()
	req.Template, req.VCPUs, req.MemMiB, req.DiskMiB = name, 0, 0, 0
	copied := w.create(req)
	if got := w.sh(copied.ID, "cat past; sha256sum -c sum; hostname"); got != "one\nbig: OK\n"+copied.ID {
		t.Errorf("made from the snapshot: %q", got)
	}
	count := 2
	forked, err := w.Client.Fork(within(t, 3*time.Minute), s.ID, api.Fork{Count: &count}, "")
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, c := range forked.Copies {
		if c.Error != nil {
			t.Fatalf("a copy failed: %+v", c.Error)
		}
		ids = append(ids, c.Sandbox.ID)
	}
	if len(ids) != count {
		t.Fatalf("%d copies were made", len(ids))
	}
	for _, id := range ids {
		w.sh(id, "test $(cat past) = two && cat /proc/sys/kernel/random/uuid /etc/machine-id > mine && echo "+id+" > past")
	}
	if a, b := w.sh(ids[0], "cat mine"), w.sh(ids[1], "cat mine"); a == b {
		t.Errorf("both copies drew %q", a)
	}
	if got := w.sh(s.ID, "cat past"); got != "two" {
		t.Errorf("the source of the fork has %q", got)
	}

	_, err = w.Client.DeleteSnapshot(within(t, time.Minute), name)
	if !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(errors.Join(err).Error(), copied.ID) {
		t.Errorf("delete a snapshot that is in use: %v", err)
	}
	for _, id := range append(ids, copied.ID, s.ID) {
		if _, err := w.Client.Delete(within(t, 2*time.Minute), id); err != nil {
			t.Error(err)
		}
	}
	if _, err := w.Client.DeleteSnapshot(within(t, time.Minute), name); err != nil {
		t.Error(err)
	}
}
