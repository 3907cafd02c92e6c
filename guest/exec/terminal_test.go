package exec_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	processv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
	"github.com/dormouse-sandbox/dormouse/guest/guesttest"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

func inTerminal(req *processv1.StartRequest, cols, rows uint32) *processv1.StartRequest {
	req.Pty = &processv1.PTY{Size: &processv1.PTY_Size{Cols: cols, Rows: rows}}
	return req
}

// session is a command in a terminal, seen as its screen.
type session struct {
	*following
	screen bytes.Buffer
	end    *processv1.ProcessEvent_EndEvent
}

func openSession(t *testing.T, g *guesttest.Guest, req *processv1.StartRequest) *session {
	t.Helper()
	return &session{following: follow(t, g, req)}
}

func (s *session) input(t *testing.T, text string) {
	t.Helper()
	in := &processv1.ProcessInput{Input: &processv1.ProcessInput_Pty{Pty: []byte(text)}}
	if _, err := s.g.Process.SendInput(t.Context(), connect.NewRequest(&processv1.SendInputRequest{Process: byPID(s.pid), Input: in})); err != nil {
		t.Fatal(err)
	}
}

// until reads until text is on the screen, and takes the screen up to there away.
func (s *session) until(t *testing.T, text string) {
	t.Helper()
	stuck := time.AfterFunc(20*time.Second, s.cancel)
	defer stuck.Stop()
	for {
		if i := bytes.Index(s.screen.Bytes(), []byte(text)); i >= 0 {
			s.screen.Next(i + len(text))
			return
		}
		if !s.stream.Receive() {
			t.Fatalf("no %q on the screen but %q (%v)", text, s.screen.String(), s.stream.Err())
		}
		event := s.stream.Msg().GetEvent()
		s.screen.Write(event.GetData().GetPty())
		if event.GetEnd() != nil {
			s.end = event.GetEnd()
		}
	}
}

// leave reads to the end.
func (s *session) leave(t *testing.T) {
	t.Helper()
	for s.end == nil && s.stream.Receive() {
		s.end = s.stream.Msg().GetEvent().GetEnd()
	}
	if s.end == nil {
		t.Fatalf("no end: %v", s.stream.Err())
	}
}

func TestATerminal(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	res := mustRun(t, g, inTerminal(guesttest.Shell(`test -t 0 && test -t 1 && test -t 2 && echo tty; stty size; echo err >&2; ps -o tty= $$ | grep -c pts; exit 3`), 100, 30))
	if want := "tty\r\n30 100\r\nerr\r\n1\r\n"; string(res.PTY) != want || len(res.Stdout)+len(res.Stderr) > 0 {
		t.Errorf("got %q, stdout %q, stderr %q, want %q", res.PTY, res.Stdout, res.Stderr, want)
	}
	if res.End.GetExitCode() != 3 {
		t.Errorf("end: %v", res.End)
	}
	req := guesttest.Shell("stty size")
	req.Pty = &processv1.PTY{}
	if res := mustRun(t, g, req); string(res.PTY) != "24 80\r\n" {
		t.Errorf("a terminal of no size is %q", res.PTY)
	}
}

func TestATerminalBelongsToTheUser(t *testing.T) {
	testkit.Root(t)
	g := guesttest.Start(t, guesttest.Options{})
	req := connect.NewRequest(inTerminal(guesttest.Shell(`stat -c %u "$(tty)"; echo reopened > "$(tty)"`), 0, 0))
	req.Header().Set("Authorization", "Basic b3RoZXI6") // other:
	stream, err := g.Process.Start(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	var res guesttest.Result
	for stream.Receive() {
		res.Take(stream.Msg().GetEvent())
	}
	if string(res.PTY) != "12345\r\nreopened\r\n" || stream.Err() != nil {
		t.Errorf("got %q, %v", res.PTY, stream.Err())
	}
}

func TestTypingAndResizing(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	// A read that the signal interrupts fails as one at the end does: w tells which.
	const shell = `trap 'w=1; echo now $(stty size)' WINCH; stty size; while w=; read line || [ "$w" ]; do echo "got $line"; done; echo end`
	s := openSession(t, g, inTerminal(guesttest.Shell(shell), 80, 24))
	s.until(t, "24 80\r\n")
	s.input(t, "hello\r")
	s.until(t, "hello\r\n") // the echo
	s.until(t, "got hello\r\n")
	update := func(size *processv1.PTY_Size) error {
		_, err := g.Process.Update(t.Context(), connect.NewRequest(&processv1.UpdateRequest{Process: byPID(s.pid), Pty: &processv1.PTY{Size: size}}))
		return err
	}
	if err := update(&processv1.PTY_Size{Cols: 132, Rows: 50}); err != nil {
		t.Fatal(err)
	}
	s.input(t, "\r") // a shell may run its traps only after a read
	s.until(t, "now 50 132\r\n")
	if err := update(&processv1.PTY_Size{Cols: 90}); err != nil {
		t.Fatal(err)
	}
	s.input(t, "\r")
	s.until(t, "now 50 90\r\n")
	wantCode(t, update(&processv1.PTY_Size{Cols: 70000}), connect.CodeInvalidArgument, "65535")
	s.input(t, "\x04") // the end of a file, as a keyboard has it
	s.until(t, "end\r\n")
	s.leave(t)
	if s.end.GetExitCode() != 0 {
		t.Errorf("end: %v", s.end)
	}
}

func TestWhatDoesNotFitToATerminal(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	s := openSession(t, g, inTerminal(guesttest.Shell("exec sleep 60"), 80, 24))
	pipes := follow(t, g, guesttest.Shell("exec sleep 60"))
	stdin := &processv1.ProcessInput{Input: &processv1.ProcessInput_Stdin{Stdin: []byte("x")}}
	_, err := g.Process.SendInput(t.Context(), connect.NewRequest(&processv1.SendInputRequest{Process: byPID(s.pid), Input: stdin}))
	wantCode(t, err, connect.CodeInternal, "has a terminal")
	_, err = g.Process.SendInput(t.Context(), connect.NewRequest(&processv1.SendInputRequest{Process: byPID(s.pid), Input: &processv1.ProcessInput{}}))
	wantCode(t, err, connect.CodeInvalidArgument, "neither")
	_, err = g.Process.CloseStdin(t.Context(), connect.NewRequest(&processv1.CloseStdinRequest{Process: byPID(s.pid)}))
	wantCode(t, err, connect.CodeInternal, "Ctrl-D")
	_, err = g.Process.Update(t.Context(), connect.NewRequest(&processv1.UpdateRequest{Process: byPID(pipes.pid), Pty: &processv1.PTY{}}))
	wantCode(t, err, connect.CodeInternal, "no terminal")
	if _, err := g.Process.Update(t.Context(), connect.NewRequest(&processv1.UpdateRequest{Process: byPID(pipes.pid)})); err != nil {
		t.Error("an update of nothing:", err)
	}
	for _, f := range []*following{s.following, pipes} {
		f.signal(t, processv1.Signal_SIGNAL_SIGKILL)
		if res := f.finish(t); res.End.GetExitCode() != -1 {
			t.Errorf("end: %v", res.End)
		}
	}
}

// TestSignalsReachTheForeground ends what an interactive shell runs, and then the
// shell, which ignores SIGTERM.
func TestSignalsReachTheForeground(t *testing.T) {
	testkit.Tool(t, "bash")
	g := guesttest.Start(t, guesttest.Options{})
	req := inTerminal(&processv1.StartRequest{Process: &processv1.ProcessConfig{
		Cmd: "bash", Args: []string{"--norc", "--noprofile", "-i"}, Envs: map[string]string{"PS1": "$ ", "TERM": "dumb"},
	}}, 80, 24)
	s := openSession(t, g, req)
	pidFile := filepath.Join(g.Home, "pid")
	start := func() int {
		s.input(t, "sh -c 'echo $$ > "+pidFile+"; echo ready; exec sleep 300'\r")
		s.until(t, "\nready\r\n")
		data, err := os.ReadFile(pidFile)
		if err != nil {
			t.Fatal(err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
		if err != nil {
			t.Fatal(err)
		}
		return pid
	}
	pid := start()
	s.signal(t, processv1.Signal_SIGNAL_SIGTERM)
	testkit.Eventually(t, 5*time.Second, "terminated", func() bool { return !alive(pid) })
	s.input(t, "echo still $((40+2))\r")
	s.until(t, "still 42")

	pid = start()
	s.input(t, "\x03") // as the key
	testkit.Eventually(t, 5*time.Second, "interrupted", func() bool { return !alive(pid) })

	pid = start()
	s.signal(t, processv1.Signal_SIGNAL_SIGKILL)
	s.leave(t)
	if s.end.GetExitCode() != -1 {
		t.Errorf("end: %v", s.end)
	}
	testkit.Eventually(t, 5*time.Second, "killed", func() bool { return !alive(pid) || zombie(pid) })
}

// TestACommandThatLetsGoOfItsTerminal closes its streams and comes back.
func TestACommandThatLetsGoOfItsTerminal(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	res := mustRun(t, g, inTerminal(guesttest.Shell(`exec </dev/null >/dev/null 2>&1; sleep 0.3; echo back > /dev/tty`), 0, 0))
	if string(res.PTY) != "back\r\n" || res.End.GetExitCode() != 0 {
		t.Errorf("got %q, %v", res.PTY, res.End)
	}
}

func TestConnectToATerminal(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	req := inTerminal(guesttest.Shell("read x; echo $x"), 80, 24)
	req.Tag = proto.String("term")
	s := openSession(t, g, req)
	second, err := g.Process.Connect(t.Context(), connect.NewRequest(&processv1.ConnectRequest{Process: byTag("term")}))
	if err != nil {
		t.Fatal(err)
	}
	var res guesttest.Result
	if !second.Receive() || second.Msg().GetEvent().GetStart().GetPid() != s.pid {
		t.Fatalf("%v, %v", second.Msg(), second.Err())
	}
	s.input(t, "typed\r")
	s.until(t, "typed\r\ntyped\r\n")
	s.leave(t)
	for second.Receive() {
		res.Take(second.Msg().GetEvent())
	}
	if string(res.PTY) != "typed\r\ntyped\r\n" || res.End == nil {
		t.Errorf("the second reader got %q, %v, %v", res.PTY, res.End, second.Err())
	}
}

const manyLines = 100_000

// numbered checks that lines arrive in order, each once.
type numbered struct {
	next int
	rest []byte
}

func (n *numbered) take(t *testing.T, chunk []byte) {
	t.Helper()
	n.rest = append(n.rest, chunk...)
	for {
		line, rest, ok := bytes.Cut(n.rest, []byte("\n"))
		if !ok {
			n.rest = append([]byte(nil), n.rest...)
			return
		}
		n.next++
		if got := string(bytes.TrimRight(line, " \r")); got != fmt.Sprintf("line %d", n.next) {
			t.Fatalf("line %d is %q", n.next, got)
		}
		n.rest = rest
	}
}

// standstill waits until a process has written all that it can without being
// read. It may be all that it has to write.
func standstill(t *testing.T, pidFile string) {
	t.Helper()
	written := func() string {
		pid, _ := os.ReadFile(pidFile) // not there yet: no such process
		data, _ := os.ReadFile("/proc/" + strings.TrimSpace(string(pid)) + "/io")
		return string(data)
	}
	last, since := "", time.Now()
	testkit.Eventually(t, 20*time.Second, "at a standstill", func() bool {
		now := written()
		if now != last {
			last, since = now, time.Now()
			return now == "" // it has ended
		}
		return now != "" && time.Since(since) > 300*time.Millisecond
	})
}

// TestManyLinesThroughATerminal reads at full speed, and from when the process
// has stopped because nobody read. Long lines are more than sockets hold.
func TestManyLinesThroughATerminal(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	for _, late := range []bool{false, true} {
		format := "line %.0f"
		if late {
			format += strings.Repeat(" ", 150)
		}
		done := g.Watch(t, 4<<20)
		pidFile := filepath.Join(t.TempDir(), "pid")
		f := follow(t, g, inTerminal(guesttest.Shell(fmt.Sprintf("seq -f '%s' 1 %d & echo $! > %s; wait; exit 4", format, manyLines, pidFile)), 80, 24))
		if late {
			standstill(t, pidFile)
		}
		var lines numbered
		var end *processv1.ProcessEvent_EndEvent
		messages, peak := 0, uint64(0)
		for f.stream.Receive() {
			event := f.stream.Msg().GetEvent()
			lines.take(t, event.GetData().GetPty())
			if event.GetEnd() != nil {
				end = event.GetEnd()
			}
			if messages++; messages%200 == 0 {
				peak = max(peak, guesttest.Heap())
			}
		}
		if lines.next != manyLines || len(lines.rest) > 0 || end.GetExitCode() != 4 || f.stream.Err() != nil {
			t.Errorf("%d lines and %q, end %v, %v", lines.next, lines.rest, end, f.stream.Err())
		}
		if peak > 32<<20 {
			t.Errorf("the heap grew to %d MiB", peak>>20)
		}
		f.cancel()
		done()
	}
}

// TestATerminalHeldByABackgroundJob ends all the same, and what the command itself
// wrote arrives, although nobody has read before it was gone.
func TestATerminalHeldByABackgroundJob(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	f := follow(t, g, inTerminal(guesttest.Shell(`trap '' HUP; (sleep 30 &) ; i=0; while [ $i -lt 700 ]; do i=$((i+1)); echo line $i; done`), 80, 24))
	testkit.Eventually(t, 10*time.Second, "ended", func() bool { return !alive(int(f.pid)) })
	var lines numbered
	began := time.Now()
	for f.stream.Receive() {
		lines.take(t, f.stream.Msg().GetEvent().GetData().GetPty())
	}
	if lines.next != 700 || f.stream.Err() != nil {
		t.Errorf("%d lines, %v", lines.next, f.stream.Err())
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the end took %v", took)
	}
}
