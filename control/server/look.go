package server

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/web"
)

// unary calls into a running sandbox, within bounds, and answers with what the
// call returned.
func (s *Server) unary(w http.ResponseWriter, r *http.Request, id sandbox.ID, call func(context.Context) (any, error)) error {
	return s.unaryIf(w, r, id, s.awake, call)
}

func (s *Server) unaryIf(w http.ResponseWriter, r *http.Request, id sandbox.ID, may func(context.Context, sandbox.ID) (store.Sandbox, error), call func(context.Context) (any, error)) error {
	ctx, done, _, err := s.enterIf(r.Context(), id, may)
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, s.cfg.CallLimit)
	defer cancel()
	out, err := call(ctx)
	if err != nil {
		return s.hostError(ctx, id, err)
	}
	return ok(w, out)
}

func (s *Server) ping(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	return s.unary(w, r, id, func(ctx context.Context) (any, error) {
		resp, err := s.cfg.Host.PingSandbox(ctx, connect.NewRequest(&hostv1.PingSandboxRequest{Id: string(id)}))
		if err != nil {
			return nil, err
		}
		return api.Ping{Millis: millis(time.Duration(resp.Msg.GetRoundTripNanos()))}, nil
	})
}

// sandboxMetrics resumes nothing: whoever draws a curve must not keep everything
// awake.
func (s *Server) sandboxMetrics(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	return s.unaryIf(w, r, id, s.running, func(ctx context.Context) (any, error) {
		resp, err := s.cfg.Host.GetMetrics(ctx, connect.NewRequest(&hostv1.GetMetricsRequest{Id: string(id)}))
		if err != nil {
			return nil, err
		}
		m := resp.Msg
		return api.Metrics{
			At: timeOut(m.GetAt()), CPUCount: int(m.GetCpuCount()), CPUUsedPct: m.GetCpuUsedPct(),
			MemTotalBytes: m.GetMemTotalBytes(), MemUsedBytes: m.GetMemUsedBytes(), MemCacheBytes: m.GetMemCacheBytes(),
			DiskUsedBytes: m.GetDiskUsedBytes(), DiskTotalBytes: m.GetDiskTotalBytes(),
			HostRSSBytes: m.GetHostRssBytes(), HostOverlayBytes: m.GetHostOverlayBytes(),
		}, nil
	})
}

// maxLogRead is what one read of a console log returns at most.
const maxLogRead = 1 << 20

// logs reads the console. It works for a sandbox that has ended, too, while its
// host keeps the log: that is when it is wanted most.
func (s *Server) logs(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	req, err := logRequest(r, id)
	if err != nil {
		return err
	}
	if _, err := s.cfg.Store.Sandbox(r.Context(), id); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), s.cfg.CallLimit)
	defer cancel()
	resp, err := s.cfg.Host.ReadConsole(ctx, connect.NewRequest(req))
	if err != nil {
		return hostapi.FromConnect(err)
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set(api.HeaderNextOffset, strconv.FormatUint(resp.Msg.GetNextOffset(), 10))
	w.WriteHeader(http.StatusOK)
	_, _ = w.Write(resp.Msg.GetData()) // a client that went away is nobody's error
	return nil
}

func logRequest(r *http.Request, id sandbox.ID) (*hostv1.ReadConsoleRequest, error) {
	q, err := query(r, "tail_bytes", "offset")
	if err != nil {
		return nil, err
	}
	req := &hostv1.ReadConsoleRequest{Id: string(id)}
	if q.Has("tail_bytes") && q.Has("offset") {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "only one of tail_bytes and offset can be given")
	}
	if q.Has("tail_bytes") {
		n, err := within("tail_bytes", q.Get("tail_bytes"), 1, maxLogRead)
		if err != nil {
			return nil, err
		}
		req.TailBytes = uint64(n)
	}
	if q.Has("offset") {
		n, err := strconv.ParseUint(q.Get("offset"), 10, 63)
		if err != nil {
			return nil, sandbox.Errorf(sandbox.KindInvalid, "offset is %q, must be a number from 0", cut(q.Get("offset"), 40))
		}
		req.FromOffset = n
	}
	return req, nil
}

func (s *Server) listTemplates(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), s.cfg.CallLimit)
	defer cancel()
	resp, err := s.cfg.Host.ListTemplates(ctx, connect.NewRequest(&hostv1.ListTemplatesRequest{}))
	if err != nil {
		return hostapi.FromConnect(err)
	}
	out := api.TemplateList{Templates: []api.Template{}}
	for _, t := range resp.Msg.GetTemplates() {
		out.Templates = append(out.Templates, templateOut(t))
	}
	return ok(w, out)
}

func (s *Server) getHost(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), s.cfg.CallLimit)
	defer cancel()
	resp, err := s.cfg.Host.GetHost(ctx, connect.NewRequest(&hostv1.GetHostRequest{}))
	if err != nil {
		return hostapi.FromConnect(err)
	}
	h := resp.Msg
	return ok(w, api.Host{
		Name: h.GetName(), Version: h.GetVersion(), VMM: h.GetVmm(), Accelerator: h.GetAccelerator(),
		AcceleratorReason: h.GetAcceleratorReason(), DiskDriver: h.GetDiskDriver(), DiskReason: h.GetDiskReason(),
		Cgroup: h.GetCgroup(), CgroupReason: h.GetCgroupReason(), Damage: h.GetDamage(), CPUs: int(h.GetCpus()), MemTotalMiB: int(h.GetMemTotalMib()),
		MemAvailableMiB: int(h.GetMemAvailableMib()), MemCommittedMiB: int(h.GetMemCommittedMib()),
		DiskFreeMiB: int(h.GetDiskFreeMib()), Sandboxes: int(h.GetSandboxes()), MaxSandboxes: int(h.GetMaxSandboxes()),
		Instance: h.GetInstance(),
	})
}

// health says whether requests can be served: whether the database answers.
func (s *Server) health(w http.ResponseWriter, r *http.Request) error {
	if err := s.cfg.Store.Ping(r.Context()); err != nil {
		s.cfg.Log.Error("health", "err", err)
		return sandbox.WithKind(sandbox.KindTransient, errors.New("the database does not answer"))
	}
	return ok(w, api.Health{Status: "ok", Version: s.cfg.Version})
}

// docs shows the same as a page.
func docs(w http.ResponseWriter, r *http.Request) error {
	return web.ServeDocs(w, r.PathValue("file"))
}

// testPage is where people try everything in a browser.
func testPage(w http.ResponseWriter, r *http.Request) error {
	return web.ServeTest(w, r.PathValue("file"))
}

func (s *Server) openAPI(w http.ResponseWriter, _ *http.Request) error {
	writeText(w, http.StatusOK, api.OpenAPI())
	return nil
}
