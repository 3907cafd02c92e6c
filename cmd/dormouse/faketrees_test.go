package main

import (
	"bytes"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/internal/tree"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// fakeTrees is what sandboxes have on their disks: a directory of the test for all
// of them, in which relative paths count from "home".
type fakeTrees struct {
	disk string
	// raw is what a hostile guest sends for every directory; cut says that it then
	// goes away.
	raw []byte
	cut bool
	// onWrite is asked before an upload is read.
	onWrite func() error
}

func (f *fakeTrees) inside(r *http.Request) (shown, here string) {
	shown = r.URL.Query().Get("path")
	if !strings.HasPrefix(shown, "/") {
		shown = filepath.Join("/home", shown)
	}
	return shown, filepath.Join(f.disk, shown)
}

// stat answers for directories on the disk.
func (f *fakeTrees) stat(w http.ResponseWriter, r *http.Request) bool {
	if f.disk == "" {
		return false
	}
	shown, here := f.inside(r)
	info, err := os.Stat(here)
	if err != nil || !info.IsDir() {
		return false
	}
	writeJSON(w, api.File{Path: shown, Type: "directory", Mode: uint32(info.Mode().Perm())})
	return true
}

func (f *fakeServer) readTree(w http.ResponseWriter, r *http.Request, _ *api.Sandbox) {
	shown, here := f.trees.inside(r)
	root, err := os.OpenRoot(here)
	if err != nil {
		refuse(w, sandbox.KindNotFound, "directory "+shown+" does not exist")
		return
	}
	defer func() { _ = root.Close() }()
	if f.trees.raw != nil {
		_, err = io.Copy(w, bytes.NewReader(f.trees.raw))
	} else {
		_, err = tree.Pack(r.Context(), w, root, nil)
	}
	if err != nil || f.trees.cut {
		_ = http.NewResponseController(w).Flush() // it is broken off
		panic(http.ErrAbortHandler)
	}
}

func (f *fakeServer) writeTree(w http.ResponseWriter, r *http.Request, _ *api.Sandbox) {
	shown, here := f.trees.inside(r)
	if f.trees.onWrite != nil {
		if err := f.trees.onWrite(); err != nil {
			refuse(w, sandbox.KindOf(err), err.Error())
			return
		}
	}
	_, err := os.Stat(here)
	isNew := os.IsNotExist(err)
	if err := os.MkdirAll(here, 0o755); err != nil {
		refuse(w, sandbox.KindConflict, err.Error())
		return
	}
	root, err := os.OpenRoot(here)
	if err != nil {
		refuse(w, sandbox.KindInternal, err.Error())
		return
	}
	defer func() { _ = root.Close() }()
	made, err := tree.Unpack(r.Body, root, tree.Options{New: isNew})
	if err != nil {
		refuse(w, sandbox.KindOf(err), err.Error())
		return
	}
	writeJSON(w, api.Tree{
		Path: shown, Files: made.Files, Directories: made.Directories, Bytes: made.Bytes, Skipped: made.Skipped, FirstSkipped: made.FirstSkipped,
	})
}
