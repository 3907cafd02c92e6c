package hostapi_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"testing"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1/hostv1connect"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// failing is a host on which every call ends with one error.
type failing struct {
	hostv1connect.UnimplementedHostServiceHandler
	err error
}

func (f failing) GetHost(context.Context, *connect.Request[hostv1.GetHostRequest]) (*connect.Response[hostv1.GetHostResponse], error) {
	return nil, hostapi.ToConnect(f.err)
}

func (f failing) ReadFile(_ context.Context, _ *connect.Request[hostv1.ReadFileRequest], s *connect.ServerStream[hostv1.ReadFileResponse]) error {
	return errors.Join(s.Send(&hostv1.ReadFileResponse{}), hostapi.ToConnect(f.err))
}

// TestKindsCrossTheWire: every kind and its text arrive, from calls and from the
// end of streams.
func TestKindsCrossTheWire(t *testing.T) {
	for _, kind := range sandbox.Kinds() {
		t.Run(string(kind), func(t *testing.T) {
			sent := sandbox.WithKind(kind, errors.New("open disk: it is gone"))
			_, handler := hostv1connect.NewHostServiceHandler(failing{err: fmt.Errorf("create: %w", sent)})
			l := local(t, handler.ServeHTTP)
			c := hostapi.NewClient(l.Client(), l.BaseURL())
			_, err := c.GetHost(t.Context(), connect.NewRequest(&hostv1.GetHostRequest{}))
			arrived(t, "a call", err, kind)
			stream, err := c.ReadFile(t.Context(), connect.NewRequest(&hostv1.ReadFileRequest{}))
			if err != nil {
				t.Fatal(err)
			}
			for stream.Receive() {
			}
			arrived(t, "a stream", errors.Join(stream.Err(), stream.Close()), kind)
		})
	}
}

// TestAnsweredIsTheHostsWord: what a host says itself is told from what becomes of a
// call on its way.
func TestAnsweredIsTheHostsWord(t *testing.T) {
	for _, kind := range sandbox.Kinds() {
		_, handler := hostv1connect.NewHostServiceHandler(failing{err: sandbox.WithKind(kind, errors.New("no"))})
		l := local(t, handler.ServeHTTP)
		_, err := hostapi.NewClient(l.Client(), l.BaseURL()).GetHost(t.Context(), connect.NewRequest(&hostv1.GetHostRequest{}))
		open := kind == sandbox.KindTransient || kind == sandbox.KindTimeout // it may come about yet
		if hostapi.Answered(err) == open {
			t.Errorf("kind %s: answered is %v", kind, !open)
		}
	}
	l := local(t, func(w http.ResponseWriter, _ *http.Request) { panic(http.ErrAbortHandler) })
	c := hostapi.NewClient(l.Client(), l.BaseURL())
	_, err := c.GetHost(t.Context(), connect.NewRequest(&hostv1.GetHostRequest{}))
	if err == nil || hostapi.Answered(err) {
		t.Errorf("a connection that broke counts as an answer: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = c.GetHost(ctx, connect.NewRequest(&hostv1.GetHostRequest{}))
	if err == nil || hostapi.Answered(err) {
		t.Errorf("a call that was given up counts as an answer: %v", err)
	}
	if hostapi.Answered(errors.New("ours")) || hostapi.Answered(nil) {
		t.Error("what never crossed the wire counts as an answer")
	}
}

func arrived(t *testing.T, what string, err error, kind sandbox.Kind) {
	t.Helper()
	got := hostapi.FromConnect(err)
	if got == nil || sandbox.KindOf(got) != kind || got.Error() != "create: open disk: it is gone" {
		t.Errorf("%s ended with %v (%s), want kind %s", what, got, sandbox.KindOf(got), kind)
	}
}

// TestKindsOfOthers: errors that no ToConnect made have a kind all the same.
func TestKindsOfOthers(t *testing.T) {
	if hostapi.ToConnect(nil) != nil || hostapi.FromConnect(nil) != nil {
		t.Error("no error became one")
	}
	odd := connect.NewError(connect.CodeNotFound, errors.New("x"))
	odd.Meta().Set("Dormouse-Error-Kind", "a kind of tomorrow")
	for _, tt := range []struct {
		err  error
		want sandbox.Kind
	}{
		{connect.NewError(connect.CodeCanceled, errors.New("x")), sandbox.KindTransient},
		{connect.NewError(connect.CodeUnavailable, errors.New("x")), sandbox.KindTransient},
		{connect.NewError(connect.CodeDataLoss, errors.New("x")), sandbox.KindInternal},
		{odd, sandbox.KindNotFound},
		{errors.New("x"), sandbox.KindInternal},
	} {
		if got := sandbox.KindOf(hostapi.FromConnect(tt.err)); got != tt.want {
			t.Errorf("%v became %s, want %s", tt.err, got, tt.want)
		}
	}
	l := local(t, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "not a host", http.StatusBadGateway) })
	_, err := hostapi.NewClient(l.Client(), l.BaseURL()).GetHost(t.Context(), connect.NewRequest(&hostv1.GetHostRequest{}))
	if got := hostapi.FromConnect(err); !sandbox.Is(got, sandbox.KindTransient) {
		t.Errorf("an answer that no host gives: %v (%s)", got, sandbox.KindOf(got))
	}
}
