// Command assets prepares what tests with real VMs boot: the guest kernel, its
// modules, an initramfs with the guest agent, and the base image. `make check`
// runs it; what is there already costs nothing. See testkit.Asset.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"github.com/dormouse-sandbox/dormouse/template"
)

func main() {
	cache := flag.String("cache", "/var/cache/dormouse", "where builds are kept")
	guest := flag.String("guest", "bin/dormouse-guest", "the guest agent")
	flag.Parse()
	if err := run(context.Background(), *cache, *guest); err != nil {
		fmt.Fprintln(os.Stderr, "assets:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, cache, guest string) error {
	out := filepath.Join(cache, "assets")
	store, err := template.Open(template.Config{Dir: filepath.Join(out, ".store"), Cache: cache})
	if err != nil {
		return err
	}
	step := ""
	a, err := store.Prepare(ctx, guest, func(e template.Event) {
		if e.Step != "" && e.Step != step {
			step = e.Step
			fmt.Println(step)
		}
	})
	if err != nil {
		return err
	}
	elf := filepath.Join(out, "vmlinux")
	if err := errors.Join(removeIfThere(elf), template.ExtractELF(a.Kernel.Image, elf)); err != nil {
		return err
	}
	return errors.Join(
		link(a.Kernel.Image, filepath.Join(out, "vmlinuz")),
		link(a.Kernel.ModulesDir, filepath.Join(out, "modules")),
		link(a.Initrd, filepath.Join(out, "initrd")),
		link(a.Base.Image, filepath.Join(out, "base.ext4")),
	)
}

// link makes or moves a symbolic link.
func link(target, path string) error {
	if err := removeIfThere(path); err != nil {
		return err
	}
	return os.Symlink(target, path)
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
