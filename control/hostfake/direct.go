package hostfake

import (
	"context"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1/hostv1connect"
)

// Wire stands for the way of one call to the host and back: do is the call itself.
// Not to call do loses the request, to return an error of its own afterwards loses
// the answer.
type Wire func(ctx context.Context, method, id string, do func() error) error

// Direct is a client of the host without a network in between: nothing of it
// happens but in the goroutines that call it. It has no streams.
func (h *Host) Direct(wire Wire) hostv1connect.HostServiceClient {
	return &directClient{host: h, wire: wire}
}

type directClient struct {
	hostv1connect.HostServiceClient // nil: a stream would be a mistake of the test
	host                            *Host
	wire                            Wire
}

// through makes one call.
func through[Req, Res any](ctx context.Context, c *directClient, method string, req *connect.Request[Req], call func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error)) (*connect.Response[Res], error) {
	var resp *connect.Response[Res]
	err := c.wire(ctx, method, subject(req.Any()), func() (err error) {
		resp, err = call(ctx, connect.NewRequest(copied(req.Msg)))
		return err
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(copied(resp.Msg)), nil
}

// copied is a message that its sender does not hold any more.
func copied[T any](m *T) *T {
	message, ok := any(m).(proto.Message)
	if !ok {
		panic("not a message")
	}
	out, ok := proto.Clone(message).(any).(*T)
	if !ok {
		panic("a clone of another type")
	}
	return out
}

// subject is what a request is about.
func subject(m any) string {
	switch m := m.(type) {
	case interface{ GetId() string }:
		return m.GetId()
	case interface{ GetName() string }:
		return m.GetName()
	case interface{ GetSpec() *hostv1.SandboxSpec }:
		return m.GetSpec().GetId()
	}
	return ""
}

func (c *directClient) GetHost(ctx context.Context, r *connect.Request[hostv1.GetHostRequest]) (*connect.Response[hostv1.GetHostResponse], error) {
	return through(ctx, c, "GetHost", r, c.host.GetHost)
}

func (c *directClient) CreateSandbox(ctx context.Context, r *connect.Request[hostv1.CreateSandboxRequest]) (*connect.Response[hostv1.CreateSandboxResponse], error) {
	return through(ctx, c, "CreateSandbox", r, c.host.CreateSandbox)
}

func (c *directClient) DestroySandbox(ctx context.Context, r *connect.Request[hostv1.DestroySandboxRequest]) (*connect.Response[hostv1.DestroySandboxResponse], error) {
	return through(ctx, c, "DestroySandbox", r, c.host.DestroySandbox)
}

func (c *directClient) ListSandboxes(ctx context.Context, r *connect.Request[hostv1.ListSandboxesRequest]) (*connect.Response[hostv1.ListSandboxesResponse], error) {
	return through(ctx, c, "ListSandboxes", r, c.host.ListSandboxes)
}

func (c *directClient) AcknowledgeEnded(ctx context.Context, r *connect.Request[hostv1.AcknowledgeEndedRequest]) (*connect.Response[hostv1.AcknowledgeEndedResponse], error) {
	return through(ctx, c, "AcknowledgeEnded", r, c.host.AcknowledgeEnded)
}

func (c *directClient) SetDeadline(ctx context.Context, r *connect.Request[hostv1.SetDeadlineRequest]) (*connect.Response[hostv1.SetDeadlineResponse], error) {
	return through(ctx, c, "SetDeadline", r, c.host.SetDeadline)
}

func (c *directClient) PingSandbox(ctx context.Context, r *connect.Request[hostv1.PingSandboxRequest]) (*connect.Response[hostv1.PingSandboxResponse], error) {
	return through(ctx, c, "PingSandbox", r, c.host.PingSandbox)
}

func (c *directClient) TouchSandbox(ctx context.Context, r *connect.Request[hostv1.TouchSandboxRequest]) (*connect.Response[hostv1.TouchSandboxResponse], error) {
	return through(ctx, c, "TouchSandbox", r, c.host.TouchSandbox)
}

func (c *directClient) PauseSandbox(ctx context.Context, r *connect.Request[hostv1.PauseSandboxRequest]) (*connect.Response[hostv1.PauseSandboxResponse], error) {
	return through(ctx, c, "PauseSandbox", r, c.host.PauseSandbox)
}

func (c *directClient) ResumeSandbox(ctx context.Context, r *connect.Request[hostv1.ResumeSandboxRequest]) (*connect.Response[hostv1.ResumeSandboxResponse], error) {
	return through(ctx, c, "ResumeSandbox", r, c.host.ResumeSandbox)
}

func (c *directClient) ForkSandbox(ctx context.Context, r *connect.Request[hostv1.ForkSandboxRequest]) (*connect.Response[hostv1.ForkSandboxResponse], error) {
	return through(ctx, c, "ForkSandbox", r, c.host.ForkSandbox)
}

func (c *directClient) CreateSnapshot(ctx context.Context, r *connect.Request[hostv1.CreateSnapshotRequest]) (*connect.Response[hostv1.CreateSnapshotResponse], error) {
	return through(ctx, c, "CreateSnapshot", r, c.host.CreateSnapshot)
}

func (c *directClient) DeleteSnapshot(ctx context.Context, r *connect.Request[hostv1.DeleteSnapshotRequest]) (*connect.Response[hostv1.DeleteSnapshotResponse], error) {
	return through(ctx, c, "DeleteSnapshot", r, c.host.DeleteSnapshot)
}

func (c *directClient) ListSnapshots(ctx context.Context, r *connect.Request[hostv1.ListSnapshotsRequest]) (*connect.Response[hostv1.ListSnapshotsResponse], error) {
	return through(ctx, c, "ListSnapshots", r, c.host.ListSnapshots)
}

func (c *directClient) Exec(ctx context.Context, r *connect.Request[hostv1.ExecRequest]) (*connect.Response[hostv1.ExecResponse], error) {
	return through(ctx, c, "Exec", r, c.host.Exec)
}

func (c *directClient) ListTemplates(ctx context.Context, r *connect.Request[hostv1.ListTemplatesRequest]) (*connect.Response[hostv1.ListTemplatesResponse], error) {
	return through(ctx, c, "ListTemplates", r, c.host.ListTemplates)
}
