package hostfake

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Templates whose names mean something to the fake.
const (
	FailingTemplate = "failing" // its build fails in its second step
	EndlessTemplate = "endless" // its build goes on until the caller leaves
	UsedTemplate    = "used"    // it cannot be deleted
)

type buildStream = connect.BidiStream[hostv1.BuildTemplateRequest, hostv1.BuildTemplateResponse]

// BuildTemplate implements the contract: the log says how large the upload was.
func (h *Host) BuildTemplate(ctx context.Context, stream *buildStream) error {
	first, err := stream.Receive()
	if err != nil {
		return err
	}
	start := first.GetStart()
	if err := h.enter(ctx, "BuildTemplate", start.GetName()); err != nil {
		return err
	}
	h.count("builds", 1)
	defer h.count("builds", -1)
	say := func(step, line string) error {
		event := &hostv1.BuildTemplateResponse_Event{Step: step, Fraction: -1, Line: line}
		return stream.Send(&hostv1.BuildTemplateResponse{Message: &hostv1.BuildTemplateResponse_Event_{Event: event}})
	}
	if err := say("read context", ""); err != nil {
		return err
	}
	size, err := receive(stream)
	if err != nil {
		return err
	}
	login := start.GetRegistries()["registry.example"]
	if start.GetSource() == "packages" {
		start.Image = fmt.Sprint(start.GetSuite(), start.GetPackages())
	}
	line := fmt.Sprintf("%s %q, %d bytes, arguments %v, registry user %q", start.GetSource(), start.GetImage(), size, start.GetArgs(), login.GetUsername())
	if err := say("step 1 of 2: COPY . .", line); err != nil {
		return err
	}
	if err := say("step 2 of 2: RUN make", "making"); err != nil {
		return err
	}
	switch start.GetName() {
	case FailingTemplate:
		return hostapi.ToConnect(sandbox.Errorf(sandbox.KindInvalid, "step 2 of 2: RUN make (line 3): exit status 2"))
	case EndlessTemplate:
		<-ctx.Done()
		return ctx.Err()
	}
	made := &hostv1.Template{
		Name: start.GetName(), Digest: "sha256:new", SizeBytes: 1 << 20, MinDiskMib: 64, DefaultUser: "root", BuiltAt: timestamppb.Now(),
		Source: start.GetSource(), Start: []string{"/app"}, ExposedPorts: []string{"80/tcp"},
		Healthcheck: &hostv1.Healthcheck{Test: []string{"CMD", "/ok"}, IntervalNanos: 1_500_000_000, Retries: 4},
	}
	h.mu.Lock()
	h.templates = append(h.templates, made)
	h.mu.Unlock()
	return stream.Send(&hostv1.BuildTemplateResponse{Message: &hostv1.BuildTemplateResponse_Template{Template: made}})
}

func receive(stream *buildStream) (size int, _ error) {
	for {
		m, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return size, nil
		}
		if err != nil {
			return size, err
		}
		size += len(m.GetData())
	}
}

// GetTemplate implements the contract.
func (h *Host) GetTemplate(ctx context.Context, req *connect.Request[hostv1.GetTemplateRequest]) (*connect.Response[hostv1.GetTemplateResponse], error) {
	t, err := h.template(ctx, "GetTemplate", req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&hostv1.GetTemplateResponse{Template: t}), nil
}

// ReadTemplateLog implements the contract.
func (h *Host) ReadTemplateLog(ctx context.Context, req *connect.Request[hostv1.ReadTemplateLogRequest]) (*connect.Response[hostv1.ReadTemplateLogResponse], error) {
	t, err := h.template(ctx, "ReadTemplateLog", req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&hostv1.ReadTemplateLogResponse{Log: []byte("the log of " + t.GetName() + "\n")}), nil
}

func (h *Host) template(ctx context.Context, method, name string) (*hostv1.Template, error) {
	if err := h.enter(ctx, method, name); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, t := range h.templates {
		if t.GetName() == name {
			return t, nil
		}
	}
	return nil, hostapi.ToConnect(sandbox.Errorf(sandbox.KindNotFound, "template %q does not exist", name))
}

// DeleteTemplate implements the contract.
func (h *Host) DeleteTemplate(ctx context.Context, req *connect.Request[hostv1.DeleteTemplateRequest]) (*connect.Response[hostv1.DeleteTemplateResponse], error) {
	name := req.Msg.GetName()
	if err := h.enter(ctx, "DeleteTemplate", name); err != nil {
		return nil, err
	}
	if name == UsedTemplate {
		return nil, hostapi.ToConnect(sandbox.Errorf(sandbox.KindConflict, "template used has 1 sandboxes that lie on it: abc"))
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, snap := range h.snapshots {
		if snap.message.GetTemplate() == name {
			return nil, hostapi.ToConnect(sandbox.Errorf(sandbox.KindConflict, "template %s is needed by snapshot %s", name, snap.message.GetName()))
		}
	}
	i := slices.IndexFunc(h.templates, func(t *hostv1.Template) bool { return t.GetName() == name })
	if i < 0 {
		return nil, hostapi.ToConnect(sandbox.Errorf(sandbox.KindNotFound, "template %q does not exist", name))
	}
	h.templates = slices.Delete(slices.Clone(h.templates), i, i+1)
	return connect.NewResponse(&hostv1.DeleteTemplateResponse{}), nil
}

// Unstarted says how many creates were to leave the start command alone.
func (h *Host) Unstarted() int { return h.Count("unstarted") }

// Builds says how many builds run now.
func (h *Host) Builds() int { return h.Count("builds") }

func (h *Host) count(what string, n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.counts[what] += n
}
