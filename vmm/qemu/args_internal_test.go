package qemu

import (
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/vmm"
)

func commandLine(t *testing.T, accelerator string, change func(s *vmm.Spec)) string {
	t.Helper()
	d := &Driver{config: Config{Accelerator: accelerator}, tscKHz: 2_600_000}
	s := vmm.Spec{
		ID: "abc", VCPUs: 2, MemMiB: 256, Kernel: "/k", Dir: "/run/x,y", DiskPath: `/a,"b`, DiskFormat: "raw",
		MAC: "02:00:00:00:00:01", Cmdline: "loglevel=8",
	}
	if change != nil {
		change(&s)
	}
	args, err := d.args(s, fds{control: 5, console: 3, kernel: 6, initrd: 7, tap: 8})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(args, "\x00")
}

func TestTheCommandLineConfinesAndDescribesTheVM(t *testing.T) {
	got := commandLine(t, TCG, nil)
	for _, want := range []string{
		"-sandbox\x00on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-nodefaults", "-no-user-config", "-no-reboot", "tsc_early_khz=2600000 ", "-accel\x00tcg",
		"memory-backend-ram,id=mem,size=256M", `"filename":"/a,\"b"`, `"node-name":"root"`, `"driver":"raw"`,
		"opaque=dormouse:/run/x,,y", "tap,id=net0,fd=8,vhost=off", "-kernel\x00/proc/self/fd/6", "-initrd\x00/proc/self/fd/7",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in %q", want, got)
		}
	}
	if dir, ok := dirOf([]byte(got)); !ok || dir != "/run/x,y" {
		t.Errorf("the directory reads back as %q, %v", dir, ok)
	}
}

func TestKVMKeepsItsOwnClockAndMitigations(t *testing.T) {
	got := commandLine(t, KVM, nil)
	for _, word := range []string{"tsc", "mitigations", "tcg"} {
		if strings.Contains(got, word) {
			t.Errorf("%q under KVM: %q", word, got)
		}
	}
	if !strings.Contains(got, "initcall_blacklist=cmos_init") {
		t.Errorf("it waits for a clock that is not there: %q", got)
	}
	if !strings.Contains(got, "-cpu\x00host") {
		t.Errorf("not the host's processor: %q", got)
	}
}

// TestEachStartHasADiskOfAnotherSerial: a guest tells by it that it was restored.
func TestEachStartHasADiskOfAnotherSerial(t *testing.T) {
	serial := regexp.MustCompile(`virtio-blk-device,[^\x00]*serial=([a-z0-9]{20})(\x00|$)`)
	first, second := serial.FindStringSubmatch(commandLine(t, TCG, nil)), serial.FindStringSubmatch(commandLine(t, TCG, nil))
	if first == nil || second == nil || first[1] == second[1] {
		t.Errorf("%q and %q", first, second)
	}
}

func TestTheCallersKernelWordsComeLast(t *testing.T) {
	words := strings.Fields((&Driver{config: Config{Accelerator: TCG}}).cmdline("loglevel=8 root=/dev/vda"))
	if slices.Index(words, "loglevel=8") < slices.Index(words, "loglevel=6") || words[len(words)-1] != "root=/dev/vda" {
		t.Errorf("%q", words)
	}
}

func TestDirectoriesBelow(t *testing.T) {
	for dir, want := range map[string]bool{
		"/run/d/vm1": true, "/run/d": true, "/run/d/a/b": true, "/run/dd/vm1": false, "/run": false, "/run/d/../e": false,
	} {
		if got := below("/run/d", filepath.Clean(dir)); got != want {
			t.Errorf("%s below /run/d: %v", dir, got)
		}
	}
}
