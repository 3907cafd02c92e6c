package server

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
	"github.com/dormouse-sandbox/dormouse/template/oci"
)

func encodeTemplate(t template.Template) *hostv1.Template {
	out := &hostv1.Template{
		Name: t.Name, Digest: t.Digest, SizeBytes: uint64(t.AllocatedBytes), MinDiskMib: uint32((t.ImageBytes + 1<<20 - 1) >> 20),
		DefaultUser: t.DefaultUser, DefaultWorkdir: t.DefaultWorkdir, BuiltAt: timestamppb.New(t.BuiltAt), Source: valid(t.Source),
	}
	if t.Config != nil {
		out.Start, out.ExposedPorts = validAll(t.Config.Start), validAll(t.Config.ExposedPorts)
		out.Healthcheck = encodeHealthcheck(t.Config.Healthcheck)
	}
	return out
}

func encodeHealthcheck(h *template.Healthcheck) *hostv1.Healthcheck {
	if h == nil {
		return nil
	}
	return &hostv1.Healthcheck{
		Test: validAll(h.Test), IntervalNanos: h.Interval.Nanoseconds(), TimeoutNanos: h.Timeout.Nanoseconds(),
		StartPeriodNanos: h.StartPeriod.Nanoseconds(), Retries: uint32(max(h.Retries, 0)),
	}
}

// buildStream is the stream of one build.
type buildStream = connect.BidiStream[hostv1.BuildTemplateRequest, hostv1.BuildTemplateResponse]

// BuildTemplate runs a build and streams its log. Lines come from the builder and
// from the commands of its steps: they are sent as they come, and a slow reader
// slows the build.
func (s *server) BuildTemplate(ctx context.Context, stream *buildStream) error {
	first, err := stream.Receive()
	if errors.Is(err, io.EOF) {
		return hostapi.ToConnect(sandbox.Errorf(sandbox.KindInvalid, "a build needs a first message"))
	}
	if err != nil {
		return err
	}
	start := first.GetStart()
	if start == nil {
		return hostapi.ToConnect(sandbox.Errorf(sandbox.KindInvalid, "the first message of a build must be start"))
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	upload := &pieces{next: func() ([]byte, error) {
		m, err := stream.Receive()
		return m.GetData(), err
	}}
	var mu sync.Mutex // a build's news comes from one goroutine at a time, but not from one
	made, err := s.agent.BuildTemplate(ctx, buildRequest(start), upload, func(e template.Event) {
		mu.Lock()
		defer mu.Unlock()
		event := &hostv1.BuildTemplateResponse_Event{Step: valid(e.Step), Fraction: e.Fraction, Line: valid(e.Line)}
		if err := stream.Send(&hostv1.BuildTemplateResponse{Message: &hostv1.BuildTemplateResponse_Event_{Event: event}}); err != nil {
			cancel(sandbox.Errorf(sandbox.KindTransient, "nobody reads the build's log any more: %w", err))
		}
	})
	if err != nil {
		return hostapi.ToConnect(err)
	}
	return stream.Send(&hostv1.BuildTemplateResponse{Message: &hostv1.BuildTemplateResponse_Template{Template: encodeTemplate(made)}})
}

func buildRequest(m *hostv1.BuildTemplateRequest_Start) host.BuildRequest {
	r := host.BuildRequest{
		Name: m.GetName(), Source: m.GetSource(), Image: m.GetImage(), Dockerfile: m.GetDockerfile(), Target: m.GetTarget(),
		Args: m.GetArgs(), Suite: m.GetSuite(), Packages: m.GetPackages(), ImageMiB: bounded(m.GetImageMib()), Registries: map[string]oci.Credentials{},
	}
	for name, login := range m.GetRegistries() {
		r.Registries[name] = oci.Credentials{Username: login.GetUsername(), Password: login.GetPassword(), Token: login.GetToken()}
	}
	return r
}

func (s *server) GetTemplate(_ context.Context, req *connect.Request[hostv1.GetTemplateRequest]) (*connect.Response[hostv1.GetTemplateResponse], error) {
	t, err := s.agent.Template(req.Msg.GetName())
	return answer(&hostv1.GetTemplateResponse{Template: encodeTemplate(t)}, err)
}

func (s *server) ReadTemplateLog(_ context.Context, req *connect.Request[hostv1.ReadTemplateLogRequest]) (*connect.Response[hostv1.ReadTemplateLogResponse], error) {
	log, err := s.agent.TemplateLog(req.Msg.GetName())
	return answer(&hostv1.ReadTemplateLogResponse{Log: log}, err)
}

func (s *server) DeleteTemplate(ctx context.Context, req *connect.Request[hostv1.DeleteTemplateRequest]) (*connect.Response[hostv1.DeleteTemplateResponse], error) {
	return answer(&hostv1.DeleteTemplateResponse{}, s.agent.DeleteTemplate(ctx, req.Msg.GetName()))
}

// valid makes text of an image or of a command fit for a message.
func valid(s string) string { return strings.ToValidUTF8(s, "�") }

func validAll(list []string) []string {
	var out []string
	for _, s := range list {
		out = append(out, valid(s))
	}
	return out
}
