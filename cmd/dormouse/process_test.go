package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
)

// asCommand makes the test binary behave as the command itself, and panicsAt is the
// failpoint at which it then panics.
const (
	asCommand = "DORMOUSE_TEST_AS_COMMAND"
	panicsAt  = "DORMOUSE_TEST_PANICS_AT"
)

func TestMain(m *testing.M) {
	if os.Getenv(asCommand) != "" {
		fault.Set(os.Getenv(panicsAt), func(context.Context, string) error { panic("injected") })
		main()
	}
	os.Exit(m.Run())
}

// process is a command line in a process of its own.
func process(t *testing.T, line ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, line...)
	cmd.Env = append(os.Environ(), asCommand+"=1")
	return cmd
}

func statusOf(t *testing.T, err error) int {
	t.Helper()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	t.Fatal(err)
	return -1
}

func TestSignalsDestroyTheSandboxOfARun(t *testing.T) {
	for signal, want := range map[syscall.Signal]int{syscall.SIGINT: 130, syscall.SIGTERM: 143} {
		t.Run(signal.String(), func(t *testing.T) {
			f := newFake(t)
			started := make(chan struct{})
			f.runs(func(ctx context.Context, _ *fakeProcess) (int, string) {
				close(started)
				<-ctx.Done() // the stream ends with its client
				return -1, "signal: killed"
			})
			cmd := process(t, "run", "base", "--", "sleep", "1000")
			var errOut strings.Builder
			cmd.Stderr = &errOut
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			<-started
			if err := cmd.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			if got := statusOf(t, cmd.Wait()); got != want {
				t.Errorf("exit status %d, want %d: %s", got, want, errOut.String())
			}
			f.wantStates(t, "gone")
		})
	}
}

// A real SIGPIPE would end the process before it destroys its sandbox.
func TestAClosedPipeDestroysTheSandboxOfARun(t *testing.T) {
	f := newFake(t)
	f.runs(yes)
	cmd := process(t, "run", "base", "--", "yes")
	var errOut strings.Builder
	cmd.Stderr = &errOut
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 2)); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil { // as head -1 does
		t.Fatal(err)
	}
	if got := statusOf(t, cmd.Wait()); got != 141 || errOut.String() != "" {
		t.Errorf("exit status %d and %q, want a quiet 141", got, errOut.String())
	}
	f.wantStates(t, "gone")
}

func TestTheProcessExitsWithTheStatusOfItsCommand(t *testing.T) {
	f := newFake(t)
	f.run = func(_ context.Context, p *fakeProcess) (int, string) {
		_, _ = io.Copy(p.stderr, p.stdin)
		return 42, "exit status 42"
	}
	cmd := process(t, "run", "base", "--", "x")
	cmd.Stdin = strings.NewReader("to stderr")
	var errOut strings.Builder
	cmd.Stderr = &errOut
	if got := statusOf(t, cmd.Run()); got != 42 || errOut.String() != "to stderr" {
		t.Errorf("exit status %d and %q", got, errOut.String())
	}
}
