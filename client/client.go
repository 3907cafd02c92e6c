// Package client is the Go client of the public HTTP API. The CLI and the
// whole-system tests are built on it and on nothing else.
//
// It promises that every error carries a sandbox.Kind where the server or the
// network gave one, that a context bounds every call, that streams hold back a
// fast producer instead of storing what it sends, and that the key never
// becomes part of a URL. It does not retry: only the caller knows whether a
// call may be repeated (a create may, with the same idempotency key).
package client

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Config is where the server is and who is asking.
type Config struct {
	// BaseURL is the server's address, such as "http://127.0.0.1:7070".
	BaseURL string
	// Key is the API key; calls that need none work without it.
	Key string
	// HTTPClient makes the requests. Nil means one of our own. It must have no
	// Timeout if streams and long commands are used.
	HTTPClient *http.Client
	// UserAgent is sent along; empty means "dormouse-go".
	UserAgent string
}

// Client talks to one server. It is safe for concurrent use.
type Client struct {
	base  string
	key   string
	agent string
	http  *http.Client
}

// New makes a client; it does not touch the network.
func New(cfg Config) (*Client, error) {
	u, err := url.Parse(cfg.BaseURL)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "server address %q is not an http or https URL", cfg.BaseURL)
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "server address must be scheme, host and path only")
	}
	c := &Client{base: strings.TrimRight(u.String(), "/"), key: cfg.Key, agent: cfg.UserAgent, http: cfg.HTTPClient}
	if c.agent == "" {
		c.agent = "dormouse-go"
	}
	if c.http == nil {
		c.http = &http.Client{Transport: newTransport()}
	}
	return c, nil
}

// newTransport is the default transport, but without a bound on connections
// kept for bursts of calls, and without transparent decompression, which would
// hide the size of a file.
func newTransport() http.RoundTripper {
	t, ok := http.DefaultTransport.(*http.Transport)
	if !ok {
		return http.DefaultTransport
	}
	t = t.Clone()
	t.DisableCompression = true
	t.MaxIdleConnsPerHost = 32
	t.ExpectContinueTimeout = 5 * time.Second
	return t
}

// CloseIdle closes connections that are not in use.
func (c *Client) CloseIdle() { c.http.CloseIdleConnections() }

// call is one request.
type call struct {
	method string
	path   string
	query  url.Values
	header http.Header
	in     any       // a JSON body
	raw    io.Reader // or a raw one

	contentType string // of the raw body; empty: application/octet-stream
}

func (c *Client) request(ctx context.Context, k call) (*http.Request, error) {
	body := k.raw
	if k.in != nil {
		b, err := json.Marshal(k.in)
		if err != nil {
			return nil, fmt.Errorf("encode request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	target := c.base + k.path
	if len(k.query) > 0 {
		target += "?" + k.query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, k.method, target, body)
	if err != nil {
		return nil, fmt.Errorf("build request: %w", err)
	}
	for name, values := range k.header {
		req.Header[name] = values
	}
	switch {
	case k.in != nil:
		req.Header.Set("Content-Type", "application/json")
	case k.raw != nil:
		req.Header.Set("Content-Type", cmp.Or(k.contentType, "application/octet-stream"))
		req.Header.Set("Expect", "100-continue") // an early refusal arrives before the upload starts
	}
	c.authorize(req.Header)
	return req, nil
}

func (c *Client) authorize(h http.Header) {
	h.Set("User-Agent", c.agent)
	if c.key != "" {
		h.Set("Authorization", "Bearer "+c.key)
	}
}

// send returns an answer with a status below 300, whose body the caller closes.
func (c *Client) send(ctx context.Context, k call) (*http.Response, error) {
	req, err := c.request(ctx, k)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, networkError(ctx, k.method+" "+k.path, err)
	}
	if resp.StatusCode >= 300 {
		defer drain(resp.Body)
		return nil, readError(resp)
	}
	return resp, nil
}

// do sends a request and decodes the answer into out, if there is to be one.
func (c *Client) do(ctx context.Context, k call, out any) error {
	resp, err := c.send(ctx, k)
	if err != nil {
		return err
	}
	defer drain(resp.Body)
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return networkError(ctx, "read answer to "+k.method+" "+k.path, err)
	}
	return nil
}

// networkError keeps a context's own error visible; everything else means that
// the server could not be talked to.
func networkError(ctx context.Context, doing string, err error) error {
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err // the URL is in doing already
	}
	if cause := ctx.Err(); cause != nil {
		return fmt.Errorf("%s: %w", doing, cause)
	}
	return sandbox.WithKind(sandbox.KindTransient, fmt.Errorf("%s: %w", doing, err))
}

// drain lets the connection be used again.
func drain(body io.ReadCloser) {
	_, _ = io.CopyN(io.Discard, body, 64<<10) // what is longer is not worth reading
	_ = body.Close()                          // the answer was read; nothing depends on this
}

// sandboxPath is the path of a sandbox or of something under it.
func sandboxPath(id string, more string) (string, error) {
	if _, err := sandbox.ParseID(id); err != nil {
		return "", err
	}
	return "/v1/sandboxes/" + id + more, nil
}
