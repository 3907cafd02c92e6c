package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
	"github.com/dormouse-sandbox/dormouse/template"
)

// Images makes files that VMs open of what the snapshot store has.
type Images interface {
	// Base is the manifest of a template's disk, of that many bytes. The first
	// call for an image takes it into the store.
	Base(ctx context.Context, t template.Template, bytes int64) (*snapshot.Pin, error)
	// Disk says what a disk driver lays an overlay on: the path of a file, or of
	// a layout of layers.
	Disk(ctx context.Context, driver string, d snapshot.Digest) (base, layout string, err error)
	// Sweep takes away what it keeps of images that no template has any more.
	Sweep(keep []template.Template) error
	// Memory opens the file that a VM maps as its memory.
	Memory(d snapshot.Digest) (*os.File, error)
	// Damaged says whether a page of a memory could not be read.
	Damaged(d snapshot.Digest) bool
}

// point is a VM at one moment: all that is needed to go on from there, any number
// of times. What it names is never changed.
type point struct {
	Memory  snapshot.Digest `json:"memory"`
	Disk    snapshot.Digest `json:"disk"`
	Devices snapshot.Digest `json:"devices"`
	Console snapshot.Digest `json:"console,omitzero"` // the end of what the guest has printed, if anything
	// Compat is of the VMM that saved it; another one cannot load it.
	Compat string `json:"compat"`
	// Guest is who the guest was: it listens to what is signed for that name.
	Guest sandbox.ID `json:"guest"`

	VCPUs   int `json:"vcpus"`
	MemMiB  int `json:"mem_mib"`
	DiskMiB int `json:"disk_mib"`

	// What the template says of its use; it may be gone by now.
	Template       string            `json:"template"`
	Env            map[string]string `json:"env,omitempty"`
	DefaultUser    string            `json:"default_user,omitempty"`
	DefaultWorkdir string            `json:"default_workdir,omitempty"`

	Generation int             `json:"generation"`
	Parent     snapshot.Digest `json:"parent,omitzero"` // the memory of the point that it is a diff to
	// Above are the memories that it descends from and that were still there, nearest
	// first: the parent of a point may be gone as soon as there is the next one.
	Above []snapshot.Digest `json:"above,omitempty"`
	At    time.Time         `json:"at"`

	// Bytes that this point added to the store, and allocated bytes of all that it
	// consists of.
	Written     int64 `json:"written"`
	MemoryBytes int64 `json:"memory_bytes"`
	DiskBytes   int64 `json:"disk_bytes"`

	Labels map[string]string `json:"labels,omitempty"` // of a snapshot
	Warm   bool              `json:"warm,omitempty"`   // before anybody had it
}

// maxAbove bounds how far back a point knows what it descends from.
const maxAbove = 64

// descend is what is above a point that comes after this one.
func (a *Agent) descend(p *point) []snapshot.Digest {
	if p == nil {
		return nil
	}
	above := []snapshot.Digest{p.Memory}
	for _, d := range p.above() {
		if len(above) < maxAbove && d != p.Memory && a.cfg.Snapshots.Has(d) {
			above = append(above, d)
		}
	}
	return above
}

// above is what it descends from, nearest first.
func (p *point) above() []snapshot.Digest {
	if len(p.Above) == 0 && !p.Parent.IsZero() { // older than this list
		return []snapshot.Digest{p.Parent}
	}
	return p.Above
}

// measure finds out what a point takes.
func (a *Agent) measure(p *point) (err error) {
	if p.MemoryBytes, err = a.cfg.Snapshots.Allocated(p.Memory); err != nil {
		return err
	}
	p.DiskBytes, err = a.cfg.Snapshots.Allocated(p.Disk)
	return err
}

// roots are what the collector must keep for it.
func (p *point) roots() []snapshot.Digest {
	if p == nil {
		return nil
	}
	roots := []snapshot.Digest{p.Memory, p.Disk, p.Devices}
	if !p.Console.IsZero() {
		roots = append(roots, p.Console)
	}
	return roots
}

// ref names a point in the store.
func (p *point) ref(name string) (snapshot.Ref, error) {
	meta, err := json.Marshal(p)
	if err != nil {
		return snapshot.Ref{}, err
	}
	ref := snapshot.Ref{
		Name: name, CreatedAt: p.At, Meta: meta,
		Manifests: map[string]snapshot.Digest{"memory": p.Memory, "disk": p.Disk},
		Objects:   map[string]snapshot.Digest{"devices": p.Devices},
	}
	if !p.Console.IsZero() {
		ref.Objects["console"] = p.Console
	}
	return ref, nil
}

// pointOf reads a point back. What the reference keeps must be what the point
// needs.
func pointOf(r snapshot.Ref) (*point, error) {
	p := new(point)
	if err := json.Unmarshal(r.Meta, p); err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", r.Name, err)
	}
	if p.Memory != r.Manifests["memory"] || p.Disk != r.Manifests["disk"] || p.Devices != r.Objects["devices"] || p.Console != r.Objects["console"] || p.Memory.IsZero() || p.Devices.IsZero() {
		return nil, fmt.Errorf("snapshot %s: it does not keep what it says it is made of", r.Name)
	}
	return p, nil
}

// fits says whether this host can go on from a point.
func (a *Agent) fits(p *point) error {
	if have := a.cfg.VMM.Capabilities().Compat; have != p.Compat {
		return sandbox.Errorf(sandbox.KindConflict, "it was saved by %q, and this host has %q: a VM's state is only understood by what saved it", p.Compat, have)
	}
	return nil
}

var errNoStore = sandbox.WithKind(sandbox.KindUnsupported, errors.New("this host keeps no snapshots"))
