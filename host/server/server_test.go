package server_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1/hostv1connect"
	"github.com/dormouse-sandbox/dormouse/host/server"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
	"github.com/dormouse-sandbox/dormouse/vmm/vmmfake"
)

// touched is a host on which every part that makes something says so: nothing
// of it may be reached by a request that is wrong.
type touched struct{ t *testing.T }

func (x touched) Acquire(context.Context) (host.Network, error) {
	x.t.Error("a network was acquired")
	return nil, errors.New("not here")
}

func (x touched) Adopt(context.Context, int) (host.Network, error) {
	x.t.Error("a network was adopted")
	return nil, errors.New("not here")
}
func (touched) Sweep(context.Context) error { return nil }

// touchedDisks are its disks.
type touchedDisks struct{ touched }

func (touchedDisks) Name() string                               { return "none" }
func (touchedDisks) Sweep(context.Context, []string) error      { return nil }
func (touchedDisks) Check(context.Context) (disk.Report, error) { return disk.Report{}, nil }

func (x touchedDisks) Discard(context.Context, string) error {
	x.t.Error("a disk was discarded")
	return errors.New("no disks here")
}

func (x touchedDisks) Create(context.Context, disk.Config) (disk.Disk, error) {
	x.t.Error("a disk was created")
	return nil, errors.New("not here")
}

func (x touchedDisks) Restore(context.Context, disk.Config) (disk.Disk, error) {
	x.t.Error("a disk was restored")
	return nil, errors.New("not here")
}

func (x touched) Log(name string) ([]byte, error) {
	_, err := x.Get(name)
	return nil, err
}

func (x touched) Get(name string) (template.Template, error) {
	if strings.ContainsAny(name, "./\\\x00") {
		x.t.Errorf("template %q was looked for", name)
	}
	return template.Template{}, sandbox.Errorf(sandbox.KindNotFound, "no template %q", name)
}
func (touched) List() ([]template.Template, error) { return nil, nil }

// open serves an agent as control reaches it: through the generated client,
// whose requests nobody has checked before.
func open(t *testing.T) (client hostv1connect.HostServiceClient, dir string) {
	t.Helper()
	dir = t.TempDir()
	for _, f := range []string{"kernel", "initrd", "images/precious", "host/precious"} {
		path := filepath.Join(dir, f)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(f), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	x := touched{t}
	agent, err := host.Open(t.Context(), host.Config{
		Dir: filepath.Join(dir, "host"), RunDir: filepath.Join(dir, "run"), Instance: "test1",
		VMM: vmmfake.New(vmmfake.Idle), Disks: []disk.Driver{touchedDisks{x}}, Networks: x, Templates: x,
		Kernel: filepath.Join(dir, "kernel"), Initrd: filepath.Join(dir, "initrd"), BootID: "fake-boot", MinFreeMiB: 1,
	})
	if err != nil {
		t.Fatal(err)
	}
	_, handler := server.New(agent)
	local := hostapi.NewLocal(handler)
	t.Cleanup(func() {
		if err := errors.Join(local.Close(), agent.Close()); err != nil {
			t.Error(err)
		}
	})
	return hostv1connect.NewHostServiceClient(local.Client(), local.BaseURL()), dir
}

// files lists everything below a folder.
func files(t *testing.T, dir string) string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		out = append(out, path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(out, "\n")
}

// climbers are names that lead elsewhere when they become part of a path.
var climbers = []string{
	"", ".", "..", "../images", "../../images", "/etc/passwd", "a/../../images", "..\\images", "%2e%2e%2fimages",
	"aaaaaaaaaaaaaaaaaaaaaaa/", "aaaaaaaaaaaaaaaaaaaaaaa\x00", "aaaaaaaaaaaaaaaaaaaaaaaa\n", "AAAAAAAAAAAAAAAAAAAAAAAA", strings.Repeat("a", 25),
}

const valid = "aaaaaaaaaaaaaaaaaaaaaaaa"

// calls makes every call that names a sandbox.
func calls(ctx context.Context, c hostv1connect.HostServiceClient, id string) map[string]func() error {
	soon := timestamppb.New(time.Now().Add(time.Hour))
	command := &hostv1.Command{Cmd: "true"}
	return map[string]func() error{
		"CreateSandbox": func() error {
			return create(ctx, c, &hostv1.SandboxSpec{Id: id, Template: "base", Vcpus: 1, MemMib: 128, DiskMib: 64, Deadline: soon})
		},
		"DestroySandbox": func() error { return unary(ctx, c.DestroySandbox, &hostv1.DestroySandboxRequest{Id: id}) },
		"SetDeadline":    func() error { return unary(ctx, c.SetDeadline, &hostv1.SetDeadlineRequest{Id: id, Deadline: soon}) },
		"PingSandbox":    func() error { return unary(ctx, c.PingSandbox, &hostv1.PingSandboxRequest{Id: id}) },
		"GetMetrics":     func() error { return unary(ctx, c.GetMetrics, &hostv1.GetMetricsRequest{Id: id}) },
		"ReadConsole":    func() error { return unary(ctx, c.ReadConsole, &hostv1.ReadConsoleRequest{Id: id}) },
		"Exec":           func() error { return unary(ctx, c.Exec, &hostv1.ExecRequest{Id: id, Command: command}) },
		"StatFile":       func() error { return unary(ctx, c.StatFile, &hostv1.StatFileRequest{Id: id, Path: "/x"}) },
		"ListDir":        func() error { return unary(ctx, c.ListDir, &hostv1.ListDirRequest{Id: id, Path: "/x"}) },
		"MakeDir":        func() error { return unary(ctx, c.MakeDir, &hostv1.MakeDirRequest{Id: id, Path: "/x"}) },
		"MoveFile": func() error {
			return unary(ctx, c.MoveFile, &hostv1.MoveFileRequest{Id: id, Source: "/x", Destination: "/y"})
		},
		"RemoveFile": func() error { return unary(ctx, c.RemoveFile, &hostv1.RemoveFileRequest{Id: id, Path: "/x"}) },
		"ReadFile":   func() error { return readFile(ctx, c, &hostv1.ReadFileRequest{Id: id, Path: "/x"}) },
		"WriteFile":  func() error { return writeFile(ctx, c, &hostv1.WriteFileRequest_Start{Id: id, Path: "/x"}) },
		"ReadTree":   func() error { return readTree(ctx, c, &hostv1.ReadTreeRequest{Id: id, Path: "/x"}) },
		"WriteTree":  func() error { return writeTree(ctx, c, &hostv1.WriteTreeRequest_Start{Id: id, Path: "/x"}) },
		"WatchDir":   func() error { return watchDir(ctx, c, &hostv1.WatchDirRequest{Id: id, Path: "/x"}) },
		"OpenPort":   func() error { return openPort(ctx, c, id) },
		"ExecStream": func() error {
			return execStream(ctx, c, start(&hostv1.ExecStreamRequest_Start{Id: id, Command: command}))
		},
		"a terminal": func() error {
			return execStream(ctx, c, start(&hostv1.ExecStreamRequest_Start{Id: id, Command: command, Terminal: &hostv1.Terminal{}, Keep: true}))
		},
		"attach": func() error {
			return execStream(ctx, c, &hostv1.ExecStreamRequest{Message: &hostv1.ExecStreamRequest_Attach_{Attach: &hostv1.ExecStreamRequest_Attach{Id: id, Pid: 1}}})
		},
		"SignalCommand": func() error {
			return unary(ctx, c.SignalCommand, &hostv1.SignalCommandRequest{Id: id, Pid: 1, Signal: 9})
		},
	}
}

func unary[Req, Res any](ctx context.Context, call func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), req *Req) error {
	_, err := call(ctx, connect.NewRequest(req))
	return err
}

func create(ctx context.Context, c hostv1connect.HostServiceClient, spec *hostv1.SandboxSpec) error {
	return unary(ctx, c.CreateSandbox, &hostv1.CreateSandboxRequest{Spec: spec})
}

func readFile(ctx context.Context, c hostv1connect.HostServiceClient, req *hostv1.ReadFileRequest) error {
	stream, err := c.ReadFile(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	for stream.Receive() {
	}
	return errors.Join(stream.Err(), stream.Close())
}

func watchDir(ctx context.Context, c hostv1connect.HostServiceClient, req *hostv1.WatchDirRequest) error {
	stream, err := c.WatchDir(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	for stream.Receive() {
	}
	return errors.Join(stream.Err(), stream.Close())
}

func writeFile(ctx context.Context, c hostv1connect.HostServiceClient, start *hostv1.WriteFileRequest_Start) error {
	stream := c.WriteFile(ctx)
	_ = stream.Send(&hostv1.WriteFileRequest{Message: &hostv1.WriteFileRequest_Start_{Start: start}}) // the answer has the reason
	_, err := stream.CloseAndReceive()
	return err
}

func readTree(ctx context.Context, c hostv1connect.HostServiceClient, req *hostv1.ReadTreeRequest) error {
	stream, err := c.ReadTree(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	for stream.Receive() {
	}
	return errors.Join(stream.Err(), stream.Close())
}

func writeTree(ctx context.Context, c hostv1connect.HostServiceClient, start *hostv1.WriteTreeRequest_Start) error {
	stream := c.WriteTree(ctx)
	_ = stream.Send(&hostv1.WriteTreeRequest{Message: &hostv1.WriteTreeRequest_Start_{Start: start}}) // the answer has the reason
	_, err := stream.CloseAndReceive()
	return err
}

func start(m *hostv1.ExecStreamRequest_Start) *hostv1.ExecStreamRequest {
	return &hostv1.ExecStreamRequest{Message: &hostv1.ExecStreamRequest_Start_{Start: m}}
}

func execStream(ctx context.Context, c hostv1connect.HostServiceClient, first *hostv1.ExecStreamRequest) error {
	stream := c.ExecStream(ctx)
	_ = stream.Send(first) // the answer has the reason
	_, err := stream.Receive()
	_ = stream.CloseRequest()  // it is over
	_ = stream.CloseResponse() // likewise
	return err
}

func openPort(ctx context.Context, c hostv1connect.HostServiceClient, id string) error {
	conn, err := hostapi.OpenPort(ctx, c, id, 8000)
	if err != nil {
		return hostapi.ToConnect(err) // as the others come
	}
	return conn.Close()
}

// refused checks that an error is of a kind and names the thing.
func refused(t *testing.T, what string, err error, kind sandbox.Kind, says string) {
	t.Helper()
	err = hostapi.FromConnect(err)
	if err == nil || sandbox.KindOf(err) != kind || !strings.Contains(err.Error(), says) {
		t.Errorf("%s: %v (%s), want an error of kind %s with %q", what, err, sandbox.KindOf(err), kind, says)
	}
}

// TestIDsThatClimb: whoever sends it, an ID that is none reaches nothing.
func TestIDsThatClimb(t *testing.T) {
	c, dir := open(t)
	before := files(t, dir)
	n := 0
	for _, id := range climbers {
		for name, call := range calls(t.Context(), c, id) {
			refused(t, name+" of "+id, call(), sandbox.KindInvalid, "sandbox ID")
			n++
		}
	}
	err := unary(t.Context(), c.AcknowledgeEnded, &hostv1.AcknowledgeEndedRequest{Ids: climbers})
	refused(t, "AcknowledgeEnded", err, sandbox.KindInvalid, "sandbox ID")
	if after := files(t, dir); after != before {
		t.Errorf("the host's files before:\n%s\nand after:\n%s", before, after)
	}
	t.Logf("%d calls with IDs that climb were refused; no file was touched", n)
}

// TestUnknownIDs: an ID that is one, of a sandbox that is not.
func TestUnknownIDs(t *testing.T) {
	c, _ := open(t)
	for name, call := range calls(t.Context(), c, valid) {
		switch name {
		case "CreateSandbox":
			refused(t, name, call(), sandbox.KindNotFound, "base")
		case "DestroySandbox": // may be repeated
			if err := call(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		default:
			refused(t, name, call(), sandbox.KindNotFound, valid)
		}
	}
}

// TestNamesThatClimb: every other name that could become part of a path.
func TestNamesThatClimb(t *testing.T) {
	c, dir := open(t)
	ctx := t.Context()
	before := files(t, dir)
	spec := func(change func(*hostv1.SandboxSpec)) error {
		s := &hostv1.SandboxSpec{
			Id: string(sandbox.NewID()), Template: "base", Vcpus: 1, MemMib: 128, DiskMib: 64,
			Deadline: timestamppb.New(time.Now().Add(time.Hour)),
		}
		change(s)
		return create(ctx, c, s)
	}
	for _, name := range []string{"..", "../images", "/etc", "a/b", "a\x00b", "..\\x", strings.Repeat("a", 65)} {
		refused(t, "template "+name, spec(func(s *hostv1.SandboxSpec) { s.Template = name }), sandbox.KindInvalid, "template name")
		refused(t, "host name "+name, spec(func(s *hostv1.SandboxSpec) { s.Hostname = name }), sandbox.KindInvalid, "host name")
		refused(t, "env name "+name, spec(func(s *hostv1.SandboxSpec) { s.Env = map[string]string{name + ".": "x"} }), sandbox.KindInvalid, "env")
		refused(t, "stat as "+name, unary(ctx, c.StatFile, &hostv1.StatFileRequest{Id: valid, Path: "/x", User: name}), sandbox.KindInvalid, "user name")
		refused(t, "read as "+name, readFile(ctx, c, &hostv1.ReadFileRequest{Id: valid, Path: "/x", User: name}), sandbox.KindInvalid, "user name")
		refused(t, "watch as "+name, watchDir(ctx, c, &hostv1.WatchDirRequest{Id: valid, Path: "/x", User: name}), sandbox.KindInvalid, "user name")
		refused(t, "write as "+name, writeFile(ctx, c, &hostv1.WriteFileRequest_Start{Id: valid, Path: "/x", User: name}), sandbox.KindInvalid, "user name")
		refused(t, "exec as "+name, unary(ctx, c.Exec, &hostv1.ExecRequest{Id: valid, Command: &hostv1.Command{Cmd: "true", User: name}}), sandbox.KindInvalid, "user name")
	}
	for _, path := range []string{"", "a\x00b", strings.Repeat("a", 4097)} {
		refused(t, "read", readFile(ctx, c, &hostv1.ReadFileRequest{Id: valid, Path: path}), sandbox.KindInvalid, "path")
		refused(t, "watch", watchDir(ctx, c, &hostv1.WatchDirRequest{Id: valid, Path: path}), sandbox.KindInvalid, "path")
		refused(t, "write", writeFile(ctx, c, &hostv1.WriteFileRequest_Start{Id: valid, Path: path}), sandbox.KindInvalid, "path")
		refused(t, "remove", unary(ctx, c.RemoveFile, &hostv1.RemoveFileRequest{Id: valid, Path: path}), sandbox.KindInvalid, "path")
		refused(t, "move to", unary(ctx, c.MoveFile, &hostv1.MoveFileRequest{Id: valid, Source: "/x", Destination: path}), sandbox.KindInvalid, "path")
	}
	huge, timed := &hostv1.Terminal{Cols: 1 << 16}, &hostv1.Command{Cmd: "true", TimeoutNanos: 1}
	run := func(m *hostv1.ExecStreamRequest_Start) error { return execStream(ctx, c, start(m)) }
	refused(t, "a wide terminal", run(&hostv1.ExecStreamRequest_Start{Id: valid, Command: &hostv1.Command{Cmd: "true"}, Terminal: huge}), sandbox.KindInvalid, "65536 columns")
	refused(t, "kept for a time", run(&hostv1.ExecStreamRequest_Start{Id: valid, Command: timed, Keep: true}), sandbox.KindInvalid, "timeout")
	refused(t, "input first", execStream(ctx, c, &hostv1.ExecStreamRequest{}), sandbox.KindInvalid, "start or attach")
	refused(t, "signal 1", unary(ctx, c.SignalCommand, &hostv1.SignalCommandRequest{Id: valid, Pid: 7, Signal: 1}), sandbox.KindInvalid, "only 9 and 15")
	for what, change := range map[string]func(*hostv1.SandboxSpec){
		"vcpus is 0":       func(s *hostv1.SandboxSpec) { s.Vcpus = 0 },
		"vcpus is 1000":    func(s *hostv1.SandboxSpec) { s.Vcpus = 1000 },
		"mem_mib is 0":     func(s *hostv1.SandboxSpec) { s.MemMib = 0 },
		"disk_mib is 0":    func(s *hostv1.SandboxSpec) { s.DiskMib = 0 },
		"from 128 to 6553": func(s *hostv1.SandboxSpec) { s.MemMib = 1<<32 - 1 },
		"deadline":         func(s *hostv1.SandboxSpec) { s.Deadline = nil },
	} {
		refused(t, what, spec(change), sandbox.KindInvalid, what)
	}
	if after := files(t, dir); after != before {
		t.Errorf("the host's files before:\n%s\nand after:\n%s", before, after)
	}
}
