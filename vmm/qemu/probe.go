package qemu

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

const (
	// A KVM that works boots the probe in a fraction of a second. It may be nested
	// in a slow and busy machine, where the boot takes many times as long, but gets
	// on. A false one hangs before the kernel's first word, and costs the silence, once.
	defaultSilence    = 8 * time.Second
	defaultProbeLimit = time.Minute
	endLimit          = 5 * time.Second
	probeMemMiB       = 128
	maxCacheFile      = 64 << 10
)

// ProbeConfig says what a probe boots.
type ProbeConfig struct {
	// Binary is QEMU; the default is qemu-system-x86_64 on PATH.
	Binary string
	// Kernel is the real guest kernel: another one would prove nothing.
	Kernel string
	// CacheFile remembers the answer with what it was based on; empty remembers
	// nothing. It is asked anew when one of these changes: the boot of this
	// machine, its kernel, its processor, QEMU's version, the guest kernel's
	// bytes, or what /dev/kvm says.
	CacheFile string
	// Silence is for how long the console may show nothing new before the guest
	// counts as hanging; the default is 8 s.
	Silence time.Duration
	// Deadline bounds the boot, however much it says; the default is a minute.
	Deadline time.Duration
	// UID and GID are those of the VMM processes later on.
	UID, GID int
	// Log gets the outcome; nil drops it.
	Log *slog.Logger
}

// basis is everything an answer depends on.
type basis struct {
	BootID      string `json:"boot_id"`
	HostKernel  string `json:"host_kernel"`
	CPU         string `json:"cpu"`
	QEMU        string `json:"qemu"`
	GuestKernel string `json:"guest_kernel"` // SHA-256
	KVM         string `json:"kvm"`          // what the node answers; empty is ready
	UID         int    `json:"uid"`
}

type answer struct {
	Basis        basis            `json:"basis"`
	Capabilities vmm.Capabilities `json:"capabilities"`
}

// Probe finds out which accelerator works here. /dev/kvm may open, answer and
// create VMs, and still hang every guest: so it boots the guest kernel under KVM
// up to its first process, and takes software emulation if the boot falls silent
// or does not end before the deadline. The probe's VM is gone when it returns.
func Probe(ctx context.Context, config ProbeConfig) (vmm.Capabilities, error) {
	config = config.withDefaults()
	d, err := New(Config{Binary: config.Binary, Accelerator: KVM, StartLimit: config.Silence})
	if err != nil {
		return vmm.Capabilities{}, err
	}
	b, err := d.basis(config)
	if err != nil {
		return vmm.Capabilities{}, fmt.Errorf("probe KVM: %w", err)
	}
	if got, ok := recall(config.CacheFile, b); ok {
		return got, nil
	}
	caps := vmm.Capabilities{Driver: Name, Version: d.version}
	caps.Accelerator, caps.Reason, err = d.decide(ctx, config, b)
	if err != nil {
		return vmm.Capabilities{}, fmt.Errorf("probe KVM: %w", err)
	}
	config.Log.Info("accelerator chosen", "accelerator", caps.Accelerator, "reason", caps.Reason)
	if err := remember(config.CacheFile, answer{b, caps}); err != nil {
		config.Log.Warn("cannot remember the accelerator", "err", err) // it is only asked again
	}
	return caps, nil
}

func (c ProbeConfig) withDefaults() ProbeConfig {
	if c.Silence <= 0 {
		c.Silence = defaultSilence
	}
	if c.Deadline <= 0 {
		c.Deadline = defaultProbeLimit
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// decide answers, with a reason for people. An error is one of the probe itself
// and says nothing about KVM.
func (d *Driver) decide(ctx context.Context, config ProbeConfig, b basis) (accelerator, reason string, err error) {
	if b.KVM != "" {
		return TCG, b.KVM, nil
	}
	dir, err := os.MkdirTemp("", "probe-")
	if err != nil {
		return "", "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	started := time.Now()
	trouble, err := d.tryBoot(ctx, config, dir)
	if err != nil {
		return "", "", err
	}
	if trouble != "" {
		trouble, _, _ = strings.Cut(trouble, "; ") // QEMU's first line says it, what follows is how it fell
		return TCG, "/dev/kvm exists, but the guest kernel did not boot under it: " + trouble, nil
	}
	took := time.Since(started).Round(10 * time.Millisecond)
	return KVM, fmt.Sprintf("the guest kernel booted under KVM in %v", took), nil
}

// tryBoot boots the probe under KVM and kills it, whatever happens. An empty
// trouble is success.
func (d *Driver) tryBoot(ctx context.Context, config ProbeConfig, dir string) (trouble string, err error) {
	archive, err := probeInitramfs()
	if err != nil {
		return "", err
	}
	initrd := filepath.Join(dir, "initrd")
	if err := os.WriteFile(initrd, archive, 0o444); err != nil {
		return "", err
	}
	caller := ctx
	ctx, cancel := context.WithTimeout(ctx, config.Deadline)
	defer cancel()
	m, err := d.Start(ctx, vmm.Spec{
		ID: sandbox.NewID(), VCPUs: 1, MemMiB: probeMemMiB, Kernel: config.Kernel, Initrd: initrd, Dir: dir,
		UID: config.UID, GID: config.GID,
	})
	if caller.Err() != nil {
		return "", errors.Join(caller.Err(), end(m))
	}
	if err != nil {
		return err.Error(), nil
	}
	trouble = waitForProbe(ctx, m, config)
	return trouble, errors.Join(caller.Err(), end(m))
}

// waitForProbe looks for the marker until the console has been silent for too
// long, the deadline, or the end of the VM.
func waitForProbe(ctx context.Context, m vmm.Machine, config ProbeConfig) (trouble string) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	said, spoke := 0, time.Now()
	seen := func() bool {
		console, _, err := m.Console(0, 1<<20)
		if len(console) > said {
			said, spoke = len(console), time.Now()
		}
		return err == nil && strings.Contains(string(console), probeMarker)
	}
	for {
		select {
		case <-tick.C:
			if seen() {
				return ""
			}
			if time.Since(spoke) > config.Silence {
				return fmt.Sprintf("it hangs: nothing on its console for %v, after %d bytes", config.Silence, said)
			}
		case <-m.Done():
			if seen() {
				return ""
			}
			return "it ended early: " + m.Exit().Detail
		case <-ctx.Done():
			return fmt.Sprintf("no first process within %v", config.Deadline)
		}
	}
}

// end kills the probe's VM, whatever became of the caller.
func end(m vmm.Machine) error {
	if m == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), endLimit)
	defer cancel()
	return errors.Join(m.Kill(ctx), m.Release())
}

func (d *Driver) basis(config ProbeConfig) (b basis, err error) {
	b = basis{QEMU: d.version, CPU: kernel.CPUModel(), UID: config.UID}
	if b.BootID, err = kernel.BootID(); err != nil {
		return b, err
	}
	if b.HostKernel, err = kernel.Release(); err != nil {
		return b, err
	}
	if b.GuestKernel, err = digest(config.Kernel); err != nil {
		return b, fmt.Errorf("read guest kernel: %w", err)
	}
	if err := kernel.KVM(); err != nil {
		b.KVM = err.Error()
	} else if config.UID != 0 && kernel.NodeShut("/dev/kvm") {
		b.KVM = "/dev/kvm is root's alone, and VMs run as users of their own: chgrp kvm /dev/kvm && chmod 660 /dev/kvm (udev does that)"
	}
	return b, nil
}

func digest(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }() // read only
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// recall reads an earlier answer. One that cannot be read, or that was based on
// something else, does not count.
func recall(path string, b basis) (vmm.Capabilities, bool) {
	if path == "" {
		return vmm.Capabilities{}, false
	}
	data, err := osfs.ReadFileLimit(path, maxCacheFile)
	if err != nil {
		return vmm.Capabilities{}, false
	}
	var a answer
	if json.Unmarshal(data, &a) != nil || a.Basis != b || a.Capabilities.Driver != Name {
		return vmm.Capabilities{}, false
	}
	return a.Capabilities, true
}

func remember(path string, a answer) error {
	if path == "" {
		return nil
	}
	data, err := json.MarshalIndent(a, "", "  ")
	if err != nil {
		return err
	}
	return osfs.WriteFile("kvm-probe", path, append(data, '\n'), 0o644)
}
