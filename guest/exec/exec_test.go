package exec_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	processv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
	"github.com/dormouse-sandbox/dormouse/guest/guesttest"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

func byPID(pid uint32) *processv1.ProcessSelector {
	return &processv1.ProcessSelector{Selector: &processv1.ProcessSelector_Pid{Pid: pid}}
}

func byTag(tag string) *processv1.ProcessSelector {
	return &processv1.ProcessSelector{Selector: &processv1.ProcessSelector_Tag{Tag: tag}}
}

func mustRun(t *testing.T, g *guesttest.Guest, req *processv1.StartRequest) guesttest.Result {
	t.Helper()
	res, err := g.Run(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if res.End == nil {
		t.Fatal("the stream has no end event")
	}
	return res
}

func wantCode(t *testing.T, err error, code connect.Code, text string) {
	t.Helper()
	if connect.CodeOf(err) != code || err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("got %v, want %v with %q", err, code, text)
	}
}

func alive(pid int) bool { return syscall.Kill(pid, 0) == nil }

func TestHowAProcessEnds(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	for script, want := range map[string]*processv1.ProcessEvent_EndEvent{
		"exit 0":        {ExitCode: 0, Exited: true, Status: "exit status 0"},
		"exit 7":        {ExitCode: 7, Exited: true, Status: "exit status 7", Error: proto.String("exit status 7")},
		"exit 255":      {ExitCode: 255, Exited: true, Status: "exit status 255", Error: proto.String("exit status 255")},
		"kill -9 $$":    {ExitCode: -1, Status: "signal: killed", Error: proto.String("signal: killed")},
		"kill -TERM $$": {ExitCode: -1, Status: "signal: terminated", Error: proto.String("signal: terminated")},
	} {
		if got := mustRun(t, g, guesttest.Shell(script)).End; !proto.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", script, got, want)
		}
	}
}

func TestOutputAndErrorsAreApart(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	res := mustRun(t, g, guesttest.Shell("echo out; echo err >&2; printf 'no newline'"))
	if string(res.Stdout) != "out\nno newline" || string(res.Stderr) != "err\n" {
		t.Errorf("stdout %q, stderr %q", res.Stdout, res.Stderr)
	}
}

func TestEnvironmentAndDirectory(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	req := guesttest.Shell(`echo "$HOME $USER $LOGNAME $X"; pwd; command -v ls >/dev/null && echo path`)
	req.Process.Envs = map[string]string{"X": "call"}
	want := fmt.Sprintf("%s tester tester call\n%s\npath", g.Home, g.Home)
	if got := mustRun(t, g, req).Output(); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if err := os.Mkdir(filepath.Join(g.Home, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, cwd := range []string{"sub", "~/sub", filepath.Join(g.Home, "sub")} {
		req := guesttest.Shell("pwd")
		req.Process.Cwd = &cwd
		if got := mustRun(t, g, req).Output(); got != filepath.Join(g.Home, "sub") {
			t.Errorf("cwd %s: %s", cwd, got)
		}
	}
}

func TestRequestsThatCannotStart(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	missing := "/no/such/dir"
	shell := func(change func(*processv1.StartRequest)) *processv1.StartRequest {
		req := guesttest.Shell("exit 0")
		change(req)
		return req
	}
	before := testkit.OpenFDs(t)
	for name, tt := range map[string]struct {
		req  *processv1.StartRequest
		code connect.Code
		text string
	}{
		"missing cwd":     {shell(func(r *processv1.StartRequest) { r.Process.Cwd = &missing }), connect.CodeInvalidArgument, missing},
		"missing command": {shell(func(r *processv1.StartRequest) { r.Process.Cmd = "no-such-cmd" }), connect.CodeInvalidArgument, "no-such-cmd"},
		"missing path":    {shell(func(r *processv1.StartRequest) { r.Process.Cmd = "/no/such" }), connect.CodeInvalidArgument, "/no/such"},
		"a directory":     {shell(func(r *processv1.StartRequest) { r.Process.Cmd = "/tmp" }), connect.CodeInvalidArgument, "/tmp"},
		"empty command":   {shell(func(r *processv1.StartRequest) { r.Process.Cmd = "" }), connect.CodeInvalidArgument, "cmd"},
		"bad variable":    {shell(func(r *processv1.StartRequest) { r.Process.Envs = map[string]string{"a=b": "c"} }), connect.CodeInvalidArgument, "a=b"},
		"a huge terminal": {shell(func(r *processv1.StartRequest) {
			r.Pty = &processv1.PTY{Size: &processv1.PTY_Size{Cols: 65536}}
		}), connect.CodeInvalidArgument, "65535 at most"},
		"a terminal without a command": {shell(func(r *processv1.StartRequest) {
			r.Process.Cmd, r.Pty = "/no/such", &processv1.PTY{}
		}), connect.CodeInvalidArgument, "/no/such"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := g.Run(t.Context(), tt.req)
			wantCode(t, err, tt.code, tt.text)
		})
	}
	testkit.Eventually(t, 5*time.Second, "without leaked descriptors", func() bool { return testkit.OpenFDs(t) <= before+2 })
}

func TestUsers(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	start := func(user string) (guesttest.Result, error) {
		req := connect.NewRequest(guesttest.Shell("id -u; id -G"))
		req.Header().Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(user+":")))
		stream, err := g.Process.Start(t.Context(), req)
		if err != nil {
			return guesttest.Result{}, err
		}
		var res guesttest.Result
		for stream.Receive() {
			res.Take(stream.Msg().GetEvent())
		}
		return res, stream.Err()
	}
	_, err := start("nobody-knows")
	wantCode(t, err, connect.CodeUnauthenticated, "invalid username: 'nobody-knows'")
	if res, err := start(guesttest.User); err != nil || !strings.HasPrefix(res.Output(), strconv.Itoa(os.Geteuid())) {
		t.Errorf("%q, %v", res.Output(), err)
	}
	testkit.Root(t)
	if res, err := start("other"); err != nil || res.Output() != "12345\n12345 12346" {
		t.Errorf("%q, %v", res.Output(), err)
	}
}

func TestInput(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	stream, err := g.Process.Start(t.Context(), connect.NewRequest(func() *processv1.StartRequest {
		req := guesttest.Shell("cat; echo end")
		req.Tag = proto.String("cat")
		return req
	}()))
	if err != nil {
		t.Fatal(err)
	}
	stream.Receive()
	var res guesttest.Result
	res.Take(stream.Msg().GetEvent())

	data := func(s string) *processv1.ProcessInput {
		return &processv1.ProcessInput{Input: &processv1.ProcessInput_Stdin{Stdin: []byte(s)}}
	}
	if _, err := g.Process.SendInput(t.Context(), connect.NewRequest(&processv1.SendInputRequest{Process: byPID(res.PID), Input: data("one ")})); err != nil {
		t.Fatal(err)
	}
	in := g.Process.StreamInput(t.Context())
	for _, msg := range []*processv1.StreamInputRequest{
		{Event: &processv1.StreamInputRequest_Start{Start: &processv1.StreamInputRequest_StartEvent{Process: byTag("cat")}}},
		{Event: &processv1.StreamInputRequest_Data{Data: &processv1.StreamInputRequest_DataEvent{Input: data("two ")}}},
		{Event: &processv1.StreamInputRequest_Keepalive{Keepalive: &processv1.StreamInputRequest_KeepAlive{}}},
		{Event: &processv1.StreamInputRequest_Data{Data: &processv1.StreamInputRequest_DataEvent{Input: data("three\n")}}},
	} {
		if err := in.Send(msg); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := in.CloseAndReceive(); err != nil {
		t.Fatal(err)
	}
	pty := &processv1.ProcessInput{Input: &processv1.ProcessInput_Pty{Pty: []byte("x")}}
	_, err = g.Process.SendInput(t.Context(), connect.NewRequest(&processv1.SendInputRequest{Process: byPID(res.PID), Input: pty}))
	wantCode(t, err, connect.CodeInternal, "terminal")
	for range 2 {
		if _, err := g.Process.CloseStdin(t.Context(), connect.NewRequest(&processv1.CloseStdinRequest{Process: byPID(res.PID)})); err != nil {
			t.Fatal(err)
		}
	}
	for stream.Receive() {
		res.Take(stream.Msg().GetEvent())
	}
	if got := res.Output(); got != "one two three\nend" {
		t.Errorf("got %q", got)
	}
}

func TestInputAfterClose(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	f := follow(t, g, guesttest.Shell("exec sleep 60"))
	if _, err := g.Process.CloseStdin(t.Context(), connect.NewRequest(&processv1.CloseStdinRequest{Process: byPID(f.pid)})); err != nil {
		t.Fatal(err)
	}
	input := &processv1.ProcessInput{Input: &processv1.ProcessInput_Stdin{Stdin: []byte("x")}}
	_, err := g.Process.SendInput(t.Context(), connect.NewRequest(&processv1.SendInputRequest{Process: byPID(f.pid), Input: input}))
	wantCode(t, err, connect.CodeInternal, "closed")
	f.signal(t, processv1.Signal_SIGNAL_SIGKILL)
	if res := f.finish(t); res.End.GetExitCode() != -1 {
		t.Errorf("end: %v", res.End)
	}
}

func TestInputThatNobodyReadsWaitsAndCanBeCancelled(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	f := follow(t, g, guesttest.Shell("exec sleep 60"))
	input := &processv1.ProcessInput{Input: &processv1.ProcessInput_Stdin{Stdin: make([]byte, 1<<20)}}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := g.Process.SendInput(ctx, connect.NewRequest(&processv1.SendInputRequest{Process: byPID(f.pid), Input: input}))
	wantCode(t, err, connect.CodeDeadlineExceeded, "")
	f.signal(t, processv1.Signal_SIGNAL_SIGTERM)
	f.finish(t)
}

func TestNoInput(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	req := guesttest.Shell("cat; echo end")
	req.Stdin = proto.Bool(false)
	if got := mustRun(t, g, req).Output(); got != "end" {
		t.Errorf("got %q", got)
	}
}

func TestTheNewestProcessWithATagIsMeant(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	tagged := func(script string) *processv1.StartRequest {
		req := guesttest.Shell(script)
		req.Tag = proto.String("t")
		return req
	}
	first := follow(t, g, tagged("exec sleep 60"))
	second := follow(t, g, tagged("exec sleep 60"))
	list, err := g.Process.List(t.Context(), connect.NewRequest(&processv1.ListRequest{}))
	if err != nil || len(list.Msg.GetProcesses()) != 2 || list.Msg.GetProcesses()[0].GetTag() != "t" {
		t.Fatalf("%v, %v", list, err)
	}
	kill := &processv1.SendSignalRequest{Process: byTag("t"), Signal: processv1.Signal_SIGNAL_SIGKILL}
	for _, f := range []*following{second, first} {
		if _, err := g.Process.SendSignal(t.Context(), connect.NewRequest(kill)); err != nil {
			t.Fatal(err)
		}
		f.finish(t)
	}
	_, err = g.Process.SendSignal(t.Context(), connect.NewRequest(kill))
	wantCode(t, err, connect.CodeNotFound, "")
}

func TestUnknownProcesses(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	_, err := g.Process.SendSignal(t.Context(), connect.NewRequest(&processv1.SendSignalRequest{Process: byPID(1 << 30), Signal: processv1.Signal_SIGNAL_SIGKILL}))
	wantCode(t, err, connect.CodeNotFound, "1073741824")
	_, err = g.Process.CloseStdin(t.Context(), connect.NewRequest(&processv1.CloseStdinRequest{Process: byTag("x")}))
	wantCode(t, err, connect.CodeNotFound, `"x"`)
	_, err = g.Process.CloseStdin(t.Context(), connect.NewRequest(&processv1.CloseStdinRequest{}))
	wantCode(t, err, connect.CodeInvalidArgument, "tag")
	_, err = g.Process.Update(t.Context(), connect.NewRequest(&processv1.UpdateRequest{Process: byTag("x")}))
	wantCode(t, err, connect.CodeNotFound, `"x"`)
	_, err = g.Process.SendInput(t.Context(), connect.NewRequest(&processv1.SendInputRequest{Process: byTag("x")}))
	wantCode(t, err, connect.CodeNotFound, `"x"`)
}

func TestConcurrentCommands(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	const n = 100
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			res, err := g.Run(t.Context(), guesttest.Shell(fmt.Sprintf("echo %d; exit %d", i, i)))
			if err != nil || res.Output() != strconv.Itoa(i) || res.End.GetExitCode() != int32(i) {
				t.Errorf("%d: %q, %v, %v", i, res.Output(), res.End, err)
			}
		})
	}
	wg.Wait()
}

func TestTimeoutKillsTheDescendants(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	var fields []string
	for limit := 500 * time.Millisecond; len(fields) != 2; limit *= 4 { // on a slow machine they start later
		if limit > time.Minute {
			t.Fatalf("the script wrote %q", fields)
		}
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		pids := filepath.Join(g.Home, "pids-"+limit.String())
		// One in the group, one in a session of its own.
		script := `sleep 300 & echo $! > ` + pids + `; setsid sh -c 'echo $$ >> ` + pids + `; exec sleep 300' & wait`
		_, err := g.Run(ctx, guesttest.Shell(script))
		cancel()
		wantCode(t, err, connect.CodeDeadlineExceeded, "")
		data, err := os.ReadFile(pids)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		fields = strings.Fields(string(data))
	}
	for _, field := range fields {
		pid, err := strconv.Atoi(field)
		if err != nil {
			t.Fatal(err)
		}
		testkit.Eventually(t, 5*time.Second, fmt.Sprintf("rid of %d", pid), func() bool { return !alive(pid) || zombie(pid) })
	}
}

// TestManyTimeoutsAtOnce ends more trees at once than could each be looked for at the
// same time. None may stay, and least of all held still.
func TestManyTimeoutsAtOnce(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	done := g.Watch(t, 4<<20)
	marker := fmt.Sprintf("0.0%d", time.Now().UnixNano()) // of our processes in /proc
	var wg sync.WaitGroup
	for range 60 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := g.Run(ctx, guesttest.Shell("(while :; do sleep "+marker+"; done) & wait"))
			wantCode(t, err, connect.CodeDeadlineExceeded, "")
		})
	}
	wg.Wait()
	testkit.Eventually(t, 20*time.Second, "rid of all of them", func() bool {
		files, _ := filepath.Glob("/proc/[0-9]*/cmdline") // the pattern is right
		return !slices.ContainsFunc(files, func(file string) bool {
			data, _ := os.ReadFile(file) // it may have ended by now
			return strings.Contains(string(data), marker)
		})
	})
	done()
}

// zombie tells a process that nobody reaped, because this test is not PID 1.
func zombie(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return errors.Is(err, os.ErrNotExist) || strings.Contains(string(data), ") Z ")
}

func TestABackgroundJobDoesNotHoldTheEnd(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	file := filepath.Join(g.Home, "late")
	// The job writes to its inherited pipe after the end: it must survive that.
	began := time.Now()
	res := mustRun(t, g, guesttest.Shell(`(sleep 4; echo late; echo survived > `+file+`) & echo now`))
	if took := time.Since(began); took > 3500*time.Millisecond {
		t.Errorf("the end took %v", took)
	}
	if res.Output() != "now" {
		t.Errorf("got %q", res.Output())
	}
	testkit.Eventually(t, 10*time.Second, "survived", func() bool { _, err := os.Stat(file); return err == nil })
}

func TestABackgroundJobThatNeverStopsDoesNotHoldTheEnd(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	pidFile := filepath.Join(g.Home, "pid")
	res, err := g.Run(ctx, guesttest.Shell(`yes & echo $! > `+pidFile))
	if err != nil || res.End.GetExitCode() != 0 {
		t.Fatalf("%v, %v", res.End, err)
	}
	data, err := os.ReadFile(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Error("the job has died:", err)
	}
}
