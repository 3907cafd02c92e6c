package netns

import (
	"context"
	"fmt"
	"runtime"

	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
)

// step is a failpoint in front of one call to the kernel.
func step(ctx context.Context, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return fault.Point(ctx, "netns/"+name)
}

// do passes the failpoint and makes the call; what names it in the error.
func do(ctx context.Context, name, what string, call func() error) error {
	if err := step(ctx, name); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if err := call(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// away runs fn on a thread of its own that enter has moved to another
// namespace. A thread that cannot come home ends with its goroutine, because
// it stays locked: no other goroutine ever runs on it.
func away(enter, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := vnetns.Get()
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open own namespace: %w", err)
			return
		}
		defer func() { _ = home.Close() }() // nothing was written
		err = enter()
		if err == nil {
			err = fn()
		}
		if back := vnetns.Set(home); back == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// visit runs fn inside the namespace that is mounted at path. Sockets that fn
// makes stay in that namespace, whichever thread uses them later.
func visit(ctx context.Context, path string, fn func() error) error {
	if err := step(ctx, "namespace-open"); err != nil {
		return fmt.Errorf("open namespace %s: %w", path, err)
	}
	ns, err := vnetns.GetFromPath(path)
	if err != nil {
		return fmt.Errorf("open namespace %s: %w", path, err)
	}
	defer func() { _ = ns.Close() }() // nothing was written
	return away(func() error {
		return do(ctx, "namespace-enter", "enter namespace "+path, func() error { return unix.Setns(int(ns), unix.CLONE_NEWNET) })
	}, fn)
}
