package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// The emulator comes from a newer Debian than most machines are: under QEMU 7.2
// guests of a lab's KVM are reset now and then, and labs hang; see
// docs/decisions.md. The suite is part of the folder's name.
const (
	emulatorSuite   = "trixie"
	emulatorPackage = "qemu-system-x86"
)

// emulator unpacks QEMU, with the libraries that it needs, once. The answer is a
// program and its first arguments; without QEMU of that suite it is this machine's.
func (o options) emulator(ctx context.Context) []string {
	dir := filepath.Join(o.cache, "lab", "qemu-"+emulatorSuite)
	argv, err := emulatorIn(ctx, dir)
	if errors.Is(err, os.ErrNotExist) {
		say("lab: unpack QEMU of Debian %s", emulatorSuite)
		if err = unpackEmulator(ctx, dir); err == nil {
			argv, err = emulatorIn(ctx, dir)
		}
	}
	if err != nil {
		say("lab: this machine's QEMU it is, since that of Debian %s is not to be had: %v", emulatorSuite, err)
		return nil
	}
	return argv
}

// emulatorIn is how the QEMU below a folder is run. Its own loader finds its own
// libraries.
func emulatorIn(ctx context.Context, dir string) ([]string, error) {
	usr := func(name string) string { return filepath.Join(dir, "usr", name) }
	argv := []string{
		usr("lib64/ld-linux-x86-64.so.2"), "--library-path", usr("lib/x86_64-linux-gnu"),
		usr("bin/qemu-system-x86_64"), "-L", usr("share/qemu"), "-L", usr("share/seabios"),
	}
	if _, err := os.Stat(dir); err != nil {
		return nil, err
	}
	if said, err := exec.CommandContext(ctx, argv[0], append(argv[1:], "--version")...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%s --version: %w\n%s", argv[3], err, said)
	}
	return argv, nil
}

func unpackEmulator(ctx context.Context, dir string) error {
	return publish("lab-emulator", dir, func(whole string) error {
		said, err := exec.CommandContext(ctx, "mmdebstrap", "--mode=root", "--format=directory", "--variant=extract",
			"--architectures=amd64", "--keyring=/usr/share/keyrings", `--aptopt=Apt::Install-Recommends "false"`,
			"--include="+emulatorPackage, emulatorSuite, whole).CombinedOutput()
		if err != nil {
			return fmt.Errorf("mmdebstrap: %w\n%s", err, lastLines(string(said), 20))
		}
		for _, unused := range []string{"usr/share/doc", "usr/share/locale", "usr/share/man", "var"} {
			if err := os.RemoveAll(filepath.Join(whole, unused)); err != nil {
				return err
			}
		}
		return nil
	})
}
