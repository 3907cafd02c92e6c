package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/pager"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
	"github.com/dormouse-sandbox/dormouse/template"
)

// Where an instance keeps snapshots, and what its page server needs.
func (i instance) snapshotsDir() string { return filepath.Join(i.data, "snapshots") }
func (i instance) pagerDir() string     { return "/run/dormouse-" + i.name + ".pages" }

// pagerUID is the user that the page server runs as. No VM has it.
func (i instance) pagerUID() int { return i.uidBase() + 1<<16 - 2 }

// snapshots is what a host keeps snapshots with; none of it where the machine
// cannot.
type snapshots struct {
	store  *snapshot.Store
	images *host.StoreImages // nil where there is no page server
	reason string            // why not
}

// openSnapshots opens the store and takes over the page server, or starts one.
func openSnapshots(ctx context.Context, inst instance, d disks, log *slog.Logger, u *undo.Stack) (snapshots, error) {
	store, err := openStore(inst)
	if err != nil {
		return snapshots{}, err
	}
	u.PushClose("snapshots", store.Close)
	self, err := os.Executable()
	if err != nil {
		return snapshots{}, err
	}
	pages, err := pager.Open(ctx, pager.Config{
		Dir: inst.pagerDir(), Command: []string{self, "pager", "--store", inst.snapshotsDir()}, Keeper: []string{self, "pager", "--keep"},
		UID: inst.pagerUID(), GID: inst.pagerUID(), Log: log,
	})
	if sandbox.Is(err, sandbox.KindUnsupported) {
		log.Warn("sandboxes cannot be paused", "why", err)
		return snapshots{reason: err.Error()}, nil
	}
	if err != nil {
		return snapshots{}, err
	}
	u.PushClose("page server", pages.Close)
	images := &host.StoreImages{Store: store, Pages: pages, Log: log}
	if d.dm != nil {
		images.Sealer = d.dm
	}
	return snapshots{store: store, images: images}, nil
}

// openStore opens the store alone, for a host that starts no VM.
func openStore(inst instance) (*snapshot.Store, error) {
	store, err := snapshot.Open(snapshot.Config{Dir: inst.snapshotsDir(), Group: inst.pagerUID()})
	if err != nil {
		return nil, fmt.Errorf("open snapshots: %w", err)
	}
	return store, nil
}

// hostImages is what the host gets of it: nil is no typed nil.
func (s snapshots) hostImages() host.Images {
	if s.images == nil {
		return nil
	}
	return s.images
}

// takeInBase makes ready what disks of the default template will lie on, so that
// no create has to, and neither the start of the server.
func takeInBase(ctx context.Context, o upOptions, t template.Template, log *slog.Logger, progress template.Progress) (err error) {
	store, err := openStore(o.inst)
	if sandbox.Is(err, sandbox.KindConflict) {
		return nil // a server has the store, and has been here
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	d, err := openDisks(o.disk, o.inst, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	if progress != nil {
		progress(template.Event{Step: "take in " + t.Name, Fraction: template.Unknown})
	}
	images := &host.StoreImages{Store: store, Log: log}
	if d.dm != nil {
		images.Sealer = d.dm
	}
	return images.Prepare(ctx, d.drivers[0].Name(), t)
}

// stopPages ends the page server, when no VM is left.
func stopPages(ctx context.Context, inst instance) error {
	if _, err := os.Stat(inst.pagerDir()); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return errors.Join(pager.Sweep(ctx, inst.pagerDir()), os.RemoveAll(inst.pagerDir()))
}
