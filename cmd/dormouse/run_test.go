package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func TestRunAnswersAndLeavesNothing(t *testing.T) {
	f := newFake(t)
	got := ask(t, "run", "base", "--mem", "1GiB", "--timeout", "90", "-e", "A=b=c", "--no-internet", "--no-start", "--", "echo", "hi")
	if want := (result{0, "echo hi\n", ""}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	f.wantStates(t, "gone")
	seconds, start := 90.0, false
	want := api.CreateSandbox{
		Template: "base", MemMiB: 1024, TimeoutSeconds: &seconds, Env: map[string]string{"A": "b=c"}, Network: &api.Network{}, Start: &start,
	}
	if diff := cmp.Diff(want, f.lastReq); diff != "" {
		t.Error(diff)
	}
}

// However the command ends, its status is ours and its sandbox goes.
func TestRunEnds(t *testing.T) {
	for name, tt := range map[string]struct {
		code   int
		status string
		want   int
	}{
		"with success":          {0, "exit status 0", 0},
		"with a failure":        {3, "exit status 3", 3},
		"with 255":              {255, "exit status 255", 255},
		"by SIGKILL":            {-1, "signal: killed", 137},
		"by SIGSEGV, with core": {-1, "signal: segmentation fault (core dumped)", 139},
		"by SIGTERM":            {-1, "signal: terminated", 143},
		"in no known way":       {-1, "who knows", 125},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			f.run = func(context.Context, *fakeProcess) (int, string) { return tt.code, tt.status }
			if got := ask(t, "run", "base", "--", "x"); got.code != tt.want {
				t.Errorf("exit status %d (%s), want %d", got.code, got.errOut, tt.want)
			}
			f.wantStates(t, "gone")
		})
	}
}

func TestRunOfAMissingProgramDestroysToo(t *testing.T) {
	f := newFake(t)
	got := ask(t, "run", "base", "--", "missing")
	if got.code != 125 || !strings.Contains(got.errOut, `no program "missing"`) || strings.Count(got.errOut, "\n") != 1 {
		t.Errorf("got %+v, want 125 and one sentence", got)
	}
	f.wantStates(t, "gone")
}

func TestRunOfAnUnknownTemplate(t *testing.T) {
	newFake(t)
	if got := ask(t, "run", "nosuch", "--", "x"); got.code != 125 || !strings.Contains(got.errOut, `no template "nosuch"`) {
		t.Errorf("got %+v", got)
	}
}

// What could not be destroyed is named, also when the command failed too.
func TestRunSaysWhatItLeaves(t *testing.T) {
	for code, want := range map[int]int{0: 125, 3: 3} {
		f := newFake(t)
		f.stuck = true
		f.run = func(context.Context, *fakeProcess) (int, string) { return code, "" }
		got := ask(t, "run", "base", "--", "x")
		if got.code != want || !strings.Contains(got.errOut, "destroy sandbox "+f.boxes[0].ID+": the disk does not let go") {
			t.Errorf("a command with status %d: %+v, want %d", code, got, want)
		}
	}
}

func TestRunKeepsWhatItIsToldToKeep(t *testing.T) {
	f := newFake(t)
	got := ask(t, "run", "base", "--keep", "--", "true")
	f.wantStates(t, "running")
	if got.code != 0 || got.errOut != "sandbox "+f.boxes[0].ID+"\n" {
		t.Errorf("got %+v", got)
	}
}

// A signal in the middle of the command, and in the middle of the create.
func TestRunDestroysWhenInterrupted(t *testing.T) {
	for _, when := range []string{"create", "command"} {
		t.Run(when, func(t *testing.T) {
			f := newFake(t)
			ctx, cancel := context.WithCancelCause(t.Context())
			ctrlC := func() { cancel(interrupted{syscall.SIGINT}) }
			f.run = func(ctx context.Context, p *fakeProcess) (int, string) {
				if when == "create" {
					t.Error("the command was started after the signal")
				}
				ctrlC()
				<-ctx.Done() // the stream ends with its client
				return -1, "signal: killed"
			}
			if when == "create" {
				f.onCreate = ctrlC
			}
			got := dormouse(t, ctx, strings.NewReader(""), "run", "base", "--", "sleep", "1000")
			if got.code != 130 {
				t.Errorf("exit status %d, want 130", got.code)
			}
			f.wantStates(t, "gone")
		})
	}
}

func TestRunDestroysWhenNobodyReadsItsOutput(t *testing.T) {
	f := newFake(t)
	f.run = yes
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Close() }()
	var errOut strings.Builder
	root := newRootCommand()
	root.SetIn(strings.NewReader(""))
	root.SetOut(w)
	root.SetErr(&errOut)
	root.SetArgs([]string{"run", "base", "--", "yes"})
	err = root.ExecuteContext(t.Context())
	complain(&errOut, t.Context(), err)
	if code := exitCode(t.Context(), err); code != 141 || errOut.String() != "" {
		t.Errorf("exit status %d and %q, want a quiet 141", code, errOut.String())
	}
	f.wantStates(t, "gone")
}

func TestRunAsJSON(t *testing.T) {
	f := newFake(t)
	f.run = func(_ context.Context, p *fakeProcess) (int, string) {
		_, _ = io.Copy(p.stdout, p.stdin)
		return 4, "exit status 4"
	}
	got := dormouse(t, t.Context(), strings.NewReader("in"), "run", "base", "--json", "--", "cat")
	var parsed runResult
	if err := json.Unmarshal([]byte(got.out), &parsed); err != nil {
		t.Fatalf("%v in %q", err, got.out)
	}
	if got.code != 4 || parsed.Result.Stdout != "in" || parsed.Result.ExitCode != 4 || parsed.Sandbox.ID != f.boxes[0].ID {
		t.Errorf("got %+v", got)
	}
}

func TestExecForwardsInputAndOutput(t *testing.T) {
	f := newFake(t)
	b := f.add("abcdefghijklmnopqrstuvwx")
	f.run = func(_ context.Context, p *fakeProcess) (int, string) {
		if p.exec.User != "root" || p.exec.Cwd != "/srv" || p.exec.Env["A"] != "1" || p.exec.TimeoutSeconds != 60 {
			t.Errorf("asked for %+v", p.exec)
		}
		n, _ := io.Copy(p.stdout, p.stdin)
		_, _ = fmt.Fprintf(p.stderr, "%d bytes", n)
		return 0, "exit status 0"
	}
	input := strings.Repeat("0123456789", 200_000) // more than the window of input
	got := dormouse(t, t.Context(), strings.NewReader(input), "exec", b.ID[:6], "-u", "root", "-w", "/srv", "-e", "A=1", "--timeout", "1m", "--", "cat")
	if got.code != 0 || got.out != input || got.errOut != "2000000 bytes" {
		t.Errorf("exit status %d, %d bytes, %q", got.code, len(got.out), got.errOut)
	}
}

// A command that never reads its input ends all the same.
func TestExecOfACommandThatIgnoresItsInput(t *testing.T) {
	f := newFake(t)
	b := f.add("abcdefghijklmnopqrstuvwx")
	f.run = func(context.Context, *fakeProcess) (int, string) { return 0, "exit status 0" }
	endless, w := io.Pipe()
	defer func() { _ = w.Close() }()
	if got := dormouse(t, t.Context(), endless, "exec", b.ID, "--", "true"); got.code != 0 {
		t.Errorf("got %+v", got)
	}
}

func TestExecSaysWhyItsSandboxEnded(t *testing.T) {
	f := newFake(t)
	b := f.add("abcdefghijklmnopqrstuvwx")
	f.run = func(ctx context.Context, _ *fakeProcess) (int, string) {
		f.end(b, sandbox.CauseTTL)
		panic(http.ErrAbortHandler) // the connection breaks off
	}
	got := ask(t, "exec", b.ID, "--", "sleep", "9")
	if got.code != 125 || !strings.Contains(got.errOut, "has ended: ttl") {
		t.Errorf("got %+v", got)
	}
}

func TestExecNeedsACommand(t *testing.T) {
	newFake(t)
	for _, line := range [][]string{{"exec"}, {"exec", "abcd"}, {"exec", "--", "ls"}, {"exec", "abcd", "ls", "-l"}, {"run", "base"}, {"run", "base", "--nosuch", "--", "x"}} {
		got := ask(t, line...)
		if got.code != 125 || !strings.Contains(got.errOut, "--help") {
			t.Errorf("%v: %+v, want 125 and where to read on", line, got)
		}
	}
}

func TestLogsFollowToTheEnd(t *testing.T) {
	f := newFake(t)
	b := f.add("abcdefghijklmnopqrstuvwx")
	f.logs = "booting\n"
	go func() {
		f.mu.Lock()
		f.logs += "up\n"
		f.mu.Unlock()
		f.end(b, sandbox.CauseUser)
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	got := dormouse(t, ctx, strings.NewReader(""), "logs", "-f", b.ID)
	if got.code != 0 || got.out != "booting\nup\n" {
		t.Errorf("got %+v", got)
	}
}

func TestEveryKindHasAnExitStatus(t *testing.T) {
	var missing []string
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range sandbox.Kinds() {
		n, ok := exitStatus[k]
		if !ok || n == 0 {
			missing = append(missing, string(k))
			continue
		}
		row := slices.ContainsFunc(strings.Split(string(readme), "\n"), func(line string) bool {
			return strings.HasPrefix(line, fmt.Sprintf("| %d |", n)) && strings.Contains(line, "`"+string(k)+"`")
		})
		if !row {
			t.Errorf("the README's table does not have %s with exit status %d", k, n)
		}
	}
	if len(missing) > 0 {
		t.Errorf("kinds without an exit status: %v", missing)
	}
}
