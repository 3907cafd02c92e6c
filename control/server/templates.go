package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func templateOut(t *hostv1.Template) api.Template {
	out := api.Template{
		Name: t.GetName(), Digest: t.GetDigest(), SizeBytes: t.GetSizeBytes(), MinDiskMiB: int(t.GetMinDiskMib()),
		DefaultUser: t.GetDefaultUser(), DefaultWorkdir: t.GetDefaultWorkdir(), BuiltAt: timeOut(t.GetBuiltAt()),
		Source: t.GetSource(), Start: t.GetStart(), ExposedPorts: t.GetExposedPorts(),
	}
	if h := t.GetHealthcheck(); h != nil {
		out.Healthcheck = &api.Healthcheck{
			Test: h.GetTest(), IntervalSeconds: time.Duration(h.GetIntervalNanos()).Seconds(), TimeoutSeconds: time.Duration(h.GetTimeoutNanos()).Seconds(),
			StartPeriodSeconds: time.Duration(h.GetStartPeriodNanos()).Seconds(), Retries: int(h.GetRetries()),
		}
	}
	return out
}

func (s *Server) getTemplate(w http.ResponseWriter, r *http.Request) error {
	name := r.PathValue("name")
	if err := sandbox.SafeName("template", name); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), s.cfg.CallLimit)
	defer cancel()
	resp, err := s.cfg.Host.GetTemplate(ctx, connect.NewRequest(&hostv1.GetTemplateRequest{Name: name}))
	if err != nil {
		return hostapi.FromConnect(err)
	}
	return ok(w, templateOut(resp.Msg.GetTemplate()))
}

// templateLog answers with the log of a build that is over; that of one under way
// is the answer to who asked for it.
func (s *Server) templateLog(w http.ResponseWriter, r *http.Request) error {
	name := r.PathValue("name")
	if err := sandbox.SafeName("template", name); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), s.cfg.CallLimit)
	defer cancel()
	resp, err := s.cfg.Host.ReadTemplateLog(ctx, connect.NewRequest(&hostv1.ReadTemplateLogRequest{Name: name}))
	if err != nil {
		return hostapi.FromConnect(err)
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(http.StatusOK)
	_, _ = w.Write(resp.Msg.GetLog()) // a client that went away is nobody's error
	return nil
}

func (s *Server) deleteTemplate(w http.ResponseWriter, r *http.Request) error {
	name := r.PathValue("name")
	if err := sandbox.SafeName("template", name); err != nil {
		return err
	}
	if _, err := s.cfg.Store.Snapshot(r.Context(), name); !sandbox.Is(err, sandbox.KindNotFound) {
		if err == nil {
			err = sandbox.Errorf(sandbox.KindConflict, "%s is a snapshot: delete it with DELETE /v1/snapshots/%s (dormouse snapshot rm %s)", name, name, name)
		}
		return err
	}
	if err := s.cfg.Store.KeepsImage(r.Context(), name); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), s.cfg.CallLimit)
	defer cancel()
	if _, err := s.cfg.Host.DeleteTemplate(ctx, connect.NewRequest(&hostv1.DeleteTemplateRequest{Name: name})); err != nil {
		return hostapi.FromConnect(err)
	}
	return ok(w, struct{}{})
}

// buildRequest reads what to build, and where the upload is, if there is one.
func buildRequest(w http.ResponseWriter, r *http.Request) (api.BuildTemplate, io.Reader, error) {
	var req api.BuildTemplate
	media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || media != "multipart/form-data" {
		if err := readBody(w, r, &req); err != nil {
			return req, nil, err
		}
		switch {
		case req.Source == "" && len(req.Packages) > 0:
			req.Source = api.SourcePackages
		case req.Source == "":
			req.Source = api.SourceImage
		}
		if req.Source != api.SourceImage && req.Source != api.SourcePackages {
			return req, nil, sandbox.Errorf(sandbox.KindInvalid, `source %q is an upload: send multipart/form-data with the parts "request" and "upload"`, cut(req.Source, 40))
		}
		return req, nil, checkBuild(req)
	}
	parts, err := r.MultipartReader()
	if err != nil {
		return req, nil, sandbox.Errorf(sandbox.KindInvalid, "read body: %w", err)
	}
	if err := requestPart(w, parts, &req); err != nil {
		return req, nil, err
	}
	if req.Source == "" {
		req.Source = api.SourceDockerfile
	}
	if req.Source == api.SourceImage || req.Source == api.SourcePackages {
		return req, nil, sandbox.Errorf(sandbox.KindInvalid, "source %s has nothing to upload: send a JSON body, without an upload", req.Source)
	}
	if err := checkBuild(req); err != nil {
		return req, nil, err
	}
	upload, err := parts.NextPart()
	if err != nil || upload.FormName() != "upload" {
		return req, nil, sandbox.Errorf(sandbox.KindInvalid, `the second part of the body must be "upload": the tar file`)
	}
	return req, upload, nil
}

// requestPart reads the first part, as strictly as a JSON body.
func requestPart(w http.ResponseWriter, parts *multipart.Reader, req *api.BuildTemplate) error {
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Now().Add(bodyLimit)) // not every connection can; the part is bounded anyway
	part, err := parts.NextPart()
	if err != nil || part.FormName() != "request" {
		return sandbox.Errorf(sandbox.KindInvalid, `the first part of the body must be "request": what to build, in JSON`)
	}
	body, err := io.ReadAll(io.LimitReader(part, api.MaxBodyBytes+1))
	if err != nil {
		return sandbox.Errorf(sandbox.KindInvalid, "read body: %w", err)
	}
	if len(body) > api.MaxBodyBytes {
		return sandbox.Errorf(sandbox.KindTooLarge, "the part request is larger than %d bytes", api.MaxBodyBytes)
	}
	_ = rc.SetReadDeadline(time.Time{}) // as above
	return DecodeStrict(body, req)
}

func checkBuild(req api.BuildTemplate) error {
	if err := sandbox.SafeName("template", req.Name); err != nil {
		return err
	}
	if req.ImageMiB < 0 || req.ImageMiB > sandbox.MaxDiskMiB {
		return sandbox.Errorf(sandbox.KindInvalid, "image_mib is %d, must be from 0 to %d", req.ImageMiB, sandbox.MaxDiskMiB)
	}
	if len(req.Packages) > sandbox.MaxPackages {
		return sandbox.Errorf(sandbox.KindInvalid, "there are %d packages, at most %d are allowed", len(req.Packages), sandbox.MaxPackages)
	}
	if req.Suite != "" {
		if err := sandbox.CheckSuite(req.Suite); err != nil {
			return err
		}
	}
	if err := sandbox.CheckPackages(req.Packages); err != nil {
		return err
	}
	return nil
}

// buildTemplate builds a template and streams its log. The build ends with the
// request: when the client goes away, its key is revoked or the server stops.
func (s *Server) buildTemplate(w http.ResponseWriter, r *http.Request) error {
	req, upload, err := buildRequest(w, r)
	if err != nil {
		return err
	}
	if _, err := s.cfg.Store.Snapshot(r.Context(), req.Name); !sandbox.Is(err, sandbox.KindNotFound) {
		if err == nil {
			err = sandbox.Errorf(sandbox.KindExists, "there is a snapshot %s already; snapshots and templates share their names", req.Name)
		}
		return err
	}
	ctx, done, err := s.calls.begin(r.Context(), askingKey(r.Context()).ID, "")
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	rc := http.NewResponseController(w)
	stopRead := unblock(ctx, func(at time.Time) error {
		if !unread(w) { // what comes next is another request, which is not to suffer
			return nil
		}
		return rc.SetReadDeadline(at)
	})
	defer stopRead()
	// A client that does not read is let go of, but not before it could be told why.
	stopWrite := context.AfterFunc(ctx, func() {
		_ = rc.SetWriteDeadline(time.Now().Add(restLimit)) // tests' recorders have no connection
	})
	defer stopWrite()
	b := &build{s: s, w: w, rc: rc, request: requestID(r), events: make(chan *hostv1.BuildTemplateResponse), sent: make(chan struct{})}
	host := s.cfg.Host.BuildTemplate(ctx)
	if err := host.Send(buildStart(req)); err != nil && !errors.Is(err, io.EOF) { // after EOF, Receive has the reason
		return s.buildError(ctx, err)
	}
	go b.upload(host, upload, cancel)
	go b.receive(ctx, host)
	err = b.answer(ctx)
	stopWrite()
	if err == nil {
		stopRead()
	}
	err = b.end(err)
	cancel(nil)
	_ = host.CloseResponse() // resets the stream where it has not ended; its error was seen by Receive
	<-b.sent
	for range b.events { // until the receiver has noticed
	}
	return err
}

func buildStart(req api.BuildTemplate) *hostv1.BuildTemplateRequest {
	start := &hostv1.BuildTemplateRequest_Start{
		Name: req.Name, Source: req.Source, Image: req.Image, Dockerfile: req.Dockerfile, Target: req.Target, Args: req.Args,
		Suite: req.Suite, Packages: req.Packages, ImageMib: uint32(req.ImageMiB), Registries: map[string]*hostv1.RegistryLogin{},
	}
	for name, login := range req.Registries {
		start.Registries[name] = &hostv1.RegistryLogin{Username: login.Username, Password: login.Password, Token: login.Token}
	}
	return &hostv1.BuildTemplateRequest{Message: &hostv1.BuildTemplateRequest_Start_{Start: start}}
}

// buildError is what a client is told.
func (s *Server) buildError(ctx context.Context, err error) error {
	if why := whyEnded(ctx); why != nil {
		return why
	}
	if s.ctx.Err() != nil {
		return errStopping
	}
	var broken *bodyError // the call of the host was cancelled for it
	if errors.As(err, &broken) || errors.As(context.Cause(ctx), &broken) {
		return sandbox.Errorf(sandbox.KindInvalid, "read body: %w", broken.err)
	}
	return hostapi.FromConnect(err)
}

type hostBuild = connect.BidiStreamForClient[hostv1.BuildTemplateRequest, hostv1.BuildTemplateResponse]

// build is one answer of POST /v1/templates.
type build struct {
	s       *Server
	w       http.ResponseWriter
	rc      *http.ResponseController
	request string

	events chan *hostv1.BuildTemplateResponse // closed at the end of the host's stream
	err    error                              // of the host or of the upload; read after events is closed
	sent   chan struct{}                      // closed when there is no more to upload
	cutOff error                              // of the upload; read after sent is closed

	begun bool // the answer's head is written
	step  string
}

// upload sends the body on. When the client breaks off, the host's call is
// cancelled before its end, so that the host does not take a part for the whole.
func (b *build) upload(host *hostBuild, body io.Reader, cancel context.CancelCauseFunc) {
	defer close(b.sent)
	if body != nil {
		buf := make([]byte, uploadChunk)
		for {
			n, err := fill(body, buf)
			if n > 0 && host.Send(&hostv1.BuildTemplateRequest{Message: &hostv1.BuildTemplateRequest_Data{Data: buf[:n]}}) != nil {
				return // Receive has the reason
			}
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				b.cutOff = &bodyError{err}
				cancel(b.cutOff)
				return
			}
		}
	}
	_ = host.CloseRequest() // Receive has the reason, if it fails
}

func (b *build) receive(ctx context.Context, host *hostBuild) {
	defer close(b.events)
	for {
		m, err := host.Receive()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				b.err = err
			}
			return
		}
		select {
		case b.events <- m:
		case <-ctx.Done():
			b.err = context.Cause(ctx)
			return
		}
	}
}

// answer hands the news on until the template or the error. Nothing is answered
// while the upload is under way: not every client reads before it has sent all.
func (b *build) answer(ctx context.Context) error {
	const most = 1000 // pieces of news during an upload; there are a handful
	var held []*hostv1.BuildTemplateResponse
	sent := b.sent
	idle := time.NewTicker(b.s.cfg.KeepAlive)
	defer idle.Stop()
	for {
		select {
		case <-sent:
			sent = nil
			if b.cutOff != nil {
				return b.s.buildError(ctx, b.cutOff)
			}
			for _, m := range held {
				if err := b.tell(m); err != nil {
					return err
				}
			}
			held = nil
		case m, more := <-b.events:
			switch {
			case !more && b.err != nil:
				return b.s.buildError(ctx, b.err)
			case !more:
				return fmt.Errorf("build template: %w", io.ErrUnexpectedEOF)
			case sent != nil && len(held) < most:
				held = append(held, m)
				continue
			}
			if err := b.tell(m); err != nil || m.GetTemplate() != nil {
				return err
			}
			idle.Reset(b.s.cfg.KeepAlive)
		case <-ctx.Done():
			return b.s.buildError(ctx, context.Cause(ctx))
		case <-idle.C:
			if b.begun {
				if err := b.line(api.BuildEvent{}); err != nil {
					return err
				}
			}
		}
	}
}

// tell writes one piece of news.
func (b *build) tell(m *hostv1.BuildTemplateResponse) error {
	if t := m.GetTemplate(); t != nil {
		out := templateOut(t)
		return b.line(api.BuildEvent{Template: &out})
	}
	e := m.GetEvent()
	if e.GetStep() != "" {
		b.step = e.GetStep()
	}
	return b.line(api.BuildEvent{Step: e.GetStep(), Fraction: max(e.GetFraction(), 0), Line: e.GetLine()})
}

func (b *build) line(e api.BuildEvent) error {
	text, err := json.Marshal(e)
	if err != nil {
		panic(err) // our own types can always be encoded
	}
	if !b.begun {
		b.begun = true
		b.w.Header().Set("Content-Type", "application/x-ndjson")
		b.w.WriteHeader(http.StatusOK)
	}
	if _, err := b.w.Write(append(text, '\n')); err != nil {
		return errAborted
	}
	if err := b.rc.Flush(); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return errAborted
	}
	return nil
}

// end tells an error, in the stream if that has begun.
func (b *build) end(err error) error {
	if err == nil || !b.begun || errors.Is(err, errAborted) {
		return err
	}
	d := detail(err, b.request)
	if d.Code == string(sandbox.KindInternal) {
		b.s.cfg.Log.Error("internal error", "request", b.request, "op", "build template", "err", err)
	}
	d.Step = b.step
	return b.line(api.BuildEvent{Error: &d})
}
