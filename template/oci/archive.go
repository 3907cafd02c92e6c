package oci

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/dormouse-sandbox/dormouse/internal/sparse"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// refName is the annotation with which a layout names its images.
const refName = "org.opencontainers.image.ref.name"

// OpenLayout finds an image in an OCI layout, a folder. With more than one in
// it, name says which: its ref.name. Links in the folder do not lead out of it.
func OpenLayout(ctx context.Context, dir, name string) (*Image, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open layout: %w", err)
	}
	image, err := readLayout(ctx, files{root}, name)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("layout %s: %w", dir, err), root.Close())
	}
	image.close = root.Close
	return image, nil
}

// OpenArchive finds an image in an archive, OCI's or what "docker save" writes,
// plain or compressed with gzip, zstd, xz or bzip2. Its parts go into scratch, a
// folder that exists and is empty; Close empties it.
func OpenArchive(ctx context.Context, r io.Reader, scratch, name string) (_ *Image, err error) {
	root, err := os.OpenRoot(scratch)
	if err != nil {
		return nil, fmt.Errorf("open archive: %w", err)
	}
	empty := func() error { return errors.Join(removeContent(root), root.Close()) }
	image, err := readArchive(ctx, r, files{root}, name)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("archive: %w", err), empty())
	}
	image.close = empty
	return image, nil
}

func removeContent(root *os.Root) error {
	entries, err := fs.ReadDir(root.FS(), ".")
	errs := []error{err}
	for _, e := range entries {
		errs = append(errs, root.RemoveAll(e.Name()))
	}
	return errors.Join(errs...)
}

// files is a source: the folder of a layout, or of an archive's parts.
type files struct{ root *os.Root }

func blobPath(d v1.Hash) string { return "blobs/" + d.Algorithm + "/" + d.Hex }

func (f files) manifest(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	return readAll(f)(ctx, d)
}

func (f files) blob(_ context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	return f.open(blobPath(d.Digest))
}

// open opens a regular file: a pipe in its place would keep us waiting.
func (f files) open(name string) (io.ReadCloser, error) {
	info, err := f.root.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, invalid("%.200q is missing", name)
	}
	if err != nil {
		return nil, sandbox.WithKind(sandbox.KindInvalid, err)
	}
	if !info.Mode().IsRegular() {
		return nil, invalid("%.200q is not a file", name)
	}
	return f.root.Open(name)
}

func (f files) read(name string) ([]byte, error) {
	r, err := f.open(name)
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(r, maxMetadata+1))
	return data, errors.Join(err, r.Close())
}

func readLayout(ctx context.Context, from files, name string) (*Image, error) {
	raw, err := from.read("index.json")
	if err != nil {
		return nil, err
	}
	index, err := indexOf(raw)
	if err != nil {
		return nil, err
	}
	if index == nil {
		return nil, invalid("its index.json is not an index")
	}
	if raw, err = named(index, name); err != nil {
		return nil, err
	}
	return readImage(ctx, from, raw)
}

// named makes an index of those images that have a name, or of all.
func named(index *v1.IndexManifest, name string) ([]byte, error) {
	var names []string
	var found []v1.Descriptor
	for _, d := range index.Manifests {
		have := d.Annotations[refName]
		if have != "" && !slices.Contains(names, have) {
			names = append(names, have)
		}
		if name == "" || have == name {
			found = append(found, d)
		}
	}
	if len(found) == 0 {
		return nil, sandbox.Errorf(sandbox.KindNotFound, "it has no image named %.100q; it has: %.500s", name, strings.Join(names, ", "))
	}
	if name == "" && len(names) > 1 {
		return nil, invalid("it holds several images, say which: %.500s", strings.Join(names, ", "))
	}
	return json.Marshal(v1.IndexManifest{SchemaVersion: 2, Manifests: found})
}

func readArchive(ctx context.Context, r io.Reader, to files, name string) (*Image, error) {
	source := &meter{ctx: ctx, r: r}
	content, done, err := decompress(source)
	if err != nil {
		return nil, err
	}
	defer done()
	limits := Limits{Bytes: maxBlob}.withDefaults()
	if err := to.extract(&valve{r: content, packed: source, limits: limits}); err != nil {
		return nil, err
	}
	if _, err := to.root.Stat("index.json"); err == nil {
		return readLayout(ctx, to, name)
	}
	if _, err := to.root.Stat("manifest.json"); err != nil {
		return nil, invalid("it has neither an index.json nor a manifest.json: it is not an archive of an image")
	}
	return readDocker(to, name)
}

// extract puts the parts of an archive into its folder. It takes files, folders
// and, for Docker's older archives, links between files; names are as hostile as
// in a layer.
func (f files) extract(r io.Reader) error {
	budget := newBudget(Limits{Bytes: maxBlob, Entries: 10_000})
	tree := &Tree{root: f.root}
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return tree.forget()
		}
		if err != nil {
			return errors.Join(broken(err), tree.forget())
		}
		if err := extractOne(tree, budget, h, tr); err != nil {
			return errors.Join(in(h.Name, err), tree.forget())
		}
	}
}

func extractOne(tree *Tree, budget *budget, h *tar.Header, data io.Reader) error {
	if err := budget.entry(h.Name, h.Linkname); err != nil {
		return err
	}
	name, err := clean(h.Name)
	if err != nil || name == "" || h.Typeflag == tar.TypeDir || h.Typeflag == tar.TypeXGlobalHeader {
		return err
	}
	dir, _, err := tree.folder(parent(name), func(string) error { return budget.entry() })
	if err != nil {
		return err
	}
	base := path.Base(name)
	if err := tree.clear(dir, base, false); err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeReg:
		if err := budget.data(h.Size); err != nil {
			return err
		}
		f, err := dir.OpenFile(base, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		_, err = sparse.Copy(f, data)
		return errors.Join(broken(err), f.Close())
	case tar.TypeSymlink: // os.Root follows it when it is read, or refuses
		return dir.Symlink(h.Linkname, base)
	}
	return invalid("it is of the type %q, which an archive of an image does not have", h.Typeflag)
}

// dockerManifest is one image in the manifest.json of an archive.
type dockerManifest struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func readDocker(from files, name string) (*Image, error) {
	raw, err := from.read("manifest.json")
	if err != nil {
		return nil, err
	}
	var list []dockerManifest
	if err := parse(raw, &list); err != nil {
		return nil, fmt.Errorf("parse manifest.json: %w", err)
	}
	m, err := chooseDocker(list, name)
	if err != nil {
		return nil, err
	}
	config, err := from.read(m.Config)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	image := &Image{Digest: digestOf(config)}
	for _, l := range m.Layers {
		image.layers = append(image.layers, layer{
			size: -1, open: func(context.Context) (io.ReadCloser, error) { return from.open(l) },
		})
	}
	return image, image.describe(config)
}

func chooseDocker(list []dockerManifest, name string) (dockerManifest, error) {
	var tags []string
	for _, m := range list {
		tags = append(tags, m.RepoTags...)
		if name != "" && slices.Contains(m.RepoTags, name) {
			return m, nil
		}
	}
	switch {
	case name != "":
		return dockerManifest{}, sandbox.Errorf(sandbox.KindNotFound, "it has no image named %.100q; it has: %.500s", name, strings.Join(tags, ", "))
	case len(list) != 1:
		return dockerManifest{}, invalid("it holds %d images, say which: %.500s", len(list), strings.Join(tags, ", "))
	}
	return list[0], nil
}
