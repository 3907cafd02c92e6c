package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// state is where a sandbox is on this host. It is coarser than sandbox.State:
// the host only has to know what to do with it after a crash.
type state string

const (
	stateCreating   state = "creating"   // after a crash: remove it
	stateRunning    state = "running"    // after a crash: adopt it
	statePausing    state = "pausing"    // after a crash: adopt it, and let it run on
	statePaused     state = "paused"     // after a crash: remove its machine, if there still is one
	stateResuming   state = "resuming"   // after a crash: remove its machine; it is paused
	stateDestroying state = "destroying" // after a crash: go on removing it
	stateEnded      state = "ended"      // nothing is left but this entry
)

// entryVersion is the format of an entry. A newer one is refused.
const entryVersion = 1

// maxEntryBytes bounds an entry's file; the environment is the largest part.
const maxEntryBytes = 1 << 20

// entry is what the journal keeps of one sandbox. Its file is replaced whole
// before the host is changed.
type entry struct {
	Version   int           `json:"version"`
	ID        sandbox.ID    `json:"id"`
	State     state         `json:"state"`
	Spec      sandbox.Spec  `json:"spec"`
	Hostname  string        `json:"hostname"`
	CreatedAt time.Time     `json:"created_at"`
	Deadline  time.Time     `json:"deadline"`
	EndedAt   time.Time     `json:"ended_at,omitzero"`
	Cause     sandbox.Cause `json:"cause,omitempty"` // from destroying on
	Detail    string        `json:"detail,omitempty"`
	Phases    []Phase       `json:"phases,omitempty"`

	Token string       `json:"token,omitempty"` // the guest agent's
	Slot  int          `json:"slot"`            // network slot; meaningful while running
	Disk  *disk.Config `json:"disk,omitempty"`
	// DiskDriver is who made the disk; empty means qcow.
	DiskDriver string      `json:"disk_driver,omitempty"`
	VMM        *vmm.Record `json:"vmm,omitempty"`
	// Base is the manifest that its disk lies on, and Began the point that the VM
	// went on from; nil if it was booted.
	Base  snapshot.Digest `json:"base,omitzero"`
	Began *point          `json:"began,omitempty"`
	// Last is its newest point: what a paused one goes on from, and what the next
	// one is a diff to.
	Last     *point    `json:"last,omitempty"`
	PausedAt time.Time `json:"paused_at,omitzero"`
	// PausedBy says who paused it, and Start how it came to run last.
	PausedBy sandbox.PauseReason `json:"paused_by,omitempty"`
	Start    sandbox.Start       `json:"start,omitempty"`
	// AutoPause is after how long of idleness it is paused; 0 is never.
	AutoPause time.Duration `json:"auto_pause,omitempty"`
	// What its template says of its use.
	Env            map[string]string `json:"template_env,omitempty"`
	DefaultUser    string            `json:"default_user,omitempty"`
	DefaultWorkdir string            `json:"default_workdir,omitempty"`
	// Build says that it runs a step of a template's build: nobody knows it but
	// that build, and it does not outlive the agent.
	Build bool `json:"build,omitempty"`
}

// journal is a folder with one file per sandbox.
type journal struct{ dir string }

func (j journal) path(id sandbox.ID) string { return filepath.Join(j.dir, string(id)+".json") }

// write replaces an entry. op names the step, for tests that break it.
func (j journal) write(op string, e entry) error {
	e.Version = entryVersion
	data, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("journal %s: %w", e.ID, err)
	}
	if err := osfs.WriteFile(op, j.path(e.ID), data, 0o600); err != nil {
		return fmt.Errorf("journal %s: %w", e.ID, sandbox.NoSpace(err))
	}
	return nil
}

func (j journal) remove(id sandbox.ID) error {
	if err := osfs.Remove("journal-forget", j.path(id)); err != nil {
		return fmt.Errorf("journal %s: %w", id, err)
	}
	return nil
}

// load reads every entry. One that cannot be read is an error with its name:
// guessing would mean to remove a VM that somebody still needs.
func (j journal) load() ([]entry, error) {
	if err := osfs.SweepTemp(j.dir); err != nil {
		return nil, err
	}
	files, err := os.ReadDir(j.dir)
	if err != nil {
		return nil, err
	}
	var entries []entry
	var errs []error
	for _, f := range files {
		name, ok := strings.CutSuffix(f.Name(), ".json")
		if !ok {
			continue
		}
		e, err := readEntry(filepath.Join(j.dir, f.Name()), name)
		if err != nil {
			errs = append(errs, fmt.Errorf("journal entry %s: %w", f.Name(), err))
			continue
		}
		entries = append(entries, e)
	}
	return entries, errors.Join(errs...)
}

func readEntry(path, name string) (entry, error) {
	data, err := osfs.ReadFileLimit(path, maxEntryBytes)
	if err != nil {
		return entry{}, err
	}
	e, err := decodeEntry(data)
	if err != nil {
		return entry{}, err
	}
	if string(e.ID) != name {
		return entry{}, fmt.Errorf("it is about sandbox %q", e.ID)
	}
	return e, nil
}

func decodeEntry(data []byte) (entry, error) {
	var e entry
	if err := json.Unmarshal(data, &e); err != nil {
		return entry{}, err
	}
	if e.Version != entryVersion {
		return entry{}, fmt.Errorf("format version %d, this build reads %d", e.Version, entryVersion)
	}
	if _, err := sandbox.ParseID(string(e.ID)); err != nil {
		return entry{}, err
	}
	switch e.State {
	case stateCreating, stateRunning, statePausing, statePaused, stateResuming, stateDestroying, stateEnded:
	default:
		return entry{}, fmt.Errorf("unknown state %q", e.State)
	}
	if (e.State == stateRunning || e.State == statePausing) && (e.VMM == nil || e.Disk == nil) {
		return entry{}, fmt.Errorf("%s, but without its VM or its disk", e.State)
	}
	if (e.State == statePaused || e.State == stateResuming) && e.Last == nil {
		return entry{}, fmt.Errorf("%s, but without what it goes on from", e.State)
	}
	return e, nil
}

// cleared says that nothing is left of the machine of a paused sandbox: each machine
// has a token of its own, which goes with the last of it.
func (e entry) cleared() bool { return e.State == statePaused && e.Token == "" }

// roots are what the snapshot collector must keep for a sandbox.
func (e entry) roots() []snapshot.Digest {
	roots := append(e.Began.roots(), e.Last.roots()...)
	if !e.Base.IsZero() {
		roots = append(roots, e.Base)
	}
	return roots
}

// parentMemory and parentDisk are what the next point is a diff to. What a VM has
// changed since it began covers what it has changed since its newest point.
func (e entry) parentMemory() snapshot.Digest {
	if e.Last == nil {
		return snapshot.Digest{} // booted: its memory was zeros
	}
	return e.Last.Memory
}

func (e entry) parentDisk() snapshot.Digest {
	if e.Last == nil {
		return e.Base
	}
	return e.Last.Disk
}

// pointNow is the point that a running sandbox is at, without its images.
func (e entry) pointNow(compat string, guest sandbox.ID) *point {
	p := &point{
		Compat: compat, Guest: guest, VCPUs: e.Spec.VCPUs, MemMiB: e.Spec.MemMiB, DiskMiB: e.Spec.DiskMiB,
		Template: e.Spec.Template, Env: e.Env, DefaultUser: e.DefaultUser, DefaultWorkdir: e.DefaultWorkdir,
	}
	if e.Last != nil {
		p.Generation = e.Last.Generation + 1
		p.Parent = e.Last.Memory
	}
	return p
}
