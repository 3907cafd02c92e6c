package exec

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"
)

// soon is for what must not happen: long enough to see it if it does.
const soon = 50 * time.Millisecond

func TestAHoldWaitsForThoseInside(t *testing.T) {
	var g gate
	for range 2 {
		if err := g.enter(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	held := make(chan error, 1)
	go func() { held <- g.hold(t.Context()) }()
	g.leave()
	select {
	case err := <-held:
		t.Fatalf("held with one inside: %v", err)
	case <-time.After(soon):
	}
	g.leave()
	if err := <-held; err != nil {
		t.Error(err)
	}
	if err := g.hold(t.Context()); err != nil {
		t.Error("held twice:", err)
	}
	g.release()
	g.release()
	if err := g.enter(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestAHoldThatIsGivenUpLetsStartsPass(t *testing.T) {
	var g gate
	if err := g.enter(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	if err := g.hold(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if err := g.enter(t.Context()); err != nil {
		t.Error(err)
	}
	g.leave()
	g.leave()
	if err := g.hold(t.Context()); err != nil {
		t.Error("held later:", err)
	}
}

func TestWhoWaitsAtAGateThatIsHeld(t *testing.T) {
	var g gate
	if err := g.hold(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	entered, given := make(chan error, 1), make(chan error, 1)
	go func() { entered <- g.enter(t.Context()) }()
	go func() { given <- g.enter(ctx) }()
	cancel()
	if err := <-given; !errors.Is(err, context.Canceled) {
		t.Error("given up:", err)
	}
	select {
	case err := <-entered:
		t.Errorf("entered: %v", err)
	case <-time.After(soon):
	}
	g.release()
	if err := <-entered; err != nil {
		t.Error(err)
	}
	// Who is told that he is too late and that the gate is open is too late.
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if err := g.enter(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestAGateUnderLoad(t *testing.T) {
	var g gate
	var mu sync.RWMutex // held for writing while the gate is held
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				if err := g.enter(t.Context()); err != nil {
					t.Error(err)
					return
				}
				if !mu.TryRLock() {
					t.Error("inside while it is held")
				} else {
					mu.RUnlock()
				}
				g.leave()
			}
		})
	}
	for range 50 {
		if err := g.hold(t.Context()); err != nil {
			t.Error(err)
		}
		mu.Lock()
		time.Sleep(time.Microsecond) // for those who should not
		mu.Unlock()
		g.release()
	}
	wg.Wait()
}
