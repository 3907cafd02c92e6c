package host

import (
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
	"sync"
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
	network   Network
	portDials chan struct{} // a token each for ports that are dialled at the same time
	// patience is how long a connection attempt may take. It is short while the
	// guest boots: a packet sent before its network is up is lost, and TCP
	// would repeat it only after a second.
	patience atomic.Int64
}

// maxGuestMessage bounds one message from a guest. Its root may have put anything
// in the agent's place: whatever comes from there is hostile until it is bounded.
const maxGuestMessage = 16 << 20

// dialLimit bounds one connection attempt to a guest that has answered before,
// and dialsAtOnce how many there are to one guest: each has a descriptor, and a
// guest that answers no SYN keeps all of them for as long as it can.
const (
	dialLimit   = 10 * time.Second
	dialsAtOnce = 8
)

func (a *Agent) newGuest(network Network, token string) *guest {
	address := net.JoinHostPort(network.Guest().Addr().String(), strconv.Itoa(guestapi.Port))
	g := &guest{base: "http://" + address, token: token, network: network, portDials: make(chan struct{}, portDialsOnce)}
	g.patience.Store(int64(dialLimit))
	grace := answerGrace
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
			conn, err := network.Dial(ctx, address)
			if err != nil {
				return nil, err
			}
			return &heardConn{Conn: conn, grace: grace, heard: make(chan struct{})}, nil
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

// answerGrace is how long an answer is waited for once a request cannot be sent
// to its end; tests lengthen it.
var answerGrace = time.Second

// heardConn lets an agent answer before it has read the whole request, as one
// does whose disk is full. It then hangs up, and the next write fails: net/http
// reports that failure, unless it has seen the answer before. So a write fails
// only when there is nothing more to hear.
type heardConn struct {
	net.Conn
	grace time.Duration
	once  sync.Once
	heard chan struct{} // closed when a read has failed
}

func (c *heardConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil {
		c.once.Do(func() { close(c.heard) })
	}
	return n, err
}

func (c *heardConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if err != nil {
		select {
		case <-c.heard:
		case <-time.After(c.grace):
		}
	}
	return n, err
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

// init tells the agent who it is, signed: only the host may. before is who it was
// until then.
func (g *guest) init(ctx context.Context, key ed25519.PrivateKey, before sandbox.ID, now time.Time, body guestapi.Init) error {
	body.Timestamp = now.UTC().Format(time.RFC3339Nano)
	return g.control(ctx, key, before, now, guestapi.PathInit, dialLimit, body, nil)
}

// powerOff has the agent end its machine, with all that it has written on the
// disk. It is the beginning only: the end is the VM's.
func (g *guest) powerOff(ctx context.Context, key ed25519.PrivateKey, id sandbox.ID, now time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	res, err := g.do(ctx, http.MethodPost, "/poweroff", nil, http.Header{
		guestapi.HeaderSignature: {guestapi.Sign(key, string(id), http.MethodPost, "/poweroff", now, nil)},
	})
	if err != nil {
		return err
	}
	return res.Body.Close()
}

// do sends one plain HTTP request and turns what is not a success into an error.
func (g *guest) do(ctx context.Context, method, path string, body io.Reader, header http.Header) (*http.Response, error) {
	res, err := g.send(ctx, method, path, body, header)
	if err != nil {
		return nil, err
	}
	if err := refusal(res); err != nil {
		return nil, err
	}
	return res, nil
}

// send returns whatever the agent answers.
func (g *guest) send(ctx context.Context, method, path string, body io.Reader, header http.Header) (*http.Response, error) {
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
	return res, nil
}

// refusal makes an error of an answer that is not a success, and closes it.
func refusal(res *http.Response) error {
	if res.StatusCode/100 == 2 {
		return nil
	}
	defer func() { _ = res.Body.Close() }() // it was read as far as it matters
	return errorFrom(res)
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
	case http.StatusGatewayTimeout:
		return sandbox.KindTimeout
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
	if errors.Is(err, io.ErrUnexpectedEOF) { // to Connect that is a wrong argument
		return sandbox.Errorf(sandbox.KindTransient, "the guest agent broke off: %w", err)
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

// pathFiles is the agent's endpoint for single files.
const pathFiles = "/files"

// filesURL is the path of one of the agent's file endpoints.
func filesURL(endpoint, path, user string) string {
	q := url.Values{"path": {path}}
	if user != "" {
		q.Set("username", user)
	}
	return endpoint + "?" + q.Encode()
}
