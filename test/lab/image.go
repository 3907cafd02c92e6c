package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/template"
)

// recipe is the lab's root file system. Its kernel comes with it, so that the
// modules in it fit. What tests ask for on PATH is in the list too.
func recipe() template.Recipe {
	return template.Recipe{
		Name:  "lab",
		Suite: "bookworm",
		Packages: []string{
			"linux-image-cloud-amd64", "kmod", "procps", "strace", "psmisc", "less", "sudo", "netbase", "ca-certificates",
			"qemu-system-x86", "qemu-utils", "mmdebstrap", "debian-archive-keyring", "xz-utils", "busybox-static", "musl",
			"dmsetup", "cryptsetup-bin", "thin-provisioning-tools", "e2fsprogs", "fdisk", "fuse3",
			"iproute2", "iputils-ping", "nftables", "iptables", "curl", "python3",
		},
		User: "user",
		Env:  map[string]string{"LANG": "C.UTF-8"},
		// A fresh image has little to write to: scratch has a disk of its own.
		Revision: "1",
	}
}

// machine is what a lab boots. It is found in a file, since preparing needs root
// and using does not.
type machine struct {
	Kernel string // an ELF file: unpacking a bzImage under emulation costs a second
	Initrd string
	Root   string
	QEMU   []string // see lab.Config
	Cache  string   // a disk with what sandboxes are made from; empty if there is none
}

func machineFile(cache string) string { return filepath.Join(cache, "lab", "lab.json") }

func readMachine(cache string) (machine, error) {
	var m machine
	data, err := os.ReadFile(machineFile(cache))
	if err == nil {
		err = json.Unmarshal(data, &m)
	}
	if err != nil {
		return m, fmt.Errorf("no lab is prepared (make lab does it): %w", err)
	}
	return m, nil
}

// prepare builds or finds the parts of the lab. What is there already costs
// nothing but looking.
func (o options) prepare(ctx context.Context) error {
	begun := time.Now()
	m, err := o.build(ctx)
	if err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	m.QEMU = o.emulator(ctx)
	if m.Cache, err = cacheDisk(ctx, o.cache); err != nil {
		return fmt.Errorf("prepare: disk with what sandboxes are made from: %w", err)
	}
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if err := osfs.WriteFile("lab-machine", machineFile(o.cache), append(data, '\n'), 0o644); err != nil {
		return err
	}
	say("lab: prepared in %.1fs", time.Since(begun).Seconds())
	return nil
}

func (o options) build(ctx context.Context) (machine, error) {
	store, err := template.Open(template.Config{Dir: filepath.Join(o.cache, "assets", ".store"), Cache: o.cache})
	if err != nil {
		return machine{}, err
	}
	step := ""
	progress := func(e template.Event) {
		if e.Step != "" && e.Step != step {
			step = e.Step
			say("lab: %s", step)
		}
	}
	image, err := store.Build(ctx, recipe(), progress)
	if err != nil {
		return machine{}, err
	}
	config, err := kernelOf(ctx, image, filepath.Join(o.cache, "lab"))
	if err != nil {
		return machine{}, fmt.Errorf("take the kernel out of the lab's image: %w", err)
	}
	kernel, err := store.Kernel(ctx, config, progress)
	if err != nil {
		return machine{}, err
	}
	m := machine{Root: image.Image}
	if m.Kernel, err = store.ELF(ctx, kernel); err != nil {
		return machine{}, err
	}
	m.Initrd, err = store.Initramfs(ctx, kernel, o.init)
	return m, err
}

// kernelOf copies kernel and modules out of an image, once per image.
func kernelOf(ctx context.Context, image template.Template, dir string) (template.KernelConfig, error) {
	out := filepath.Join(dir, strings.TrimPrefix(image.Digest, "sha256:"))
	if config, err := findKernel(out); err == nil {
		return config, nil
	}
	err := publish("lab-kernel", out, func(whole string) error {
		if err := os.Mkdir(whole, 0o755); err != nil {
			return err
		}
		for _, from := range []string{"/boot", "/usr/lib/modules"} {
			// debugfs reads the file system without mounting it, and exits with 0 always.
			said, err := exec.CommandContext(ctx, "debugfs", "-R", "rdump "+from+" "+whole, image.Image).CombinedOutput()
			if err != nil {
				return fmt.Errorf("debugfs: %w\n%s", err, said)
			}
		}
		_, err := findKernel(whole)
		return err
	})
	if err != nil {
		return template.KernelConfig{}, err
	}
	return findKernel(out)
}

func findKernel(dir string) (template.KernelConfig, error) {
	image, err := only(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil {
		return template.KernelConfig{}, err
	}
	modules, err := only(filepath.Join(dir, "modules", "*"))
	return template.KernelConfig{Image: image, ModulesDir: modules}, err
}

func only(pattern string) (string, error) {
	found, err := filepath.Glob(pattern)
	if err == nil && len(found) != 1 {
		err = fmt.Errorf("%d files are %s, not one", len(found), pattern)
	}
	if err != nil {
		return "", err
	}
	return found[0], nil
}
