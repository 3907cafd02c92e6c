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

func feature(name string, k Feature, why string) Finding {
	switch {
	case !k.Asked:
		return Finding{Name: name, Status: OK, Found: "not asked: that needs root (sudo dormouse doctor)"}
	case k.Err != "":
		return Finding{
			Name: name, Status: Missing, Found: k.Err, Why: why,
			Cure: "use a kernel with it (Debian's and Ubuntu's have it); a container needs CAP_NET_ADMIN and CAP_SYS_ADMIN",
		}
	}
	return Finding{Name: name, Status: OK, Found: "works"}
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

func forward(f Facts) Finding {
	x := Finding{Name: "forwarding", Status: OK, Found: "no other firewall drops forwarded packets"}
	switch {
	case !f.Forward.Asked:
		x.Found = "not asked: that needs root (sudo dormouse doctor)"
	case f.Forward.Err != "":
		x.Status, x.Found = Warn, f.Forward.Err
		x.Why = "another tool's firewall might keep guests from the internet"
	case f.Forward.Drop != "":
		x.Status, x.Found = Warn, f.Forward.Drop
		x.Why = "sandboxes run, but reach no internet: a packet must pass every firewall, and this one drops it"
		x.Cure = "allow forwarding from our interfaces; for Docker: iptables -I DOCKER-USER -i dm+ -j ACCEPT; iptables -I DOCKER-USER -o dm+ -j ACCEPT"
	}
	return x
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
	x.Cure = "free some, or put the data elsewhere: dormouse up --data-dir DIR"
	return x
}

func cgroup(f Facts) Finding {
	if f.CgroupV2 == "" {
		return Finding{
			Name: "cgroup v2", Status: Warn, Found: "not mounted",
			Why:  "without it a VM's memory and CPU on the host are bounded by its shape only",
			Cure: "boot with systemd.unified_cgroup_hierarchy=1 (the default since Debian 11 and Ubuntu 21.10)",
		}
	}
	return Finding{Name: "cgroup v2", Status: OK, Found: f.CgroupV2}
}
