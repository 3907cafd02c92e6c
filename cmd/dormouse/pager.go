package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/pager"
	"github.com/dormouse-sandbox/dormouse/pager/fuse"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
)

// newPagerCommand makes the page server's process. The server starts it, as a user
// without rights, with what it works on in two descriptors; nobody types it.
func newPagerCommand() *cobra.Command {
	var store string
	var keep bool
	cmd := &cobra.Command{
		Use:    "pager --store DIR",
		Short:  "Serve the images of a snapshot store to VMs (started by the server)",
		Hidden: true,
		Args:   args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if keep { // and nothing else, until it is killed
				for {
					time.Sleep(time.Hour)
				}
			}
			if store == "" {
				return usage(cmd, "--store is missing")
			}
			return servePages(store, slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil)))
		},
	}
	cmd.Flags().StringVar(&store, "store", "", "folder of the snapshot store")
	cmd.Flags().BoolVar(&keep, "keep", false, "serve nothing, only keep what a page server works on")
	return cmd
}

// servePages answers page faults until the file system is unmounted.
func servePages(store string, log *slog.Logger) (err error) {
	device, slots := os.NewFile(pager.DeviceFD, "/dev/fuse"), os.NewFile(pager.SlotsFD, "slots")
	if info, err := device.Stat(); err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return sandbox.Errorf(sandbox.KindInvalid, "a page server is started by the server, which gives it /dev/fuse")
	}
	files := pager.NewFiles(storedImages{snapshot.NewReader(store)}, log)
	defer func() { err = errors.Join(err, files.Close()) }()
	return fuse.Serve(device, slots, files)
}

// storedImages are the images of a snapshot store. The name of one is the digest
// of its manifest, and nothing else: a server that takes over knows names by
// listing them.
type storedImages struct{ store *snapshot.Reader }

func (s storedImages) Open(name string) (pager.Image, error) {
	d, err := snapshot.ParseDigest(name)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	image, err := s.store.Image(d)
	if err == nil {
		return storedImage{image}, nil
	}
	if _, gone := s.store.Manifest(d); gone == nil {
		return nil, fmt.Errorf("%v", err) // what is missing is a part of it: that is damage, not a wrong name
	}
	return nil, err
}

func (s storedImages) Names() ([]string, error) {
	digests, err := s.store.Manifests()
	names := make([]string, len(digests))
	for i, d := range digests {
		names[i] = d.String()
	}
	return names, err
}

type storedImage struct{ *snapshot.Image }

func (i storedImage) Bytes() int64 { return i.Manifest().Bytes() }
