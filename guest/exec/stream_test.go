package exec_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/exec"
	processv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
	"github.com/dormouse-sandbox/dormouse/guest/guesttest"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// following is a process that a test follows by hand.
type following struct {
	g      *guesttest.Guest
	stream *connect.ServerStreamForClient[processv1.StartResponse]
	cancel context.CancelFunc
	pid    uint32
}

func follow(t *testing.T, g *guesttest.Guest, req *processv1.StartRequest) *following {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	stream, err := g.Process.Start(ctx, connect.NewRequest(req))
	if err != nil {
		t.Fatal(err)
	}
	if !stream.Receive() || stream.Msg().GetEvent().GetStart() == nil {
		t.Fatalf("the first message is %v (%v), not start", stream.Msg(), stream.Err())
	}
	return &following{g, stream, cancel, stream.Msg().GetEvent().GetStart().GetPid()}
}

func (f *following) finish(t *testing.T) guesttest.Result {
	t.Helper()
	var res guesttest.Result
	for f.stream.Receive() {
		res.Take(f.stream.Msg().GetEvent())
	}
	if err := f.stream.Err(); err != nil {
		t.Fatal(err)
	}
	return res
}

func (f *following) signal(t *testing.T, sig processv1.Signal) {
	t.Helper()
	if _, err := f.g.Process.SendSignal(t.Context(), connect.NewRequest(&processv1.SendSignalRequest{Process: byPID(f.pid), Signal: sig})); err != nil {
		t.Fatal(err)
	}
}

// outputMiB is how much the default run pushes through; OUTPUT_MIB overrides it.
func outputMiB(t *testing.T) int64 {
	text := os.Getenv("OUTPUT_MIB")
	if text == "" {
		return 256
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestLargeOutputArrivesWholeWithFlatMemory(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	size := outputMiB(t) << 20
	data, sum := randomFile(t, 1<<20)
	repeat := size >> 20
	f := follow(t, g, guesttest.Shell(fmt.Sprintf("i=0; while [ $i -lt %d ]; do cat %s; i=$((i+1)); done", repeat, data)))
	want := sha256.New()
	for range repeat {
		want.Write(sum)
	}
	got, n, peak := sha256.New(), int64(0), uint64(0)
	for f.stream.Receive() {
		out := f.stream.Msg().GetEvent().GetData().GetStdout()
		got.Write(out)
		if n/(32<<20) != (n+int64(len(out)))/(32<<20) {
			peak = max(peak, guesttest.Heap())
		}
		n += int64(len(out))
	}
	if err := f.stream.Err(); err != nil {
		t.Fatal(err)
	}
	if n != size || !equal(got, want) {
		t.Errorf("%d of %d bytes, equal: %v", n, size, equal(got, want))
	}
	if peak > 64<<20 {
		t.Errorf("the heap grew to %d MiB", peak>>20)
	}
}

func randomFile(t *testing.T, size int64) (path string, data []byte) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "random")
	in, err := os.Open("/dev/urandom")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }() // a device
	data = make([]byte, size)
	if _, err := io.ReadFull(in, data); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return path, data
}

func equal(a, b hash.Hash) bool { return string(a.Sum(nil)) == string(b.Sum(nil)) }

// TestASlowReaderSlowsTheProcess does not read, and sees that the producer gets
// no further than the pipes and sockets between them hold.
func TestASlowReaderSlowsTheProcess(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	progress := filepath.Join(g.Home, "progress")
	f := follow(t, g, guesttest.Shell(`i=0; while [ $i -lt 400 ]; do head -c 262144 /dev/zero; i=$((i+1)); echo $i > `+progress+`; done`))
	reached := func() int {
		data, _ := os.ReadFile(progress) // not there yet: 0
		n, _ := strconv.Atoi(strings.TrimSpace(string(data)))
		return n
	}
	last, since := -1, time.Now()
	testkit.Eventually(t, 30*time.Second, "at a standstill", func() bool {
		if n := reached(); n != last {
			last, since = n, time.Now()
		}
		return time.Since(since) > 500*time.Millisecond
	})
	if last >= 400 {
		t.Fatal("the producer was not slowed: it wrote 100 MiB that nobody read")
	}
	if h := guesttest.Heap(); h > 64<<20 {
		t.Errorf("the heap is %d MiB", h>>20)
	}
	if res := f.finish(t); len(res.Stdout) != 400*262144 || res.End.GetExitCode() != 0 {
		t.Errorf("%d bytes, %v", len(res.Stdout), res.End)
	}
}

func TestADisconnectDoesNotKill(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	done := filepath.Join(g.Home, "done")
	// It writes more than the pipe holds after its reader has left.
	f := follow(t, g, guesttest.Shell(`read x; head -c 10000000 /dev/zero; echo ok > `+done+`; exec sleep 60`))
	f.cancel()
	for f.stream.Receive() {
	}
	input := &processv1.ProcessInput{Input: &processv1.ProcessInput_Stdin{Stdin: []byte("go\n")}}
	if _, err := g.Process.SendInput(t.Context(), connect.NewRequest(&processv1.SendInputRequest{Process: byPID(f.pid), Input: input})); err != nil {
		t.Fatal(err)
	}
	testkit.Eventually(t, 20*time.Second, "done", func() bool { _, err := os.Stat(done); return err == nil })
	f.signal(t, processv1.Signal_SIGNAL_SIGKILL)
	testkit.Eventually(t, 5*time.Second, "killed", func() bool { return !alive(int(f.pid)) })
}

func connectTo(t *testing.T, g *guesttest.Guest, pid uint32) *connect.ServerStreamForClient[processv1.ConnectResponse] {
	t.Helper()
	stream, err := g.Process.Connect(t.Context(), connect.NewRequest(&processv1.ConnectRequest{Process: byPID(pid)}))
	if err != nil {
		t.Fatal(err)
	}
	if !stream.Receive() || stream.Msg().GetEvent().GetStart().GetPid() != pid {
		t.Fatalf("the first message is %v (%v), not start of %d", stream.Msg(), stream.Err(), pid)
	}
	return stream
}

func TestConnectGetsOnlyWhatIsNew(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	f := follow(t, g, guesttest.Shell(`echo old; read x; echo new`))
	if !f.stream.Receive() || string(f.stream.Msg().GetEvent().GetData().GetStdout()) != "old\n" {
		t.Fatalf("got %v", f.stream.Msg())
	}
	second := connectTo(t, g, f.pid)
	input := &processv1.ProcessInput{Input: &processv1.ProcessInput_Stdin{Stdin: []byte("\n")}}
	if _, err := g.Process.SendInput(t.Context(), connect.NewRequest(&processv1.SendInputRequest{Process: byPID(f.pid), Input: input})); err != nil {
		t.Fatal(err)
	}
	first := f.finish(t)
	var res guesttest.Result
	for second.Receive() {
		res.Take(second.Msg().GetEvent())
	}
	if second.Err() != nil || res.Output() != "new" || first.Output() != "new" || res.End == nil {
		t.Errorf("first %q, second %q, end %v, %v", first.Output(), res.Output(), res.End, second.Err())
	}
}

func TestConnectAfterTheEnd(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	res := mustRun(t, g, guesttest.Shell("exit 5"))
	stream := connectTo(t, g, res.PID)
	if !stream.Receive() || stream.Msg().GetEvent().GetEnd().GetExitCode() != 5 {
		t.Errorf("got %v, %v", stream.Msg(), stream.Err())
	}
	list, err := g.Process.List(t.Context(), connect.NewRequest(&processv1.ListRequest{}))
	if err != nil || len(list.Msg.GetProcesses()) != 0 {
		t.Errorf("the list has %v, %v", list.Msg, err)
	}
}

func TestKeepalive(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	req := connect.NewRequest(guesttest.Shell("read x"))
	req.Header().Set("Keepalive-Ping-Interval", "1")
	began := time.Now()
	stream, err := g.Process.Start(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	pings, pid := 0, uint32(0)
	for stream.Receive() {
		event := stream.Msg().GetEvent()
		pid = max(pid, event.GetStart().GetPid())
		if event.GetKeepalive() == nil {
			continue
		}
		pings++
		if took := int(time.Since(began) / time.Second); pings > took {
			t.Errorf("%d keepalives within %d seconds", pings, took)
		}
		if pings == 1 {
			if _, err := g.Process.CloseStdin(t.Context(), connect.NewRequest(&processv1.CloseStdinRequest{Process: byPID(pid)})); err != nil {
				t.Fatal(err)
			}
		}
	}
	if stream.Err() != nil || pings == 0 {
		t.Errorf("%d keepalives, %v", pings, stream.Err())
	}
}

// TestManyShortCommandsLoseNothing starts one after the other, and asks of the
// first and the last how they ended: each is kept for its retention. Where all of them
// take longer than half of that, the first is one that is younger.
func TestManyShortCommandsLoseNothing(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	for _, kind := range []struct {
		name string
		pty  *processv1.PTY
		n    int
	}{{"pipes", nil, 1000}, {"terminals", &processv1.PTY{}, 250}} {
		t.Run(kind.name, func(t *testing.T) {
			done := g.Watch(t, 4<<20)
			var pids []uint32
			var ends []time.Time
			for i := range kind.n {
				req := guesttest.Shell(fmt.Sprintf("echo %d; exit %d", i, i%200))
				req.Pty = kind.pty
				res := mustRun(t, g, req)
				out := strings.TrimSpace(string(res.Stdout) + string(res.PTY))
				if out != strconv.Itoa(i) || res.End.GetExitCode() != int32(i%200) {
					t.Fatalf("run %d gave %q, %v", i, out, res.End)
				}
				pids, ends = append(pids, res.PID), append(ends, time.Now())
			}
			first := slices.IndexFunc(ends, func(end time.Time) bool { return time.Since(end) < exec.Retention/2 })
			for _, i := range []int{first, kind.n - 1} {
				stream := connectTo(t, g, pids[i])
				if !stream.Receive() || stream.Msg().GetEvent().GetEnd().GetExitCode() != int32(i%200) {
					t.Errorf("end of run %d: %v, %v", i, stream.Msg(), stream.Err())
				}
				if err := stream.Close(); err != nil {
					t.Error(err)
				}
			}
			done()
		})
	}
}

// TestAProcessThatEndsBeforeItsFirstReader reads nothing until the process is
// long gone.
func TestAProcessThatEndsBeforeItsFirstReader(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	for _, pty := range []*processv1.PTY{nil, {}} {
		pidFile := filepath.Join(t.TempDir(), "pid")
		req := guesttest.Shell("seq 1 500; echo $$ > " + pidFile + "; exit 9")
		req.Pty = pty
		stream, err := g.Process.Start(t.Context(), connect.NewRequest(req))
		if err != nil {
			t.Fatal(err)
		}
		testkit.Eventually(t, 10*time.Second, "at its end", func() bool {
			data, _ := os.ReadFile(pidFile) // not there yet: 0
			pid, _ := strconv.Atoi(strings.TrimSpace(string(data)))
			return pid > 0 && !alive(pid)
		})
		var res guesttest.Result
		for stream.Receive() {
			res.Take(stream.Msg().GetEvent())
		}
		lines := strings.Fields(string(res.Stdout) + string(res.PTY))
		if stream.Err() != nil || res.PID == 0 || len(lines) != 500 || lines[499] != "500" || res.End.GetExitCode() != 9 {
			t.Errorf("pid %d, %d lines, end %v, %v", res.PID, len(lines), res.End, stream.Err())
		}
	}
}
