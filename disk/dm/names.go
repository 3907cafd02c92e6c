package dm

import (
	"crypto/sha256"
	"encoding/hex"
	"path/filepath"
	"regexp"
)

var (
	instanceForm = regexp.MustCompile(`^[a-z0-9]{5}$`)
	unsafeInName = regexp.MustCompile(`[^a-zA-Z0-9._-]`)
)

// What a device is, in its name behind the instance. A loop device's tag is the
// name of the device above it, and hashTag's for a hash tree.
const (
	overlayKind = "o-"
	baseKind    = "b-"
	layerKind   = "l-"
	partKind    = "p-"
	hashTag     = "h-"
)

// prefix starts the names of all that is one server's: dm<instance>-, as for
// its network.
func (d *Driver) prefix() string { return "dm" + d.cfg.Instance + "-" }

// overlayName is readable, and different for every directory.
func (d *Driver) overlayName(dir string) string {
	const readable = 30
	last := unsafeInName.ReplaceAllString(filepath.Base(dir), "_")
	return d.prefix() + overlayKind + last[:min(len(last), readable)] + "-" + short(dir)
}

func (d *Driver) baseName(id string) string { return d.prefix() + baseKind + id[:16] }

func (d *Driver) layerName(l layer) string {
	return d.prefix() + layerKind + short(l.path+"\x00"+l.seal.Root)
}

func (d *Driver) hashTag(l layer) string {
	return d.prefix() + hashTag + short(l.path+"\x00"+l.seal.Root)
}

func short(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:8])
}
