package vmmfake_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
	"github.com/dormouse-sandbox/dormouse/vmm/vmmfake"
	"github.com/dormouse-sandbox/dormouse/vmm/vmmtest"
)

// guest plays the guests of the suite.
func guest(ctx context.Context, m vmmfake.Inside) error {
	rest := func(d time.Duration) {
		select {
		case <-time.After(d):
		case <-ctx.Done():
		}
	}
	rest(30 * time.Millisecond) // a boot takes a while
	if ctx.Err() != nil {
		return nil
	}
	_, _ = fmt.Fprintln(m.Console, vmmtest.Marker)
	switch vmmtest.Guest(m.Spec.Cmdline) {
	case vmmtest.PowerOff:
		rest(2 * time.Second) // a test releases and adopts the machine first
		return nil
	case vmmtest.Panic:
		return errors.New("kernel panic: Attempted to kill init!")
	case vmmtest.OOM:
		return vmmfake.ErrOutOfMemory
	case vmmtest.Count:
		for i := 0; ctx.Err() == nil; i++ {
			_, _ = fmt.Fprintf(m.Console, "line %d %s\n", i, strings.Repeat("x", 1000))
			time.Sleep(time.Microsecond)
		}
	case vmmtest.Remember:
		remember(ctx, m)
	}
	<-ctx.Done()
	return nil
}

func TestConformance(t *testing.T) {
	vmmtest.Run(t, func(t *testing.T) vmmtest.Harness {
		d := vmmfake.New(guest)
		t.Cleanup(func() {
			if left := d.Running(); len(left) > 0 {
				t.Errorf("still running: %v", left)
			}
		})
		return vmmtest.Harness{
			Driver:      func(*testing.T) vmm.Driver { return d },
			Spec:        spec,
			BootLimit:   30 * time.Second,
			ConsoleKeep: 64 << 10,
			Boots:       20,
			Generations: 9,
			KillOutside: func(t *testing.T, m vmm.Machine) {
				if err := d.Crash(m.Record().ID); err != nil {
					t.Fatal(err)
				}
			},
			Alive: func(_ *testing.T, r vmm.Record) bool { return slices.Contains(d.Running(), r.ID) },
		}
	})
}

// noHurry is how long a loaded machine may take for what happens at once.
const noHurry = 10 * time.Second

func spec(t *testing.T, g vmmtest.Guest) vmm.Spec {
	return vmm.Spec{ID: sandbox.NewID(), VCPUs: 1, MemMiB: 4, Dir: t.TempDir(), Cmdline: string(g)}
}

func TestTheGuestAgentIsReachedByDialUntilTheMachineEnds(t *testing.T) {
	d := vmmfake.New(vmmfake.Serve(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusNoContent)
	})))
	s := spec(t, vmmtest.Hold)
	m, err := d.Start(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return d.Dial(ctx, s.ID)
	}}}
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://guest/health")
	if err != nil || resp.StatusCode != http.StatusNoContent {
		t.Fatalf("%v, %v", resp, err)
	}
	_ = resp.Body.Close()
	if err := m.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if resp, err := client.Get("http://guest/health"); err == nil {
		_ = resp.Body.Close()
		t.Error("a dead guest answers")
	}
	if _, err := d.Dial(t.Context(), s.ID); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("Dial to a dead guest: %v", err)
	}
}

func TestStartsFailAsOrdered(t *testing.T) {
	d := vmmfake.New(nil)
	want := errors.New("no such accelerator")
	d.FailStarts(want)
	if _, err := d.Start(t.Context(), spec(t, vmmtest.Hold)); !errors.Is(err, want) {
		t.Errorf("first start: %v", err)
	}
	m, err := d.Start(t.Context(), spec(t, vmmtest.Hold))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Kill(t.Context()); err != nil || d.Starts() != 1 {
		t.Errorf("%v, %d starts", err, d.Starts())
	}
}

func TestAfterARebootNothingIsAdopted(t *testing.T) {
	d := vmmfake.New(nil)
	m, err := d.Start(t.Context(), spec(t, vmmtest.Hold))
	if err != nil {
		t.Fatal(err)
	}
	d.Reboot("second-boot")
	<-m.Done()
	if _, err := d.Adopt(t.Context(), m.Record()); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("Adopt after a reboot: %v", err)
	}
}
