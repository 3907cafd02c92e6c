package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/dormouse-sandbox/dormouse/lab"
	"github.com/dormouse-sandbox/dormouse/lab/wire"
)

// shell is a root shell on this terminal. The lab goes off when it ends.
func (o options) shell(ctx context.Context) (int, error) {
	in := int(os.Stdin.Fd())
	if !term.IsTerminal(in) {
		return 0, fmt.Errorf("a shell needs a terminal; use lab run")
	}
	return o.with(ctx, noDisks, func(s *session) (int, error) {
		say("lab: a root shell; exit powers it off. What you leave in /results comes back in %s", o.out)
		old, err := term.MakeRaw(in)
		if err != nil {
			return 0, err
		}
		size := terminalSize(in)
		sizes, stop := watchSize(in)
		defer stop()
		env := append([]string{"TERM=" + os.Getenv("TERM"), `PS1=lab:\w# `}, o.env...)
		status, err := s.Run(ctx, lab.Command{
			Args: []string{"/bin/bash", "-i"}, Env: env, Stdin: os.Stdin, Stdout: os.Stdout, TTY: &size, Sizes: sizes,
		})
		if restored := term.Restore(in, old); err == nil {
			err = restored
		}
		return status.Code, err
	})
}

func terminalSize(fd int) wire.Size {
	ws, err := unix.IoctlGetWinsize(fd, unix.TIOCGWINSZ)
	if err != nil {
		return wire.Size{Rows: 24, Cols: 80}
	}
	return wire.Size{Rows: ws.Row, Cols: ws.Col}
}

// watchSize sends the terminal's size whenever it changes.
func watchSize(fd int) (<-chan wire.Size, func()) {
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	sizes, over := make(chan wire.Size), make(chan struct{})
	go func() {
		for {
			select {
			case <-over:
				return
			case <-changed:
			}
			select {
			case <-over:
				return
			case sizes <- terminalSize(fd):
			}
		}
	}()
	return sizes, func() { signal.Stop(changed); close(over) }
}

// boots boots N labs one after the other. Every boot has to get through; those
// that needed another attempt are counted, and the times are told.
func (o options) boots(ctx context.Context, args []string) (int, error) {
	if len(args) != 1 {
		return 0, fmt.Errorf("how many?")
	}
	n, err := strconv.Atoi(args[0])
	if err != nil || n < 1 {
		return 0, fmt.Errorf("%q is not a number of boots", args[0])
	}
	var times []time.Duration
	again := 0
	for range n {
		_, err := o.with(ctx, noDisks, func(s *session) (int, error) {
			took, tries := s.Boot()
			times = append(times, took)
			again += tries - 1
			return 0, o.proof(ctx, s)
		})
		if err != nil {
			return 0, fmt.Errorf("boot %d of %d: %w", len(times), n, err)
		}
	}
	say("lab: %d of %d boots, %d of them at a further attempt; %s", len(times), n, again, spread(times))
	return 0, nil
}

// proof makes sure that a lab runs commands.
func (o options) proof(ctx context.Context, s *session) error {
	status, err := s.Run(ctx, lab.Command{Args: []string{"dmsetup", "targets"}})
	if err == nil && status.Code != 0 {
		err = fmt.Errorf("dmsetup targets: exit status %d %s", status.Code, status.Error)
	}
	return err
}
