package client

import (
	"context"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
)

// CreateSandbox makes a sandbox and returns when it runs. With an idempotency
// key, which may be empty, a repeated call answers with the same sandbox
// instead of making a second one. The error of a create that failed on the
// host is an *Error with the SandboxID under which its cause can be read.
func (c *Client) CreateSandbox(ctx context.Context, req api.CreateSandbox, idempotencyKey string) (api.Sandbox, error) {
	h := http.Header{}
	if idempotencyKey != "" {
		h.Set(api.HeaderIdempotencyKey, idempotencyKey)
	}
	var out api.Sandbox
	err := c.do(ctx, call{method: http.MethodPost, path: "/v1/sandboxes", header: h, in: req}, &out)
	return out, err
}

// Get returns one sandbox, also one that has ended.
func (c *Client) Get(ctx context.Context, id string) (api.Sandbox, error) {
	var out api.Sandbox
	path, err := sandboxPath(id, "")
	if err != nil {
		return out, err
	}
	err = c.do(ctx, call{method: http.MethodGet, path: path}, &out)
	return out, err
}

// ListOptions says which sandboxes to list. The zero value lists the first page
// of all that have not ended.
type ListOptions struct {
	States   []string          // only these states; empty: all that have not ended
	All      bool              // also the ended ones
	Template string            // only those made from it
	Metadata map[string]string // only those that have all of these
	Limit    int               // of a page; 0 means the server's default
	Cursor   string            // NextCursor of the page before
}

func (o ListOptions) query() url.Values {
	q := url.Values{}
	for _, s := range o.States {
		q.Add("state", s)
	}
	if o.All {
		q.Set("all", "true")
	}
	if o.Template != "" {
		q.Set("template", o.Template)
	}
	for k, v := range o.Metadata {
		q.Set("metadata["+k+"]", v)
	}
	if o.Limit != 0 {
		q.Set("limit", strconv.Itoa(o.Limit))
	}
	if o.Cursor != "" {
		q.Set("cursor", o.Cursor)
	}
	return q
}

// List returns one page of sandboxes, newest first.
func (c *Client) List(ctx context.Context, opts ListOptions) (api.SandboxList, error) {
	var out api.SandboxList
	err := c.do(ctx, call{method: http.MethodGet, path: "/v1/sandboxes", query: opts.query()}, &out)
	return out, err
}

// Sandboxes goes through all pages from opts.Cursor on. It stops at an error,
// which it yields.
func (c *Client) Sandboxes(ctx context.Context, opts ListOptions) iter.Seq2[api.Sandbox, error] {
	return func(yield func(api.Sandbox, error) bool) {
		for {
			page, err := c.List(ctx, opts)
			if err != nil {
				yield(api.Sandbox{}, err)
				return
			}
			for _, s := range page.Sandboxes {
				if !yield(s, nil) {
					return
				}
			}
			if page.NextCursor == "" {
				return
			}
			opts.Cursor = page.NextCursor
		}
	}
}

// Delete destroys a sandbox and returns when nothing of it is left, or, when
// its host does not answer, with a sandbox that is still "destroying" and will
// go once the host is back. Deleting one that has ended is no error.
func (c *Client) Delete(ctx context.Context, id string) (api.Sandbox, error) {
	var out api.Sandbox
	path, err := sandboxPath(id, "")
	if err != nil {
		return out, err
	}
	err = c.do(ctx, call{method: http.MethodDelete, path: path}, &out)
	return out, err
}

// Ping asks the guest agent for a sign of life.
func (c *Client) Ping(ctx context.Context, id string) (api.Ping, error) {
	var out api.Ping
	path, err := sandboxPath(id, "/ping")
	if err != nil {
		return out, err
	}
	err = c.do(ctx, call{method: http.MethodPost, path: path}, &out)
	return out, err
}

// SetTimeout lets the sandbox live for d from now on.
func (c *Client) SetTimeout(ctx context.Context, id string, d time.Duration) (api.Sandbox, error) {
	var out api.Sandbox
	path, err := sandboxPath(id, "/timeout")
	if err != nil {
		return out, err
	}
	err = c.do(ctx, call{method: http.MethodPost, path: path, in: api.Timeout{TimeoutSeconds: d.Seconds()}}, &out)
	return out, err
}

// LogOptions says which part of the console log to read. The zero value reads
// all that is kept.
type LogOptions struct {
	TailBytes uint64 // only so much from the end
	Offset    uint64 // or from here on: what the read before returned as next
}

// Logs reads the console of the sandbox's VM. Reading on from next follows it.
func (c *Client) Logs(ctx context.Context, id string, opts LogOptions) (data []byte, next uint64, err error) {
	path, err := sandboxPath(id, "/logs")
	if err != nil {
		return nil, 0, err
	}
	q := url.Values{}
	if opts.TailBytes > 0 {
		q.Set("tail_bytes", strconv.FormatUint(opts.TailBytes, 10))
	}
	if opts.Offset > 0 {
		q.Set("offset", strconv.FormatUint(opts.Offset, 10))
	}
	resp, err := c.send(ctx, call{method: http.MethodGet, path: path, query: q})
	if err != nil {
		return nil, 0, err
	}
	defer drain(resp.Body)
	data, err = io.ReadAll(resp.Body)
	if err != nil {
		return nil, 0, networkError(ctx, "read logs", err)
	}
	next, err = strconv.ParseUint(resp.Header.Get(api.HeaderNextOffset), 10, 64)
	if err != nil {
		return nil, 0, networkError(ctx, "read header "+api.HeaderNextOffset, err)
	}
	return data, next, nil
}

// Metrics returns what the sandbox uses, seen from inside and from its host.
func (c *Client) Metrics(ctx context.Context, id string) (api.Metrics, error) {
	var out api.Metrics
	path, err := sandboxPath(id, "/metrics")
	if err != nil {
		return out, err
	}
	err = c.do(ctx, call{method: http.MethodGet, path: path}, &out)
	return out, err
}
