package exec_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

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
			peak = max(peak, heap())
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

// heap is what is in use, of client and agent together.
func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

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
	if h := heap(); h > 64<<20 {
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
	req := connect.NewRequest(guesttest.Shell("sleep 1.5"))
	req.Header().Set("Keepalive-Ping-Interval", "1")
	stream, err := g.Process.Start(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	pings := 0
	for stream.Receive() {
		if stream.Msg().GetEvent().GetKeepalive() != nil {
			pings++
		}
	}
	if stream.Err() != nil || pings != 1 {
		t.Errorf("%d keepalives, %v", pings, stream.Err())
	}
}

func TestManyShortCommandsLoseNothing(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	before := testkit.OpenFDs(t)
	for i := range 200 {
		res := mustRun(t, g, &processv1.StartRequest{Process: &processv1.ProcessConfig{Cmd: "echo", Args: []string{strconv.Itoa(i)}}})
		if res.Output() != strconv.Itoa(i) {
			t.Fatalf("run %d gave %q", i, res.Output())
		}
	}
	testkit.Eventually(t, 5*time.Second, "without leaked descriptors", func() bool { return testkit.OpenFDs(t) <= before+4 })
}
