package oci_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template/oci"
	"github.com/dormouse-sandbox/dormouse/template/oci/ocitest"
)

var creds = oci.Credentials{Username: ocitest.User, Password: ocitest.Password}

// small is an image of three layers: gzip, zstd and plain.
func small(t testing.TB) *ocitest.Image {
	t.Helper()
	plain := [][]byte{tarOf(t, dir("etc"), file("etc/a", "1")), tarOf(t, file("etc/a", "2"), file("b", "1")), tarOf(t, whiteout(".wh.b"), file("c", "3"))}
	i := ocitest.ImageOf(gz(t, plain[0]), zst(t, plain[1]), plain[2])
	i.Plain = plain
	i.Types[0], i.Types[1] = "application/vnd.docker.image.rootfs.diff.tar.gzip", "application/vnd.oci.image.layer.v1.tar+zstd"
	i.Config = map[string]any{
		"Env": []string{"PATH=/bin", "EMPTY=", "A=b=c"}, "User": "app:www", "WorkingDir": "/srv",
		"Entrypoint": []string{"/bin/app"}, "Cmd": []string{"--serve"}, "Labels": map[string]string{"a": "b"},
		"ExposedPorts": map[string]any{"8080/tcp": struct{}{}, "53/udp": struct{}{}}, "StopSignal": "SIGINT",
		"Healthcheck": map[string]any{"Test": []string{"CMD", "/bin/ok"}, "Interval": 5_000_000_000, "Retries": 3},
	}
	return i
}

var smallConfig = oci.Config{
	Env: map[string]string{"PATH": "/bin", "EMPTY": "", "A": "b=c"}, User: "app:www", WorkingDir: "/srv",
	Entrypoint: []string{"/bin/app"}, Cmd: []string{"--serve"}, Labels: map[string]string{"a": "b"},
	ExposedPorts: []string{"53/udp", "8080/tcp"}, StopSignal: "SIGINT",
	Healthcheck: &oci.Healthcheck{Test: []string{"CMD", "/bin/ok"}, Interval: 5 * time.Second, Retries: 3},
}

// whole asks for everything that small has.
func whole(t testing.TB, i *oci.Image) {
	t.Helper()
	if diff := cmp.Diff(smallConfig, i.Config); diff != "" {
		t.Errorf("configuration: %s", diff)
	}
	p := newPlace(t)
	var notes []string
	if _, err := i.Unpack(t.Context(), p.tree, oci.Limits{}, func(done, of int, line string) { notes = append(notes, line) }); err != nil {
		t.Fatal(err)
	}
	if p.names(t) != "c etc etc/a" || p.read(t, "etc/a") != "2" || len(notes) != 3 {
		t.Errorf("the tree has %q, etc/a is %q, notes %q", p.names(t), p.read(t, "etc/a"), notes)
	}
	if err := i.Close(); err != nil {
		t.Error(err)
	}
}

func TestRegistry(t *testing.T) {
	r := ocitest.NewRegistry(t)
	blobs, manifest := small(t).Parts(t)
	other, arm := (&ocitest.Image{OS: "linux", Arch: "arm64"}).Parts(t)
	ref := r.Push(t, "one", blobs, manifest, ocitest.Manifest)
	r.Push(t, "arm", other, arm, ocitest.Manifest)
	index := ocitest.JSON(t, map[string]any{"schemaVersion": 2, "mediaType": ocitest.Index, "manifests": []any{
		ocitest.Descriptor(arm, "", "linux", "arm64"), ocitest.Descriptor(arm, "", "unknown", "unknown"), ocitest.Descriptor(manifest, "", "linux", "amd64"),
	}})
	many := r.Push(t, "many", nil, index, ocitest.Index)
	for name, ref := range map[string]string{"by tag": ref, "by digest": strings.TrimSuffix(ref, ":one") + "@" + sum(manifest), "for several machines": many} {
		t.Run(name, func(t *testing.T) {
			i, err := oci.Pull(t.Context(), ref, creds)
			if err != nil {
				t.Fatal(err)
			}
			if i.Digest != sum(manifest) {
				t.Errorf("digest %s, want %s", i.Digest, sum(manifest))
			}
			whole(t, i)
		})
	}
	armIndex := ocitest.JSON(t, map[string]any{"schemaVersion": 2, "mediaType": ocitest.Index, "manifests": []any{ocitest.Descriptor(arm, "", "linux", "arm64")}})
	r.Push(t, "armindex", nil, armIndex, ocitest.Index)
	for _, tt := range []struct {
		name, ref string
		creds     oci.Credentials
		kind      sandbox.Kind
		says      string
	}{
		{"no credentials", ref, oci.Credentials{}, sandbox.KindInvalid, "credentials are missing or wrong"},
		{"wrong credentials", ref, oci.Credentials{Username: "me", Password: "x"}, sandbox.KindInvalid, "credentials are missing or wrong"},
		{"no such tag", ref + "x", creds, sandbox.KindNotFound, "onex"},
		{"no reference", "Not A Reference", creds, sandbox.KindInvalid, "could not parse reference"},
		{"another machine", strings.Replace(ref, ":one", ":arm", 1), creds, sandbox.KindInvalid, "the image is for linux/arm64"},
		{"an index of other machines", strings.Replace(ref, ":one", ":armindex", 1), creds, sandbox.KindInvalid, "only for: linux/arm64"},
		{"a cloud's metadata", "169.254.169.254/a/b:c", creds, sandbox.KindInvalid, "no address of a registry"},
		{"nobody there", "127.0.0.1:1/a/b:c", creds, sandbox.KindTransient, "refused"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := oci.Pull(t.Context(), tt.ref, tt.creds)
			if !sandbox.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
			}
			if err != nil && tt.creds.Password != "" && strings.Contains(err.Error(), "secret") {
				t.Errorf("the password is in the error: %v", err)
			}
		})
	}
}

// TestOtherBytes: nothing that was changed on its way is taken.
func TestOtherBytes(t *testing.T) {
	flip := func(b []byte) []byte { b = bytes.Clone(b); b[1024] ^= 1; return b }
	for _, tt := range []struct {
		name   string
		change func(blobs map[string][]byte, i *ocitest.Image)
		says   string
	}{
		{"a layer with a flipped bit", func(b map[string][]byte, i *ocitest.Image) { d := sum(i.Layers[2]); b[d] = flip(b[d]) }, "have the digest"},
		{"a layer with more behind it", func(b map[string][]byte, i *ocitest.Image) {
			d := sum(i.Layers[2])
			b[d] = append(bytes.Clone(b[d]), make([]byte, 512)...)
		}, "bytes, not"},
		{"a layer that is cut off", func(b map[string][]byte, i *ocitest.Image) { d := sum(i.Layers[2]); b[d] = b[d][:1024] }, ""},
		{"a layer that is missing", func(b map[string][]byte, i *ocitest.Image) { delete(b, sum(i.Layers[1])) }, "missing"},
		{"a layer that is another one unpacked", nil, "as unpacked"},
		{"a configuration with a flipped bit", func(b map[string][]byte, i *ocitest.Image) {
			for d, data := range b {
				if bytes.Contains(data, []byte("diff_ids")) {
					b[d] = bytes.Replace(data, []byte("/srv"), []byte("/usr"), 1)
				}
			}
		}, "its bytes have the digest"},
		{"a manifest with a flipped bit", func(b map[string][]byte, i *ocitest.Image) {
			for d, data := range b {
				if bytes.Contains(data, []byte("schemaVersion")) {
					b[d] = append(data, ' ')
				}
			}
		}, "its bytes have the digest"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			i := small(t)
			if tt.change == nil {
				i.Plain[0] = tarOf(t, file("other", ""))
			}
			blobs, manifest := i.Parts(t)
			if tt.change != nil {
				tt.change(blobs, i)
			}
			p := newPlace(t)
			found, err := oci.OpenLayout(t.Context(), ocitest.Layout(t, blobs, ocitest.Descriptor(manifest, "")), "")
			if err == nil {
				_, err = found.Unpack(t.Context(), p.tree, oci.Limits{}, nil)
				_ = found.Close()
			}
			if !sandbox.Is(err, sandbox.KindInvalid) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
			}
		})
	}
}

func dockerArchive(t testing.TB, i *ocitest.Image) []byte {
	t.Helper()
	blobs, _ := i.Parts(t)
	var config string
	for d, data := range blobs {
		if bytes.Contains(data, []byte("diff_ids")) {
			config = d
		}
	}
	entries := []entry{dir("x"), file("c.json", string(blobs[config])), link("x/layer.tar", "../y.tar")}
	for n, name := range []string{"y.tar", "1.tar", "2.tar"} {
		entries = append(entries, file(name, string(i.Layers[n])))
	}
	entries = append(entries, file("manifest.json", string(ocitest.JSON(t, []map[string]any{
		{"Config": "c.json", "RepoTags": []string{"a:1"}, "Layers": []string{"x/layer.tar", "1.tar", "2.tar"}},
	}))))
	return tarOf(t, entries...)
}

func TestLayoutsAndArchives(t *testing.T) {
	i, rare := small(t), small(t)
	rare.Layers[0], rare.Layers[1] = xzOf(t, rare.Plain[0]), bz2(t, rare.Plain[1])
	blobs, manifest := i.Parts(t)
	folder := ocitest.Layout(t, blobs, ocitest.Descriptor(manifest, "v1"), ocitest.Descriptor([]byte("another"), "v2"))
	t.Run("a layout by name", func(t *testing.T) {
		found, err := oci.OpenLayout(t.Context(), folder, "v1")
		if err != nil {
			t.Fatal(err)
		}
		whole(t, found)
	})
	for name, archive := range map[string][]byte{
		"an archive of a layout": ocitest.Pack(t, folder), "one in gzip": gz(t, ocitest.Pack(t, folder)), "one of Docker's": dockerArchive(t, i),
		"one of Docker's with layers in xz and bzip2": dockerArchive(t, rare), "one of Docker's in xz": xzOf(t, dockerArchive(t, i)),
	} {
		t.Run(name, func(t *testing.T) {
			scratch := t.TempDir()
			which := "v1"
			if strings.Contains(name, "Docker") {
				which = "a:1"
			}
			found, err := oci.OpenArchive(t.Context(), bytes.NewReader(archive), scratch, which)
			if err != nil {
				t.Fatal(err)
			}
			whole(t, found)
			if left, err := os.ReadDir(scratch); err != nil || len(left) > 0 {
				t.Errorf("left in the scratch folder: %v, %v", left, err)
			}
		})
	}
}

func TestBadArchives(t *testing.T) {
	blobs, manifest := small(t).Parts(t)
	folder := ocitest.Layout(t, blobs, ocitest.Descriptor(manifest, "v1"), ocitest.Descriptor(manifest, "v2"))
	escape := tarOf(t, link("index.json", "../outside/secret"))
	for _, tt := range []struct {
		name, which string
		archive     []byte
		kind        sandbox.Kind
		says        string
	}{
		{"which one is not said", "", ocitest.Pack(t, folder), sandbox.KindInvalid, "say which: v1, v2"},
		{"none of that name", "v3", ocitest.Pack(t, folder), sandbox.KindNotFound, "it has: v1, v2"},
		{"none of that name in Docker's", "b:2", dockerArchive(t, small(t)), sandbox.KindNotFound, "it has: a:1"},
		{"no image at all", "", tarOf(t, file("f", "")), sandbox.KindInvalid, "not an archive of an image"},
		{"no archive at all", "", []byte("hello"), sandbox.KindInvalid, "not a whole tar file"},
		{"a name that leads up", "", tarOf(t, file("../secret", "")), sandbox.KindInvalid, "leads upwards"},
		{"an index that is a link out", "", escape, sandbox.KindInvalid, ""},
		{"a blob that is a device", "", tarOf(t, device("blobs/x")), sandbox.KindInvalid, "does not have"},
		{"an index that is too large", "", tarOf(t, file("index.json", strings.Repeat(" ", 5<<20))), sandbox.KindInvalid, "at most 4194304"},
		{"layers of another kind", "", tarOf(t,
			file("manifest.json", `[{"Config":"../outside/secret","Layers":[]}]`)), sandbox.KindInvalid, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPlace(t)
			_, err := oci.OpenArchive(t.Context(), bytes.NewReader(tt.archive), p.tree, tt.which)
			if !sandbox.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.says) || strings.Contains(err.Error(), "beside") {
				t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
			}
			p.untouched(t)
			if left, err := os.ReadDir(p.tree); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}

// A layout on the host must not lead out of its folder either.
func TestLayoutWithALinkOut(t *testing.T) {
	p := newPlace(t)
	if err := os.Symlink("../outside/secret", filepath.Join(p.tree, "index.json")); err != nil {
		t.Fatal(err)
	}
	if _, err := oci.OpenLayout(t.Context(), p.tree, ""); !sandbox.Is(err, sandbox.KindInvalid) {
		t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
	}
}
