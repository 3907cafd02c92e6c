package qemu

import (
	"bytes"
	"testing"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func wrapped(t testing.TB, s shape, stream []byte) []byte {
	t.Helper()
	devices, err := wrap(s, stream)
	if err != nil {
		t.Fatal(err)
	}
	return devices
}

// TestASavedStateIsWholeOrRefused cuts it everywhere, and changes every byte of
// QEMU's part.
func TestASavedStateIsWholeOrRefused(t *testing.T) {
	want := shape{VCPUs: 3, MemMiB: 700, Net: true, TSCkHz: 2_400_000}
	stream := bytes.Repeat([]byte("QEVM and so on\x00\x00\x00"), 100)
	devices := wrapped(t, want, stream)
	if len(devices) > 300 {
		t.Errorf("%d bytes for %d that repeat themselves", len(devices), len(stream))
	}
	got, back, err := unwrap(devices)
	if err != nil || got != want || !bytes.Equal(back, stream) {
		t.Fatalf("%+v, %d bytes, %v", got, len(back), err)
	}
	for n := range devices {
		if _, _, err := unwrap(devices[:n]); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("the first %d of %d bytes: %v", n, len(devices), err)
		}
	}
	header := bytes.Index(devices, []byte("}\n")) + 2
	for at := header; at < len(devices); at++ {
		bad := bytes.Clone(devices)
		bad[at] ^= 0x10
		if _, back, err := unwrap(bad); err == nil && !bytes.Equal(back, stream) {
			t.Errorf("a changed byte %d gives another stream", at)
		}
	}
}

func TestASavedStateThatNeverEndsIsRefused(t *testing.T) {
	if _, _, err := unwrap(wrapped(t, shape{}, make([]byte, maxStream+1))); !sandbox.Is(err, sandbox.KindInvalid) {
		t.Errorf("error %v", err)
	}
}

// FuzzUnwrap: what a saved state is said to be is refused, or is one.
func FuzzUnwrap(f *testing.F) {
	whole := wrapped(f, shape{VCPUs: 1, MemMiB: 128, Disk: true}, []byte("QEVM"))
	for n := 0; n < len(whole); n += 9 {
		f.Add(whole[:n])
	}
	f.Add(whole)
	f.Add([]byte(magic + "{}\n"))
	f.Add([]byte(magic + "null\nx"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, stream, err := unwrap(data)
		if err != nil {
			if !sandbox.Is(err, sandbox.KindInvalid) {
				t.Errorf("error %v", err)
			}
			return
		}
		again, back, err := unwrap(wrapped(t, s, stream))
		if err != nil || again != s || !bytes.Equal(back, stream) {
			t.Errorf("%+v, %v; was %+v", again, err, s)
		}
	})
}

func TestTheCounterMustRunAsItDid(t *testing.T) {
	for _, tt := range []struct {
		saved, here int
		ok          bool
	}{
		{0, 0, true}, // KVM tells its guests the time
		{2_400_000, 2_400_000, true},
		{2_400_100, 2_400_000, true}, // measured twice
		{2_399_000, 2_400_000, true},
		{2_394_000, 2_400_000, false},
		{2_406_000, 2_400_000, false},
		{0, 2_400_000, false},
	} {
		err := sameClock(tt.saved, tt.here)
		if (err == nil) != tt.ok || err != nil && !sandbox.Is(err, sandbox.KindConflict) {
			t.Errorf("saved at %d kHz, here %d: %v", tt.saved, tt.here, err)
		}
	}
}

func TestCompatNamesWhatAGuestSees(t *testing.T) {
	emulated := (&Driver{version: "7.2.22", config: Config{Accelerator: TCG}}).compat()
	if emulated != "qemu 7.2.22, tcg, max, layout 2" {
		t.Errorf("emulated: %q", emulated)
	}
	real := Driver{version: "7.2.22", config: Config{Accelerator: KVM}, cpu: "AuthenticAMD 25-1-1 0123456789ab"}
	if got := real.compat(); got != "qemu 7.2.22, kvm, AuthenticAMD 25-1-1 0123456789ab, layout 2" || real.canSave() != nil {
		t.Errorf("under KVM: %q, %v", got, real.canSave())
	}
	real.cpu = ""
	if err := real.canSave(); real.compat() != "" || !sandbox.Is(err, sandbox.KindUnsupported) {
		t.Errorf("on a processor that is not known: %q, %v", real.compat(), err)
	}
}
