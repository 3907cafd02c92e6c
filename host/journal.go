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
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// state is where a sandbox is on this host. It is coarser than sandbox.State:
// the host only has to know what to do with it after a crash.
type state string

const (
	stateCreating   state = "creating"   // after a crash: remove it
	stateRunning    state = "running"    // after a crash: adopt it
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
	VMM   *vmm.Record  `json:"vmm,omitempty"`
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
		return fmt.Errorf("journal %s: %w", e.ID, noSpace(err))
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
	case stateCreating, stateRunning, stateDestroying, stateEnded:
	default:
		return entry{}, fmt.Errorf("unknown state %q", e.State)
	}
	if e.State == stateRunning && (e.VMM == nil || e.Disk == nil) {
		return entry{}, errors.New("running, but without its VM or its disk")
	}
	return e, nil
}
