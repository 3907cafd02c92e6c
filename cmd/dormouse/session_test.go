package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// patient is how long a test waits for what takes a moment.
const patient = 30 * time.Second

// window is a terminal of our own with a dormouse in it, in a process of its own.
type window struct {
	t      *testing.T
	cmd    *exec.Cmd
	keys   *os.File // what a keyboard and a screen are connected to
	tty    *os.File // what the process has; kept open here, to be looked at
	before unix.Termios

	mu    sync.Mutex
	shown bytes.Buffer
}

func openWindow(t *testing.T, cols, rows uint16, line ...string) *window {
	t.Helper()
	return windowFor(t, cols, rows, process(t, line...))
}

// windowFor is a terminal for any program.
func windowFor(t *testing.T, cols, rows uint16, cmd *exec.Cmd) *window {
	t.Helper()
	w := &window{t: t, cmd: cmd}
	var err error
	if w.keys, w.tty, err = pty.Open(); err != nil {
		t.Fatal(err)
	}
	w.resize(cols, rows)
	w.before = w.termios()
	w.cmd.Stdin, w.cmd.Stdout, w.cmd.Stderr = w.tty, w.tty, w.tty
	w.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	w.cmd.Env = append(w.cmd.Env, "TERM=dumb-test")
	return w
}

func (w *window) start() *window {
	w.t.Helper()
	if err := w.cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		buf := make([]byte, 1024)
		for {
			n, err := w.keys.Read(buf)
			w.mu.Lock()
			w.shown.Write(buf[:n])
			w.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	w.t.Cleanup(func() {
		_ = w.cmd.Process.Kill() // it has ended, if all is well
		_ = w.tty.Close()        // the reader sees the end
		_ = w.keys.Close()
		<-read
	})
	return w
}

func (w *window) termios() unix.Termios {
	w.t.Helper()
	state, err := unix.IoctlGetTermios(int(w.tty.Fd()), unix.TCGETS)
	if err != nil {
		w.t.Fatal(err)
	}
	return *state
}

func (w *window) raw() bool {
	return w.termios().Lflag&(unix.ECHO|unix.ICANON|unix.ISIG) == 0
}

func (w *window) wantAsBefore() {
	w.t.Helper()
	if diff := cmp.Diff(w.before, w.termios()); diff != "" {
		w.t.Errorf("the terminal is not as it was:\n%s", diff)
	}
}

func (w *window) resize(cols, rows uint16) {
	w.t.Helper()
	if err := pty.Setsize(w.keys, &pty.Winsize{Cols: cols, Rows: rows}); err != nil {
		w.t.Fatal(err)
	}
}

func (w *window) press(keys string) {
	w.t.Helper()
	if _, err := io.WriteString(w.keys, keys); err != nil {
		w.t.Fatal(err)
	}
}

func (w *window) screen() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.shown.String()
}

func (w *window) await(text string) {
	w.t.Helper()
	if !testkit.Poll(patient, func() bool { return strings.Contains(w.screen(), text) }) {
		w.t.Fatalf("no %q on the screen, but %q", text, w.screen())
	}
}

func (w *window) signal(s syscall.Signal) {
	w.t.Helper()
	if err := w.cmd.Process.Signal(s); err != nil {
		w.t.Fatal(err)
	}
}

// ends waits for the end, and checks status and terminal.
func (w *window) ends(status int) {
	w.t.Helper()
	if got := statusOf(w.t, w.cmd.Wait()); got != status {
		w.t.Errorf("exit status %d, want %d: %q", got, status, w.screen())
	}
	w.wantAsBefore()
}

// A narrow terminal, keys that would be signals, a change of its size, and a status.
func TestExecInATerminal(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	typed, sizes := make(chan string, 1), make(chan api.TerminalSize, 1)
	f.inTerminal(func(ctx context.Context, p *fakeTerminal) (int, string) {
		p.show(ctx, fmt.Sprintf("%v %q in %s as %s for %vs", *p.first.Size, p.first.Exec.Command, p.first.Exec.Env["TERM"], p.first.Exec.User, p.first.Exec.TimeoutSeconds))
		typed <- p.read(6)
		sizes <- <-p.sizes
		p.show(ctx, "\n\x1b[?25lbye")
		return 7, "exit status 7"
	})
	w := openWindow(t, 20, 5, "exec", "-it", "aaaab", "-u", "ann", "--timeout", "1m", "--", "vi", "-x").start()
	w.await("{20 5} [\"vi\" \"-x\"] in dumb-test as ann for 60s")
	testkit.Eventually(t, patient, "raw", w.raw)
	w.press("a\x03\x1a\x04\r\xff")
	if got := <-typed; got != "a\x03\x1a\x04\r\xff" {
		t.Errorf("typed %q", got)
	}
	w.resize(7, 3)
	if got := <-sizes; got != (api.TerminalSize{Cols: 7, Rows: 3}) {
		t.Errorf("resized to %v", got)
	}
	w.ends(7)
	// What is shown is shown as it is, and what ended in good order is not touched.
	const last = "for 60s\n\x1b[?25lbye"
	if !testkit.Poll(patient, func() bool { return strings.HasSuffix(w.screen(), last) }) {
		t.Errorf("on the screen is %q", w.screen())
	}
}

func TestExecInATerminalWithoutACommandIsALoginShell(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	f.inTerminal(func(_ context.Context, p *fakeTerminal) (int, string) {
		if e := p.first.Exec; len(e.Command) != 0 || e.Shell != "" || p.first.Keep {
			t.Errorf("asked for %+v", p.first)
		}
		return 0, "exit status 0"
	})
	openWindow(t, 80, 24, "exec", "-it", "aaaab").start().ends(0)
}

// However a session ends, the terminal is as it was, and says why.
func TestTheTerminalIsPutBack(t *testing.T) {
	const drawn = "\x1b[?1049h\x1b[?2004h\x1b[?25l\x1b[?1000;1006hEDITOR"
	const undone = "\x1b[?25h\x1b[?1000l\x1b[?1006l\x1b[?1049l\x1b[?2004l"
	for name, tt := range map[string]struct {
		end    func(w *window, f *fakeServer)
		result func() (int, string)
		env    string
		status int
		says   string
	}{
		"the server says why it ends":   {result: func() (int, string) { return -1, "" }, status: 125, says: undone + "\x1b[0m\r\n" + "dormouse: the API key was revoked"},
		"the connection breaks off":     {result: func() (int, string) { return 0, errCut.Error() }, status: 125, says: undone + "\x1b[0m\r\n" + "dormouse: read stream"},
		"the command is killed":         {result: func() (int, string) { return -1, "signal: killed" }, status: 137, says: undone},
		"the command ends in order":     {result: func() (int, string) { return 3, "exit status 3" }, status: 3, says: drawn},
		"SIGTERM":                       {end: func(w *window, _ *fakeServer) { w.signal(syscall.SIGTERM) }, status: 143, says: undone},
		"SIGINT from elsewhere":         {end: func(w *window, _ *fakeServer) { w.signal(syscall.SIGINT) }, status: 130, says: undone},
		"SIGHUP":                        {end: func(w *window, _ *fakeServer) { w.signal(syscall.SIGHUP) }, status: 129, says: undone},
		"SIGQUIT":                       {end: func(w *window, _ *fakeServer) { w.signal(syscall.SIGQUIT) }, status: 131, says: undone},
		"a panic where output is shown": {env: "terminal/show", status: 2, says: "panic: injected"},
		"a panic where keys are read":   {env: "terminal/type", end: func(w *window, _ *fakeServer) { w.press("x") }, status: 2, says: "panic: injected"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			f.add(boxA)
			rawNow := make(chan struct{})
			f.inTerminal(func(ctx context.Context, p *fakeTerminal) (int, string) {
				<-rawNow
				p.show(ctx, drawn)
				if tt.result == nil {
					<-ctx.Done() // with its client
					return 0, ""
				}
				return tt.result()
			})
			w := openWindow(t, 80, 24, "exec", "-it", "aaaab", "--", "vi")
			if tt.env != "" {
				w.cmd.Env = append(w.cmd.Env, panicsAt+"="+tt.env)
			}
			w.start()
			testkit.Eventually(t, patient, "raw", w.raw)
			close(rawNow)
			if tt.end != nil {
				if tt.env == "" {
					w.await("EDITOR")
				}
				tt.end(w, f)
			}
			w.ends(tt.status)
			w.await(tt.says)
		})
	}
}

// A second signal leaves at once, in the middle of what the first one began.
func TestTheSecondSignalPutsTheTerminalBackToo(t *testing.T) {
	f := newFake(t)
	stuck := make(chan struct{})
	defer close(stuck)
	f.mu.Lock()
	f.stuckDelete = stuck
	f.mu.Unlock()
	f.inTerminal(func(ctx context.Context, _ *fakeTerminal) (int, string) { <-ctx.Done(); return 0, "" })
	w := openWindow(t, 80, 24, "run", "-it", "base").start()
	testkit.Eventually(t, patient, "raw", w.raw)
	w.signal(syscall.SIGTERM)
	testkit.Eventually(t, patient, "at the destroying", func() bool { return f.deleting.Load() })
	w.signal(syscall.SIGTERM)
	w.ends(143)
}

// A stop from elsewhere gives the terminal back, and going on takes it again.
func TestStopAndGoOn(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	typed, resized := make(chan string, 1), make(chan api.TerminalSize, 10)
	f.inTerminal(func(_ context.Context, p *fakeTerminal) (int, string) {
		typed <- p.read(1)
		resized <- <-p.sizes
		return 0, "exit status 0"
	})
	w := openWindow(t, 80, 24, "exec", "-it", "aaaab").start()
	testkit.Eventually(t, patient, "raw", w.raw)
	w.signal(syscall.SIGTSTP)
	testkit.Eventually(t, patient, "stopped", func() bool { return stateOf(t, w.cmd.Process.Pid) == 'T' })
	w.wantAsBefore()
	w.signal(syscall.SIGCONT)
	testkit.Eventually(t, patient, "raw again", w.raw)
	w.press("x")
	if got := <-typed; got != "x" {
		t.Errorf("typed %q", got)
	}
	if got := <-resized; got != (api.TerminalSize{Cols: 80, Rows: 24}) {
		t.Errorf("it goes on at %v", got)
	}
	w.ends(0)
}

// stateOf is a process's state as ps shows it.
func stateOf(t *testing.T, pid int) byte {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), ") ")
	return rest[0]
}

func TestRunInATerminalLeavesNothing(t *testing.T) {
	f := newFake(t)
	f.inTerminal(func(_ context.Context, p *fakeTerminal) (int, string) {
		p.read(1)
		return 0, "exit status 0"
	})
	w := openWindow(t, 80, 24, "run", "-it", "base", "--", "sh").start()
	testkit.Eventually(t, patient, "raw", w.raw)
	w.press("\x04")
	w.ends(0)
	f.wantStates(t, "gone")
}

// What is kept is found again, and says how.
func TestKeepAndAttach(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	f.inTerminal(func(_ context.Context, p *fakeTerminal) (int, string) {
		if !p.first.Keep {
			t.Errorf("asked for %+v", p.first)
		}
		return 0, errCut.Error()
	})
	w := openWindow(t, 80, 24, "exec", "-it", "--keep", "aaaab").start()
	w.ends(125)
	w.await("dormouse attach " + boxA + " 77")

	f.inTerminal(func(_ context.Context, p *fakeTerminal) (int, string) {
		if p.first.Type != api.StreamConnect || p.first.PID != 77 || p.first.Size == nil {
			t.Errorf("asked for %+v", p.first)
		}
		return 5, "exit status 5"
	})
	openWindow(t, 80, 24, "attach", "aaaab", "77").start().ends(5)
	openWindow(t, 80, 24, "attach", "aaaab", "404").start().ends(125)
}

// Without -i nothing is typed, so it needs no terminal of ours.
func TestTerminalWithoutAKeyboard(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	f.inTerminal(func(ctx context.Context, p *fakeTerminal) (int, string) {
		p.show(ctx, fmt.Sprint("size ", p.first.Size))
		return 0, "exit status 0"
	})
	if got := ask(t, "exec", "-t", "aaaab", "--", "ls"); got != (result{out: "size <nil>"}) {
		t.Errorf("got %+v", got)
	}
}

func TestTerminalRefuses(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	f.inTerminal(func(context.Context, *fakeTerminal) (int, string) {
		t.Error("it was started")
		return 0, ""
	})
	for name, tt := range map[string]struct {
		line []string
		says string
	}{
		"input that is no terminal":          {[]string{"exec", "-it", "aaaab", "--", "sh"}, "standard input is not a terminal"},
		"the same in a run":                  {[]string{"run", "-it", "base", "--", "sh"}, "standard input is not a terminal"},
		"the same in attach":                 {[]string{"attach", "aaaab", "77"}, "standard input is not a terminal"},
		"a terminal as JSON":                 {[]string{"exec", "-t", "--json", "aaaab", "--", "sh"}, "--json"},
		"a run of one as JSON":               {[]string{"run", "-t", "--json", "base", "--", "sh"}, "--json"},
		"attach as JSON":                     {[]string{"attach", "--json", "aaaab", "77"}, "--json"},
		"keeping what has no terminal":       {[]string{"exec", "--keep", "aaaab", "--", "sh"}, "with -t"},
		"a command that is none, without -t": {[]string{"exec", "aaaab"}, "usage"},
		"attach to no number":                {[]string{"attach", "aaaab", "x"}, "not a process ID"},
		"attach to 0":                        {[]string{"attach", "aaaab", "0"}, "not a process ID"},
	} {
		t.Run(name, func(t *testing.T) {
			got := ask(t, tt.line...)
			if got.code != 125 || !strings.Contains(got.errOut, tt.says) || strings.Count(got.errOut, "\n") != 1 || got.out != "" {
				t.Errorf("got %+v, want 125 and one sentence with %q", got, tt.says)
			}
		})
	}
	f.wantStates(t, "running")
}

func TestScreenKnowsWhatIsSwitchedOn(t *testing.T) {
	for name, tt := range map[string]struct {
		drawn []string
		undo  string
	}{
		"nothing":                  {[]string{"hello\r\n"}, ""},
		"in pieces":                {[]string{"\x1b", "[", "?", "10", "49", "h"}, "\x1b[?1049l"},
		"on and off":               {[]string{"\x1b[?1049h...\x1b[?1049l"}, ""},
		"several at once":          {[]string{"\x1b[?1;1000;2004h"}, "\x1b[?1l\x1b[?1000l\x1b[?2004l"},
		"a hidden cursor":          {[]string{"\x1b[?25l\x1b[?25l"}, "\x1b[?25h"},
		"a cursor that was hidden": {[]string{"\x1b[?25l\x1b[?25h"}, ""},
		"a mode of another kind":   {[]string{"\x1b[4h\x1b[1049h\x1b[?7777h\x1b[?h"}, ""},
		"a full reset":             {[]string{"\x1b[?1049h\x1bc"}, ""},
		"broken by text":           {[]string{"\x1b[?10x49h"}, ""},
		"begun anew":               {[]string{"\x1b[?10\x1b[?25l"}, "\x1b[?25h"},
		"parameters without end":   {[]string{"\x1b[?" + strings.Repeat("1;", 1000) + "25l"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var shown bytes.Buffer
			s := &screen{w: &shown}
			for _, piece := range tt.drawn {
				if n, err := s.Write([]byte(piece)); n != len(piece) || err != nil {
					t.Fatal(n, err)
				}
			}
			if got := s.undo(); got != tt.undo || shown.String() != strings.Join(tt.drawn, "") {
				t.Errorf("undone by %q, want %q; shown %q", got, tt.undo, shown.String())
			}
			if got := s.undo(); got != "" {
				t.Errorf("undone again by %q", got)
			}
		})
	}
}
