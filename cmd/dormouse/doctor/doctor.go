// Package doctor says what a machine has and lacks to run Dormouse, and what
// to do about it.
//
// Look asks the machine and changes nothing on it; Check is a pure function
// over what Look found. Only a finding that is Missing stops Dormouse.
package doctor

import (
	"fmt"
	"strings"
)

// Status is what a finding means.
type Status string

// The statuses. Warn is for what works with less: slower, or with something to know.
const (
	OK      Status = "ok"
	Warn    Status = "warn"
	Missing Status = "missing"
)

// Finding is the answer to one question about the machine.
type Finding struct {
	Name   string `json:"name"`
	Status Status `json:"status"`
	Found  string `json:"found"`
	Why    string `json:"why,omitempty"`  // what it is needed for; only where something is wrong
	Cure   string `json:"cure,omitempty"` // what to type or to do
}

// Report is everything that Check has to say.
type Report struct {
	Ready    bool      `json:"ready"` // nothing that is needed is missing
	Findings []Finding `json:"findings"`
}

// Facts is what was found on a machine.
type Facts struct {
	OS      string // GOOS
	Arch    string // GOARCH
	Kernel  string // uname -r
	Root    bool
	Sudo    string // path of sudo, or empty
	Apt     bool   // apt-get is there
	Tools   []Tool
	KVM     KVM
	FUSE    Device
	TUN     Device
	Port    Port
	Network []Network // what the network package found; empty where nobody asked it

	MemTotalMiB     int
	MemAvailableMiB int
	DataDir         string
	DiskFreeMiB     int
	CgroupV2        string // where it is mounted, or empty
	NoMapper        string // why disks are not device-mapper's; empty where they are. Only root can find out
}

// Tool is a program or file that a Debian package brings.
type Tool struct {
	Name    string // what is looked for: a program, or an absolute path
	Package string // the Debian package that has it
	For     string // what needs it
	Path    string // where it is, or empty
}

// Device is a character device.
type Device struct {
	Path    string
	Present bool
	OpenErr string // why it could not be opened, or empty
}

// KVM is what is known about hardware virtualisation. That the device opens
// proves nothing; only a boot of the real guest kernel does.
type KVM struct {
	Device
	CPUFlag string   // "vmx", "svm" or empty
	Modules []string // of kvm, kvm_intel, kvm_amd, kvm_pvm: what is loaded
	Probed  bool
	Works   bool   // the probe boot got through
	Reason  string // what the probe says
}

// Port is the server's address.
type Port struct {
	Addr     string
	Err      string // why nobody can listen there, or empty
	PID      int    // who has it, where that could be seen
	Program  string
	Dormouse bool // a Dormouse server answers there
}

// Network is one thing that package netns looked at. A firewall of another tool
// that drops is named ForwardDrop: sandboxes run all the same.
type Network struct {
	Name string
	OK   bool
	Text string
	Cure string
}

// ForwardDrop is the name under which netns reports other tools' firewalls.
const ForwardDrop = "forward-drop"

// What one sandbox of the default shape needs beside the system.
const (
	minMemMiB   = 1024
	minDiskMiB  = 4 << 10
	wantDiskMiB = 10 << 10
)

// Check turns facts into findings.
func Check(f Facts) Report {
	findings := []Finding{arch(f), kernelVersion(f), root(f)}
	for _, t := range f.Tools {
		findings = append(findings, tool(f, t))
	}
	findings = append(findings, kvm(f), device("fuse", f.FUSE, false, "later versions serve memory and disks through it"),
		port(f), memory(f), disk(f), cgroup(f), mapper(f))
	if len(f.Network) == 0 { // else somebody has tried more than to open it
		findings = append(findings, device("tun", f.TUN, true, "every sandbox has a TAP device"))
	}
	findings = append(findings, network(f)...)
	r := Report{Ready: true, Findings: findings}
	for _, x := range findings {
		r.Ready = r.Ready && x.Status != Missing
	}
	return r
}

// Install is the one command that brings every missing package, or empty.
func Install(f Facts) string {
	var packages []string
	for _, t := range f.Tools {
		if t.Path == "" {
			packages = append(packages, t.Package)
		}
	}
	if len(packages) == 0 {
		return ""
	}
	return aptGet(f, packages...)
}

func aptGet(f Facts, packages ...string) string {
	line := "apt-get install --no-install-recommends " + strings.Join(packages, " ")
	if !f.Root {
		line = "sudo " + line
	}
	return line
}

func arch(f Facts) Finding {
	x := Finding{Name: "architecture", Status: OK, Found: f.OS + "/" + f.Arch}
	if f.OS != "linux" || f.Arch != "amd64" {
		x.Status = Missing
		x.Why = "the host is Linux on x86-64 only"
		x.Cure = "run the server on an x86-64 Linux machine; the client verbs work from here with DORMOUSE_URL"
	}
	return x
}

// Linux 5.10 is the kernel of Debian 11, the oldest this is tried on.
func kernelVersion(f Facts) Finding {
	x := Finding{Name: "kernel", Status: OK, Found: f.Kernel}
	var major, minor int
	if _, err := fmt.Sscanf(f.Kernel, "%d.%d", &major, &minor); err != nil {
		x.Status, x.Why = Warn, "its version could not be read"
		return x
	}
	if major < 5 || (major == 5 && minor < 10) {
		x.Status = Missing
		x.Why = "pidfd and nftables as used here need Linux 5.10"
		x.Cure = "upgrade to a supported release of Debian or Ubuntu"
	}
	return x
}

func root(f Facts) Finding {
	switch {
	case f.Root:
		return Finding{Name: "root", Status: OK, Found: "running as root"}
	case f.Sudo != "":
		return Finding{Name: "root", Status: OK, Found: "not root, sudo is " + f.Sudo}
	}
	return Finding{
		Name: "root", Status: Missing, Found: "not root, and no sudo",
		Why:  "the server makes network namespaces and gives every VM a user of its own",
		Cure: "as root: apt-get install sudo && adduser YOU sudo; or run make up as root",
	}
}

func tool(f Facts, t Tool) Finding {
	if t.Path != "" {
		return Finding{Name: t.Name, Status: OK, Found: t.Path}
	}
	x := Finding{Name: t.Name, Status: Missing, Found: "not found", Why: t.For, Cure: aptGet(f, t.Package)}
	if !f.Apt {
		x.Cure = "install what Debian packages as " + t.Package
	}
	return x
}
