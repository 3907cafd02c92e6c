package doctor

import (
	"fmt"
	"slices"
	"strings"
)

const emulation = "QEMU's software emulation will be used: slower, and its makers do not call it a security boundary. " +
	"Run only code that you would run on this machine anyway"

func kvm(f Facts) Finding {
	k := f.KVM
	x := Finding{Name: "kvm", Status: Warn, Why: emulation}
	switch {
	case k.Probed && k.Works:
		return Finding{Name: "kvm", Status: OK, Found: "works: " + k.Reason}
	case k.Probed:
		x.Found = "does not work: " + k.Reason
		x.Cure = "no cure if this is a VM whose owner does not nest; else see the modules: " + loaded(k)
	case !k.Present && k.CPUFlag == "":
		x.Found = "no " + k.Path + ", and the CPU shows neither vmx nor svm"
		x.Cure = "enable virtualisation in the firmware, or nested virtualisation where this VM is run"
	case !k.Present:
		x.Found = "no " + k.Path + " (CPU has " + k.CPUFlag + "; " + loaded(k) + ")"
		x.Cure = "modprobe " + map[string]string{"vmx": "kvm_intel", "svm": "kvm_amd"}[k.CPUFlag]
	case k.OpenErr != "":
		x.Found = k.Path + " cannot be opened: " + k.OpenErr
		x.Cure = "look as root: sudo dormouse doctor --probe"
	case !slices.Contains(k.Modules, "kvm_intel") && !slices.Contains(k.Modules, "kvm_amd"):
		x.Found = k.Path + " opens, but " + loaded(k) + ": it may hang every guest"
		x.Cure = "dormouse doctor --probe boots a guest and tells; dormouse up does so by itself"
	default:
		x.Found = k.Path + " opens; no guest was booted yet (" + loaded(k) + ")"
		x.Why = ""
		x.Cure = "dormouse doctor --probe boots one and tells; dormouse up does so by itself"
	}
	return x
}

func loaded(k KVM) string {
	if len(k.Modules) == 0 {
		return "no kvm module shows"
	}
	return "modules: " + strings.Join(k.Modules, ", ")
}

func device(name string, d Device, needed bool, why string) Finding {
	bad := Warn
	if needed {
		bad = Missing
	}
	switch {
	case !d.Present:
		return Finding{
			Name: name, Status: bad, Found: "no " + d.Path, Why: why,
			Cure: "modprobe " + name + "; in a container, pass the device in",
		}
	case d.OpenErr != "":
		// A server run by root opens what its user cannot.
		return Finding{Name: name, Status: Warn, Found: d.Path + " cannot be opened: " + d.OpenErr, Why: why, Cure: "look as root: sudo dormouse doctor"}
	}
	return Finding{Name: name, Status: OK, Found: d.Path}
}

func port(f Facts) Finding {
	p := f.Port
	x := Finding{Name: "port", Status: OK, Found: p.Addr + " is free"}
	switch {
	case p.Err == "":
	case p.Dormouse:
		x.Found = "a Dormouse server answers at " + p.Addr
	default:
		x.Status = Missing
		x.Found = p.Addr + ": " + p.Err
		if p.PID != 0 {
			x.Found = fmt.Sprintf("%s is taken by %s (PID %d)", p.Addr, p.Program, p.PID)
		}
		x.Why = "the server listens there"
		x.Cure = "end that program, or choose another port: dormouse up --listen 127.0.0.1:PORT"
	}
	return x
}

// network takes over what package netns says, with what it means for a server.
func network(f Facts) []Finding {
	if !f.Root || len(f.Network) == 0 {
		return []Finding{{Name: "network", Status: Warn, Found: "not looked at: that needs root", Cure: "sudo dormouse doctor"}}
	}
	var findings []Finding
	for _, n := range f.Network {
		x := Finding{Name: n.Name, Status: OK, Found: n.Text}
		switch {
		case n.OK:
		case n.Name == ForwardDrop:
			x.Status, x.Cure = Warn, n.Cure
			x.Why = "sandboxes run, but reach no internet: a packet must pass every firewall there is"
		default:
			x.Status, x.Cure = Missing, n.Cure
			x.Why = "every sandbox has a network of its own"
		}
		findings = append(findings, x)
	}
	return findings
}

func memory(f Facts) Finding {
	x := Finding{Name: "memory", Status: OK, Found: fmt.Sprintf("%d MiB available of %d MiB", f.MemAvailableMiB, f.MemTotalMiB)}
	if f.MemAvailableMiB < minMemMiB {
		x.Status = Missing
		x.Why = fmt.Sprintf("the server and one sandbox of the default shape need %d MiB", minMemMiB)
		x.Cure = "end something large, or use a larger machine"
	}
	return x
}

func disk(f Facts) Finding {
	x := Finding{Name: "disk", Status: OK, Found: fmt.Sprintf("%d MiB free at %s", f.DiskFreeMiB, f.DataDir)}
	switch {
	case f.DiskFreeMiB < minDiskMiB:
		x.Status = Missing
		x.Why = fmt.Sprintf("building the base template and one sandbox need %d MiB", minDiskMiB)
	case f.DiskFreeMiB < wantDiskMiB:
		x.Status = Warn
		x.Why = fmt.Sprintf("every sandbox may write as much as its disk is large; %d MiB is a start", wantDiskMiB)
	default:
		return x
	}
	x.Cure = "free some, or put the data elsewhere: dormouse up --data DIR"
	return x
}

func mapper(f Facts) Finding {
	x := Finding{Name: "device-mapper", Status: OK, Found: "linear, zero, snapshot, verity"}
	switch {
	case !f.Root:
		x.Status, x.Found, x.Cure = Warn, "not looked at: that needs root", "sudo dormouse doctor"
	case f.NoMapper != "":
		x.Status, x.Found = Warn, f.NoMapper
		x.Why = "disks will be qcow2 files, which QEMU alone can open, and damage to a base image is not noticed when it is read"
		x.Cure = "modprobe -a dm_mod dm_snapshot dm_verity loop, on a kernel that has them"
	}
	return x
}

func cgroup(f Facts) Finding {
	if f.CgroupV2 == "" {
		return Finding{
			Name: "cgroup v2", Status: Warn, Found: "not mounted, or without its memory controller",
			Why:  "without it a VM's memory and CPU on the host are bounded by its shape only",
			Cure: "boot with systemd.unified_cgroup_hierarchy=1 (the default since Debian 11 and Ubuntu 21.10)",
		}
	}
	return Finding{Name: "cgroup v2", Status: OK, Found: f.CgroupV2}
}
