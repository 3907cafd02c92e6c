package host

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem/filesystemconnect"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process/processconnect"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// guest is the way to one sandbox's agent, over its TAP. Each stream has a TCP
// connection of its own, so that a slow reader of one never holds up another.
type guest struct {
	base      string
	token     string
	http      *http.Client
	transport *http.Transport
	processes processconnect.ProcessClient
	files     filesystemconnect.FilesystemClient
	// patience is how long a connection attempt may take. It is short while the
	// guest boots: a packet sent before its network is up is lost, and TCP
	// would repeat it only after a second.
	patience atomic.Int64
}

// maxGuestMessage bounds one message from a guest. Its root may have put anything
// in the agent's place: whatever comes from there is hostile until it is bounded.
const maxGuestMessage = 16 << 20

// dialLimit bounds one connection attempt to a guest that has answered before,
// and dialsAtOnce how many there are to one guest: each keeps a thread in its
// network namespace, a guest that answers no SYN keeps all of them for as long
// as it can, and the Go runtime ends a process with 10,000 threads.
const (
	dialLimit   = 10 * time.Second
	dialsAtOnce = 8
)

func (a *Agent) newGuest(network Network, token string) *guest {
	address := net.JoinHostPort(network.Guest().Addr().String(), strconv.Itoa(guestapi.Port))
	g := &guest{base: "http://" + address, token: token}
	g.patience.Store(int64(dialLimit))
	dials := make(chan struct{}, dialsAtOnce)
	g.transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, time.Duration(g.patience.Load()))
			defer cancel()
			select {
			case dials <- struct{}{}:
				defer func() { <-dials }()
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			return network.Dial(ctx, "tcp", address)
		},
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        15 * time.Second,
		DisableCompression:     true,
		MaxResponseHeaderBytes: 64 << 10,
	}
	g.http = &http.Client{Transport: g.transport}
	options := connect.WithClientOptions(
		connect.WithReadMaxBytes(maxGuestMessage),
		connect.WithAcceptCompression("gzip", nil, nil), // the way is short, and the guest would pay for it
	)
	g.processes = processconnect.NewProcessClient(g.http, g.base, options)
	g.files = filesystemconnect.NewFilesystemClient(g.http, g.base, options, connect.WithCodec(fileCodec{}))
	return g
}

func (g *guest) close() error {
	g.transport.CloseIdleConnections()
	return nil
}

// healthy asks the agent for a sign of life. It waits longer from call to call
// until an agent has answered once.
func (g *guest) healthy(ctx context.Context) error {
	const first, most = 30 * time.Millisecond, time.Second
	if wait := time.Duration(g.patience.Load()); wait == dialLimit {
		g.patience.Store(int64(first))
	} else {
		g.patience.Store(int64(min(wait+wait/4, most)))
	}
	err := g.ping(ctx)
	if err == nil {
		g.patience.Store(int64(dialLimit))
	}
	return err
}

// ping is one round trip to the agent.
func (g *guest) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	res, err := g.do(ctx, http.MethodGet, "/health", nil, nil)
	if err != nil {
		return err
	}
	return res.Body.Close()
}

// init tells the agent who it is, signed: only the host may.
func (g *guest) init(ctx context.Context, key ed25519.PrivateKey, now time.Time, body guestapi.Init) error {
	body.Timestamp = now.UTC().Format(time.RFC3339Nano)
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	res, err := g.do(ctx, http.MethodPost, "/init", bytes.NewReader(data), http.Header{
		"Content-Type":           {"application/json"},
		guestapi.HeaderSignature: {guestapi.Sign(key, http.MethodPost, "/init", now, data)},
	})
	if err != nil {
		return err
	}
	return res.Body.Close()
}

// do sends one plain HTTP request and turns what is not a success into an error.
func (g *guest) do(ctx context.Context, method, path string, body io.Reader, header http.Header) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, g.base+path, body)
	if err != nil {
		return nil, err
	}
	for k, v := range header {
		req.Header[http.CanonicalHeaderKey(k)] = v
	}
	req.Header.Set(guestapi.HeaderToken, g.token)
	res, err := g.http.Do(req)
	if err != nil {
		return nil, unanswered(ctx, err)
	}
	if res.StatusCode/100 != 2 {
		defer func() { _ = res.Body.Close() }() // it was read as far as it matters
		return nil, errorFrom(res)
	}
	return res, nil
}

// errorFrom reads the agent's error answer.
func errorFrom(res *http.Response) error {
	const most = 64 << 10
	var body guestapi.Error
	data, err := io.ReadAll(io.LimitReader(res.Body, most))
	if err != nil || json.Unmarshal(data, &body) != nil || body.Message == "" {
		body.Message = fmt.Sprintf("the guest agent answered %s", res.Status)
	}
	return sandbox.Errorf(kindOfStatus(res.StatusCode), "%s", printable(body.Message))
}

func kindOfStatus(status int) sandbox.Kind {
	switch status {
	case http.StatusBadRequest, http.StatusUnauthorized: // 401: no such user; our token is always right
		return sandbox.KindInvalid
	case http.StatusNotFound:
		return sandbox.KindNotFound
	case http.StatusConflict:
		return sandbox.KindConflict
	case http.StatusForbidden:
		return sandbox.KindInvalid
	case http.StatusInsufficientStorage:
		return sandbox.KindNoSpace
	case http.StatusNotImplemented:
		return sandbox.KindUnsupported
	}
	return sandbox.KindInternal
}

// unanswered is what a caller is told when the agent did not answer at all: why
// the sandbox ended if it did, and otherwise to try again.
func unanswered(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return sandbox.Errorf(sandbox.KindTransient, "the guest agent does not answer: %w", err)
}

// rpcError does the same for a call of a Connect service.
func rpcError(ctx context.Context, err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return sandbox.Errorf(sandbox.KindTransient, "the guest agent does not answer: %w", err)
	}
	kind := sandbox.KindInternal
	switch ce.Code() {
	case connect.CodeInvalidArgument, connect.CodeUnauthenticated, connect.CodePermissionDenied, connect.CodeOutOfRange:
		kind = sandbox.KindInvalid
	case connect.CodeNotFound:
		kind = sandbox.KindNotFound
	case connect.CodeAlreadyExists:
		kind = sandbox.KindExists
	case connect.CodeFailedPrecondition:
		kind = sandbox.KindConflict
	case connect.CodeResourceExhausted:
		kind = sandbox.KindNoSpace
	case connect.CodeUnimplemented:
		kind = sandbox.KindUnsupported
	case connect.CodeUnavailable, connect.CodeUnknown, connect.CodeCanceled:
		kind = sandbox.KindTransient
	}
	return sandbox.WithKind(kind, errors.New(printable(ce.Message())))
}

// sign adds what every call of a Connect service carries.
func (g *guest) sign(header http.Header, user string) {
	header.Set(guestapi.HeaderToken, g.token)
	if user != "" {
		header.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(user+":")))
	}
}

// filesURL is the path of the agent's file endpoint.
func filesURL(path, user string) string {
	q := url.Values{"path": {path}}
	if user != "" {
		q.Set("username", user)
	}
	return "/files?" + q.Encode()
}
