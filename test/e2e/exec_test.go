package e2e_test

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// TestHundredExecs: a hundred commands run in one sandbox at the same time,
// proved by a lock that holds all of them back until all have started.
func TestHundredExecs(t *testing.T) {
	const many = 100
	w := shared(t)
	id := w.box()
	w.sh(id, "mkdir /tmp/hundred && : > /tmp/hundred/lock")
	t.Cleanup(func() { w.sh(id, "rm -r /tmp/hundred") })
	ctx := within(t, 3*time.Minute)
	gate, err := w.Client.ExecStream(ctx, id, api.Exec{
		Shell: "exec flock -x /tmp/hundred/lock sh -c 'touch /tmp/hundred/shut; cat'",
	}, client.StreamOptions{Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = gate.Close() }()
	testkit.Eventually(t, time.Minute, "holding the lock", func() bool {
		return w.exec(id, api.Exec{Command: []string{"test", "-e", "/tmp/hundred/shut"}}).ExitCode == 0
	})
	start := time.Now()
	var execs errgroup.Group
	for i := range many {
		execs.Go(func() error {
			line := fmt.Sprintf("touch /tmp/hundred/up.%d; flock -s /tmp/hundred/lock echo %d; echo %d >&2; exit %d", i, i*i, -i, i)
			r, err := w.Client.Exec(ctx, id, api.Exec{Shell: line})
			if err != nil {
				return fmt.Errorf("exec %d: %w", i, err)
			}
			if r.Stdout != fmt.Sprintln(i*i) || r.Stderr != fmt.Sprintln(-i) || r.ExitCode != i {
				return fmt.Errorf("exec %d answers %q, %q, %s", i, r.Stdout, r.Stderr, r.Status)
			}
			return nil
		})
	}
	testkit.Eventually(t, 2*time.Minute, "all started", func() bool {
		list, err := w.Client.ListDir(ctx, id, "/tmp/hundred", "", 0) // costs the guest less than a command
		if err != nil {
			t.Fatal(err)
		}
		return len(list) == many+2 // and the lock, and that it is shut
	})
	started := time.Since(start)
	if err := gate.CloseStdin(); err != nil {
		t.Fatal(err)
	}
	if err := execs.Wait(); err != nil {
		t.Error(err)
	}
	t.Logf("%d execs in one sandbox were under way at once after %v; all answered their own output and status %v later",
		many, started, time.Since(start)-started)
}

// TestEnvAndUser: who a command is, where it is, and what it finds around it.
func TestEnvAndUser(t *testing.T) {
	w := shared(t)
	req := small()
	req.Env = map[string]string{"COLOUR": "dormouse grey", "SIZE": "small"}
	id := w.create(req).ID
	for _, tt := range []struct {
		name string
		exec api.Exec
		want string
		code int
	}{
		{"the default user", api.Exec{Shell: "id -un; id -u; pwd; echo $HOME $USER"}, "user\n1000\n/home/user\n/home/user user\n", 0},
		{"root", api.Exec{Shell: "id -un; id -u; echo $HOME", User: "root"}, "root\n0\n/root\n", 0},
		{"sudo", api.Exec{Shell: "sudo -n id -u"}, "0\n", 0},
		{"the sandbox's variables", api.Exec{Shell: "echo $COLOUR, $SIZE"}, "dormouse grey, small\n", 0},
		{"the command's own win", api.Exec{Shell: "echo $COLOUR, $SIZE", Env: map[string]string{"SIZE": "ein bißchen\nmehr"}}, "dormouse grey, ein bißchen mehr\n", 0},
		{"a working directory", api.Exec{Shell: "pwd", Cwd: "/usr/share"}, "/usr/share\n", 0},
		{"arguments are not a shell's", api.Exec{Command: []string{"printf", "%s|", "a b", "$HOME", "'", ""}}, "a b|$HOME|'||", 0},
		{"an exit code", api.Exec{Shell: "exit 37"}, "", 37},
		{"python is python3", api.Exec{Command: []string{"python", "-c", "import sys; print(sys.version_info[0])"}}, "3\n", 0},
		{"input", api.Exec{Command: []string{"tr", "a-z", "A-Z"}, Stdin: "grüße\n"}, "GRüßE\n", 0},
		{"no input", api.Exec{Command: []string{"cat"}}, "", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := w.in(t).exec(id, tt.exec)
			if r.Stdout != tt.want || r.ExitCode != tt.code || r.Stderr != "" {
				t.Errorf("got %q, %q, %s; want %q and status %d", r.Stdout, r.Stderr, r.Status, tt.want, tt.code)
			}
		})
	}
	if r := w.exec(id, api.Exec{Shell: "kill -KILL $$"}); r.Status != "signal: killed" {
		t.Errorf("a command that killed itself: %q", r.Status)
	}
	start := time.Now()
	r := w.exec(id, api.Exec{Shell: "sleep 600 & sleep 600", TimeoutSeconds: 1})
	if !r.TimedOut || time.Since(start) > 30*time.Second {
		t.Errorf("a command with a timeout of a second: timed out is %v after %v", r.TimedOut, time.Since(start))
	}
	if got := w.sh(id, "ls -d /proc/[0-9]*/cwd >/dev/null; grep -alE '^sleep' /proc/[0-9]*/cmdline | wc -l"); got != "0" {
		t.Errorf("%s processes are left of the command that was timed out", got)
	}
	for what, req := range map[string]api.Exec{
		"a program that is not there": {Command: []string{"no-such-program"}},
		"a user that is not there":    {Shell: "true", User: "nobody-of-that-name"},
		"a directory that is not":     {Shell: "true", Cwd: "/no/such/place"},
	} {
		_, err := w.Client.Exec(within(t, time.Minute), id, req)
		if err == nil {
			t.Errorf("%s: no error", what)
		}
		t.Logf("%s: %v", what, err)
	}
}

// TestStream: input and output as they come, any bytes, signals.
func TestStream(t *testing.T) {
	w := shared(t)
	id := w.box()
	t.Run("a conversation", func(t *testing.T) {
		out, in := io.Pipe()
		s, err := w.Client.ExecStream(within(t, time.Minute), id, api.Exec{
			Command: []string{"python3", "-uc", "for line in iter(input, 'bye'): print('you said', line)\nprint('done')"},
		}, client.StreamOptions{Stdin: true, Stdout: in})
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 100)
		for _, say := range []string{"one", "two", "three"} {
			if _, err := io.WriteString(s, say+"\n"); err != nil {
				t.Fatal(err)
			}
			want := "you said " + say + "\n" // arrives before the next line is sent
			if _, err := io.ReadFull(out, buf[:len(want)]); err != nil || string(buf[:len(want)]) != want {
				t.Fatalf("got %q, %v, want %q", buf[:len(want)], err, want)
			}
		}
		go func() { _, _ = io.Copy(io.Discard, out) }()
		if _, err := io.WriteString(s, "bye\n"); err != nil {
			t.Fatal(err)
		}
		if exit, err := s.Wait(); err != nil || exit.Code != 0 {
			t.Errorf("the end: %+v, %v", exit, err)
		}
	})
	t.Run("any bytes both ways", func(t *testing.T) {
		sent := stream(3 << 20)
		var out, errs bytes.Buffer
		s, err := w.Client.ExecStream(within(t, time.Minute), id, api.Exec{Shell: "tee /dev/stderr"},
			client.StreamOptions{Stdin: true, Stdout: &out, Stderr: &errs})
		if err != nil {
			t.Fatal(err)
		}
		all, err := io.ReadAll(sent)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Write(all); err != nil {
			t.Fatal(err)
		}
		if err := s.CloseStdin(); err != nil {
			t.Fatal(err)
		}
		if exit, err := s.Wait(); err != nil || exit.Code != 0 {
			t.Fatalf("the end: %+v, %v", exit, err)
		}
		if !bytes.Equal(out.Bytes(), all) || !bytes.Equal(errs.Bytes(), all) {
			t.Errorf("%d bytes came back as %d and %d, not the same", len(all), out.Len(), errs.Len())
		}
	})
	t.Run("signals", func(t *testing.T) {
		for signal, want := range map[string]string{api.SignalTerm: "signal: terminated", api.SignalKill: "signal: killed"} {
			s, err := w.Client.ExecStream(within(t, time.Minute), id, api.Exec{Command: []string{"sleep", "600"}}, client.StreamOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Kill(signal); err != nil {
				t.Fatal(err)
			}
			if exit, err := s.Wait(); err != nil || exit.Status != want {
				t.Errorf("%s: %+v, %v, want %q", signal, exit, err, want)
			}
		}
	})
	t.Run("an exit code with the last output", func(t *testing.T) {
		for range 20 {
			var out bytes.Buffer
			s, err := w.Client.ExecStream(within(t, time.Minute), id, api.Exec{Shell: "printf last; exit 3"}, client.StreamOptions{Stdout: &out})
			if err != nil {
				t.Fatal(err)
			}
			if exit, err := s.Wait(); err != nil || exit.Code != 3 || out.String() != "last" {
				t.Fatalf("got %q, %+v, %v", out.String(), exit, err)
			}
		}
	})
	t.Run("output that is cut says so", func(t *testing.T) {
		r := w.in(t).exec(id, api.Exec{Shell: "head -c 5000000 /dev/zero | tr '\\0' x; printf y >&2"})
		if !r.StdoutTruncated || r.StderrTruncated || len(r.Stdout) != api.MaxExecOutput || strings.Trim(r.Stdout, "x") != "" {
			t.Errorf("%d bytes of 5000000, truncated is %v and %v", len(r.Stdout), r.StdoutTruncated, r.StderrTruncated)
		}
	})
}
