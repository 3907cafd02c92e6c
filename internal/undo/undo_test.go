package undo_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/internal/undo"
)

// recorder pushes steps that write their names down.
type recorder struct{ ran []string }

func (r *recorder) push(s *undo.Stack, name string, err error) {
	s.PushClose(name, func() error {
		r.ran = append(r.ran, name)
		return err
	})
}

func TestRunsLastFirst(t *testing.T) {
	var s undo.Stack
	var r recorder
	for _, name := range []string{"disk", "network", "vm"} {
		r.push(&s, name, nil)
	}
	if err := s.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"vm", "network", "disk"}, r.ran); diff != "" {
		t.Error(diff)
	}
}

func TestEveryStepRunsAndErrorsAreJoined(t *testing.T) {
	noNet, noDisk := errors.New("no such link"), errors.New("device busy")
	var s undo.Stack
	var r recorder
	r.push(&s, "disk", noDisk)
	r.push(&s, "slot", nil)
	r.push(&s, "network", noNet)
	err := s.Run(t.Context())
	if !errors.Is(err, noNet) || !errors.Is(err, noDisk) {
		t.Errorf("got %v, want both errors", err)
	}
	if err == nil || !strings.Contains(err.Error(), "undo network: no such link") {
		t.Errorf("the error does not name its step: %v", err)
	}
	if diff := cmp.Diff([]string{"network", "slot", "disk"}, r.ran); diff != "" {
		t.Error(diff)
	}
}

func TestACallerThatWentAwayDoesNotStopIt(t *testing.T) {
	type key struct{}
	ctx, cancel := context.WithCancel(context.WithValue(t.Context(), key{}, "kept"))
	cancel()
	var s undo.Stack
	s.Push("vm", func(ctx context.Context) error {
		if err := ctx.Err(); err != nil {
			t.Errorf("the step's context has ended: %v", err)
		}
		if ctx.Value(key{}) != "kept" {
			t.Error("the step's context lost its values")
		}
		deadline, ok := ctx.Deadline()
		if left := time.Until(deadline); !ok || left <= 0 || left > undo.Limit {
			t.Errorf("the step has %v left (%v), want at most %v", left, ok, undo.Limit)
		}
		return nil
	})
	if err := s.Run(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestRunningTwiceDoesItOnce(t *testing.T) {
	var s undo.Stack
	var r recorder
	r.push(&s, "disk", errors.New("busy"))
	if err := s.Run(t.Context()); err == nil {
		t.Fatal("the error is lost")
	}
	if err := s.Run(t.Context()); err != nil {
		t.Fatalf("the second run: %v", err)
	}
	if len(r.ran) != 1 || s.Len() != 0 {
		t.Errorf("ran %v, %d left", r.ran, s.Len())
	}
}

func TestTakeMovesTheSteps(t *testing.T) {
	var s undo.Stack
	var r recorder
	r.push(&s, "disk", nil)
	r.push(&s, "vm", nil)
	taken := s.Take()
	if err := s.Run(t.Context()); err != nil || len(r.ran) != 0 {
		t.Fatalf("the old stack ran %v (%v)", r.ran, err)
	}
	r.push(&s, "other", nil) // must not show in the taken one
	if err := taken.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"vm", "disk"}, r.ran); diff != "" {
		t.Error(diff)
	}
	if s.Len() != 1 {
		t.Errorf("%d steps on the old stack, want 1", s.Len())
	}
}

func TestAStepMayPushAnother(t *testing.T) {
	var s undo.Stack
	var r recorder
	s.PushClose("outer", func() error {
		r.push(&s, "inner", nil)
		return nil
	})
	if err := s.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"inner"}, r.ran); diff != "" {
		t.Error(diff)
	}
}
