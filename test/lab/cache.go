package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/lab"
)

// assetNames are what test/assets makes.
var assetNames = []string{"vmlinuz", "vmlinux", "modules", "initrd", "base.ext4"}

// cacheDisk makes a disk that is mounted as /var/cache/dormouse inside, once for
// the same content: the assets that test VMs boot, and the builds from which a
// server makes its default template without a network. Without assets it returns
// an empty name.
func cacheDisk(ctx context.Context, cache string) (string, error) {
	parts, err := cacheParts(cache)
	if errors.Is(err, fs.ErrNotExist) {
		say("lab: no assets for test VMs: %v", err)
		return "", nil
	}
	if err != nil {
		return "", err
	}
	key, err := keyOf(parts)
	if err != nil {
		return "", err
	}
	disk := filepath.Join(cache, "lab", "cache-"+key+".img")
	if _, err := os.Stat(disk); err == nil {
		now := time.Now()
		_ = os.Chtimes(disk, now, now) // it was used, so others go before it; root alone can say so
		return disk, nil
	}
	say("lab: make the disk with what sandboxes are made from")
	err = publish("lab-cache", disk, func(whole string) error {
		stage := filepath.Join(filepath.Dir(whole), "stage")
		for to, from := range parts {
			if err := linkTree(from, filepath.Join(stage, to)); err != nil {
				return err
			}
		}
		return lab.MakeDisk(ctx, whole, stage, 0)
	})
	return disk, errors.Join(err, trimDisks(filepath.Join(cache, "lab")))
}

// maxDisks bounds how many of them are kept: each change of the guest makes one, of
// 300 MiB.
const maxDisks = 4

// trimDisks removes those that have not been used for the longest time. A lab that
// runs has its disk open.
func trimDisks(dir string) error {
	disks, err := filepath.Glob(filepath.Join(dir, "cache-*.img"))
	if err != nil {
		return err
	}
	used := map[string]time.Time{}
	for _, d := range disks {
		if info, err := os.Stat(d); err == nil { // else somebody else has removed it
			used[d] = info.ModTime()
		}
	}
	slices.SortFunc(disks, func(a, b string) int { return used[b].Compare(used[a]) })
	var errs []error
	for _, d := range disks[min(maxDisks, len(disks)):] {
		if err := os.Remove(d); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// cacheParts are the folders and files of the disk, by their path on it.
func cacheParts(cache string) (map[string]string, error) {
	assets := filepath.Join(cache, "assets")
	parts := map[string]string{}
	for _, name := range assetNames {
		real, err := filepath.EvalSymlinks(filepath.Join(assets, name))
		if err != nil {
			return nil, err
		}
		parts["assets/"+name] = real
	}
	kernel := filepath.Base(filepath.Dir(parts["assets/vmlinuz"]))
	parts["kernel/"+kernel] = filepath.Join(cache, "kernel", kernel)
	data, err := os.ReadFile(filepath.Join(assets, ".store", "base", "template.json"))
	if err != nil {
		return nil, err
	}
	var base struct {
		Key string `json:"key"`
	}
	if err := json.Unmarshal(data, &base); err != nil {
		return nil, err
	}
	parts["image/"+base.Key] = filepath.Join(cache, "image", base.Key)
	for _, from := range parts {
		if _, err := os.Stat(from); err != nil {
			return nil, err
		}
	}
	return parts, nil
}

// keyOf names the parts: by path, since what is published has its content in its
// name, and by time for the one file that has not.
func keyOf(parts map[string]string) (string, error) {
	info, err := os.Stat(parts["assets/vmlinux"])
	if err != nil {
		return "", err
	}
	data, err := json.Marshal(parts) // sorts
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(fmt.Appendf(data, "%d %d", info.Size(), info.ModTime().UnixNano()))
	return hex.EncodeToString(sum[:8]), nil
}

// linkTree copies a file or a tree by hard links, which mke2fs keeps: what is in
// two places is on the disk once. Files that cannot be linked are copied.
func linkTree(from, to string) error {
	return filepath.WalkDir(from, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		target := to + strings.TrimPrefix(name, from)
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		if err := os.Link(name, target); err != nil {
			return copyFile(name, target)
		}
		return nil
	})
}
