package doctor_test

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/cmd/dormouse/doctor"
)

// good is a machine that has everything.
func good() doctor.Facts {
	return doctor.Facts{
		OS: "linux", Arch: "amd64", Kernel: "6.1.0-35-amd64", Root: true, Apt: true,
		Tools:       []doctor.Tool{{Name: "qemu-img", Package: "qemu-utils", For: "it makes disks", Path: "/usr/bin/qemu-img"}},
		KVM:         doctor.KVM{Device: doctor.Device{Path: "/dev/kvm", Present: true}, CPUFlag: "svm", Modules: []string{"kvm", "kvm_amd"}, Probed: true, Works: true, Reason: "a guest booted in 0.4 s"},
		FUSE:        doctor.Device{Path: "/dev/fuse", Present: true},
		TUN:         doctor.Device{Path: "/dev/net/tun", Present: true},
		Port:        doctor.Port{Addr: "127.0.0.1:7070"},
		Network:     []doctor.Network{{Name: "veth", OK: true, Text: "the kernel has veth pairs"}},
		MemTotalMiB: 8000, MemAvailableMiB: 6000, DataDir: "/var/lib/dormouse", DiskFreeMiB: 50000, CgroupV2: "/sys/fs/cgroup",
	}
}

func TestAGoodMachineIsReady(t *testing.T) {
	r := doctor.Check(good())
	if !r.Ready {
		t.Error("not ready")
	}
	for _, f := range r.Findings {
		if f.Status != doctor.OK || f.Found == "" || f.Cure != "" {
			t.Errorf("%+v: want ok, with what was found and no cure", f)
		}
	}
}

// Each row breaks one thing of a good machine, and that one only is found.
func TestEachThingThatMayBeWrong(t *testing.T) {
	for name, tt := range map[string]struct {
		broken        func(*doctor.Facts)
		finding       string
		status        doctor.Status
		found, remedy string // parts of the texts
	}{
		"another architecture": {func(f *doctor.Facts) { f.Arch = "arm64" }, "architecture", doctor.Missing, "linux/arm64", "x86-64"},
		"another system":       {func(f *doctor.Facts) { f.OS = "darwin" }, "architecture", doctor.Missing, "darwin", "DORMOUSE_URL"},
		"an old kernel":        {func(f *doctor.Facts) { f.Kernel = "4.19.0" }, "kernel", doctor.Missing, "4.19.0", "upgrade"},
		"a kernel just too old": {
			func(f *doctor.Facts) { f.Kernel = "5.9.16" }, "kernel", doctor.Missing, "5.9.16", "upgrade",
		},
		"a kernel without number": {func(f *doctor.Facts) { f.Kernel = "gnumach" }, "kernel", doctor.Warn, "gnumach", ""},
		"neither root nor sudo":   {func(f *doctor.Facts) { f.Root = false; f.Network = nil }, "root", doctor.Missing, "no sudo", "adduser"},
		"a missing tool": {
			func(f *doctor.Facts) { f.Tools[0].Path = "" }, "qemu-img", doctor.Missing, "not found",
			"apt-get install --no-install-recommends qemu-utils",
		},
		"a missing tool without apt": {
			func(f *doctor.Facts) { f.Tools[0].Path = ""; f.Apt = false }, "qemu-img", doctor.Missing, "not found",
			"install what Debian packages as qemu-utils",
		},
		"no device-mapper": {
			func(f *doctor.Facts) { f.NoMapper = "no target verity" }, "device-mapper", doctor.Warn, "no target verity", "modprobe",
		},
		"no TUN":               {func(f *doctor.Facts) { f.TUN.Present = false; f.Network = nil }, "tun", doctor.Missing, "no /dev/net/tun", "modprobe tun"},
		"no FUSE":              {func(f *doctor.Facts) { f.FUSE.Present = false }, "fuse", doctor.Warn, "no /dev/fuse", "modprobe fuse"},
		"a TUN that is closed": {func(f *doctor.Facts) { f.TUN.OpenErr = "permission denied"; f.Network = nil }, "tun", doctor.Warn, "permission denied", "sudo"},
		"no veth": {
			func(f *doctor.Facts) {
				f.Network[0] = doctor.Network{Name: "veth", Text: "operation not supported", Cure: "modprobe veth"}
			},
			"veth", doctor.Missing, "not supported", "modprobe veth",
		},
		"a firewall that drops": {
			func(f *doctor.Facts) {
				f.Network[0] = doctor.Network{Name: doctor.ForwardDrop, Text: "FORWARD drops", Cure: "iptables -I"}
			},
			doctor.ForwardDrop, doctor.Warn, "FORWARD drops", "iptables -I",
		},
		"the port is taken": {
			func(f *doctor.Facts) {
				f.Port = doctor.Port{Addr: "127.0.0.1:7070", Err: "address already in use", PID: 42, Program: "nginx"}
			},
			"port", doctor.Missing, "taken by nginx (PID 42)", "--listen",
		},
		"the port is taken by whom nobody sees": {
			func(f *doctor.Facts) {
				f.Port = doctor.Port{Addr: "127.0.0.1:7070", Err: "address already in use"}
			},
			"port", doctor.Missing, "address already in use", "--listen",
		},
		"little memory":    {func(f *doctor.Facts) { f.MemAvailableMiB = 500 }, "memory", doctor.Missing, "500 MiB available", "larger machine"},
		"hardly any disk":  {func(f *doctor.Facts) { f.DiskFreeMiB = 1000 }, "disk", doctor.Missing, "1000 MiB free", "--data"},
		"a small disk":     {func(f *doctor.Facts) { f.DiskFreeMiB = 6000 }, "disk", doctor.Warn, "6000 MiB free", "--data"},
		"no cgroup v2":     {func(f *doctor.Facts) { f.CgroupV2 = "" }, "cgroup v2", doctor.Warn, "not mounted", "unified_cgroup_hierarchy"},
		"KVM that hangs":   {func(f *doctor.Facts) { f.KVM.Works = false; f.KVM.Reason = "no answer in 5 s" }, "kvm", doctor.Warn, "no answer in 5 s", "nest"},
		"KVM not tried":    {func(f *doctor.Facts) { f.KVM.Probed = false }, "kvm", doctor.Warn, "no guest was booted", "--probe"},
		"KVM that is odd":  {func(f *doctor.Facts) { f.KVM.Probed = false; f.KVM.Modules = []string{"kvm_pvm"} }, "kvm", doctor.Warn, "may hang", "--probe"},
		"KVM that is shut": {func(f *doctor.Facts) { f.KVM.Probed = false; f.KVM.OpenErr = "permission denied" }, "kvm", doctor.Warn, "permission denied", "sudo"},
		"KVM not loaded":   {func(f *doctor.Facts) { f.KVM.Probed = false; f.KVM.Present = false }, "kvm", doctor.Warn, "no /dev/kvm", "modprobe kvm_amd"},
		"no virtualisation": {
			func(f *doctor.Facts) { f.KVM = doctor.KVM{Device: doctor.Device{Path: "/dev/kvm"}} },
			"kvm", doctor.Warn, "neither vmx nor svm", "firmware",
		},
	} {
		t.Run(name, func(t *testing.T) {
			facts := good()
			tt.broken(&facts)
			r := doctor.Check(facts)
			if want := tt.status != doctor.Missing; r.Ready != want {
				t.Errorf("ready is %v, want %v", r.Ready, want)
			}
			for _, f := range r.Findings {
				if f.Name != tt.finding {
					if f.Status == doctor.Missing {
						t.Errorf("also found: %+v", f)
					}
					continue
				}
				if f.Status != tt.status || !strings.Contains(f.Found, tt.found) || !strings.Contains(f.Cure, tt.remedy) {
					t.Errorf("%+v: want %s, %q and %q", f, tt.status, tt.found, tt.remedy)
				}
				if f.Status == doctor.Missing && (f.Why == "" || f.Cure == "") {
					t.Errorf("%+v: it stops the server, and does not say why or what to do", f)
				}
				return
			}
			t.Errorf("nothing about %s in %+v", tt.finding, r.Findings)
		})
	}
}

func TestEmulationIsCalledWhatItIs(t *testing.T) {
	f := good()
	f.KVM.Works = false
	for _, x := range doctor.Check(f).Findings {
		if x.Name == "kvm" && !strings.Contains(x.Why, "not call it a security boundary") {
			t.Errorf("%q does not say that emulation is no security boundary", x.Why)
		}
	}
}

func TestAServerOfOursIsNoTrouble(t *testing.T) {
	f := good()
	f.Port = doctor.Port{Addr: "127.0.0.1:7070", Err: "address already in use", Dormouse: true}
	if r := doctor.Check(f); !r.Ready {
		t.Errorf("a running server makes the machine unready: %+v", r)
	}
}

func TestInstallNamesEveryPackageOnce(t *testing.T) {
	f := good()
	f.Tools = []doctor.Tool{{Name: "a", Package: "pa"}, {Name: "b", Package: "pb", Path: "/b"}, {Name: "c", Package: "pc"}}
	if got := doctor.Install(f); got != "apt-get install --no-install-recommends pa pc" {
		t.Errorf("as root: %q", got)
	}
	f.Root, f.Sudo = false, "/usr/bin/sudo"
	if got := doctor.Install(f); got != "sudo apt-get install --no-install-recommends pa pc" {
		t.Errorf("as a user: %q", got)
	}
	if got := doctor.Install(good()); got != "" {
		t.Errorf("nothing is missing: %q", got)
	}
}

// Look runs on the machine at hand, where a few things are certain.
func TestLookFindsWhoListens(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	f := doctor.Look(t.Context(), doctor.Options{Listen: l.Addr().String(), DataDir: t.TempDir() + "/not/yet"})
	if f.Port.Err == "" || f.Port.PID != os.Getpid() || f.Port.Program == "" || f.Port.Dormouse {
		t.Errorf("the port: %+v, want this process (%d)", f.Port, os.Getpid())
	}
	if f.MemTotalMiB == 0 || f.MemAvailableMiB == 0 || f.MemAvailableMiB > f.MemTotalMiB || f.DiskFreeMiB == 0 || f.Kernel == "" {
		t.Errorf("memory, disk or kernel are missing: %+v", f)
	}
	if f.Root != (os.Geteuid() == 0) || f.Root != (len(f.Network) > 0) {
		t.Errorf("root is %v, and the network has %d findings", f.Root, len(f.Network))
	}
}

func TestLookAtAFreePort(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if f := doctor.Look(t.Context(), doctor.Options{Listen: addr, DataDir: "/"}); f.Port.Err != "" {
		t.Errorf("a free port: %+v", f.Port)
	}
}

// The answer of a probe counts until the machine is restarted.
func TestLookReadsTheLastProbe(t *testing.T) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	now := strings.TrimSpace(string(boot))
	for name, tt := range map[string]struct {
		text          string
		probed, works bool
	}{
		"works":          {`{"basis":{"boot_id":"` + now + `"},"capabilities":{"Accelerator":"kvm","Reason":"it booted"}}`, true, true},
		"does not":       {`{"basis":{"boot_id":"` + now + `"},"capabilities":{"Accelerator":"tcg","Reason":"it hung"}}`, true, false},
		"another boot":   {`{"basis":{"boot_id":"x"},"capabilities":{"Accelerator":"kvm","Reason":"it booted"}}`, false, false},
		"not JSON":       {`{`, false, false},
		"an empty file":  {``, false, false},
		"something else": {`[]`, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			cache := filepath.Join(t.TempDir(), "kvm-probe.json")
			if err := os.WriteFile(cache, []byte(tt.text), 0o600); err != nil {
				t.Fatal(err)
			}
			k := doctor.Look(t.Context(), doctor.Options{Listen: "127.0.0.1:0", DataDir: "/", KVMCache: cache}).KVM
			if k.Probed != tt.probed || k.Works != tt.works || tt.probed != (k.Reason != "") {
				t.Errorf("got %+v", k)
			}
		})
	}
}
