package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"testing"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func TestKindOf(t *testing.T) {
	busy := sandbox.Errorf(sandbox.KindBusy, "no slot")
	for name, tt := range map[string]struct {
		err  error
		want sandbox.Kind
	}{
		"has one":                 {busy, sandbox.KindBusy},
		"wrapped":                 {fmt.Errorf("create: %w", busy), sandbox.KindBusy},
		"joined":                  {errors.Join(errors.New("x"), busy), sandbox.KindBusy},
		"the outermost wins":      {sandbox.WithKind(sandbox.KindConflict, busy), sandbox.KindConflict},
		"an expired context":      {fmt.Errorf("boot: %w", context.DeadlineExceeded), sandbox.KindTimeout},
		"a cancelled context":     {context.Canceled, sandbox.KindTransient},
		"kind before the context": {sandbox.WithKind(sandbox.KindInternal, context.Canceled), sandbox.KindInternal},
		"has none":                {errors.New("oops"), sandbox.KindInternal},
	} {
		if got := sandbox.KindOf(tt.err); got != tt.want {
			t.Errorf("%s: %s, want %s", name, got, tt.want)
		}
	}
}

func TestErrorsKeepTheirChainAndMessage(t *testing.T) {
	err := sandbox.Errorf(sandbox.KindNotFound, "open layer: %w", fs.ErrNotExist)
	if !errors.Is(err, fs.ErrNotExist) {
		t.Error("the cause is lost")
	}
	if err.Error() != "open layer: file does not exist" {
		t.Errorf("the message is %q", err)
	}
	if sandbox.WithKind(sandbox.KindBusy, err).Error() != err.Error() {
		t.Error("WithKind changed the message")
	}
}

func TestNoErrorHasNoKind(t *testing.T) {
	if err := sandbox.WithKind(sandbox.KindBusy, nil); err != nil {
		t.Errorf("WithKind(nil) is %v", err)
	}
	for _, k := range sandbox.Kinds() {
		if sandbox.Is(nil, k) {
			t.Errorf("no error is of kind %s", k)
		}
	}
}

func TestKindsAreDistinct(t *testing.T) {
	seen := map[sandbox.Kind]bool{}
	for _, k := range sandbox.Kinds() {
		if k == "" || seen[k] {
			t.Errorf("kind %q is empty or there twice", k)
		}
		seen[k] = true
	}
}

func TestFullDisksHaveAKind(t *testing.T) {
	for _, err := range []error{syscall.ENOSPC, syscall.EDQUOT, fmt.Errorf("write: %w", &fs.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC})} {
		if got := sandbox.NoSpace(err); !sandbox.Is(got, sandbox.KindNoSpace) || got.Error() != err.Error() || !sandbox.DiskFull(err) {
			t.Errorf("%v: %v, kind %s", err, got, sandbox.KindOf(got))
		}
	}
	busy := sandbox.Errorf(sandbox.KindBusy, "no slot")
	for _, err := range []error{busy, syscall.EIO, nil} {
		if got := sandbox.NoSpace(err); got != err || sandbox.DiskFull(err) {
			t.Errorf("%v: %v", err, got)
		}
	}
}
