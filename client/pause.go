package client

import (
	"context"
	"net/http"

	"github.com/dormouse-sandbox/dormouse/api"
)

// Pause stops a sandbox and returns when it is kept on disk, with what that cost.
// One that is paused already is returned as it is.
func (c *Client) Pause(ctx context.Context, id string) (api.Sandbox, error) {
	var out api.Sandbox
	path, err := sandboxPath(id, "/pause")
	if err != nil {
		return out, err
	}
	err = c.do(ctx, call{method: http.MethodPost, path: path}, &out)
	return out, err
}

// Resume runs a paused sandbox again. One that runs is returned as it is.
func (c *Client) Resume(ctx context.Context, id string, req api.Resume) (api.Sandbox, error) {
	var out api.Sandbox
	path, err := sandboxPath(id, "/resume")
	if err != nil {
		return out, err
	}
	err = c.do(ctx, call{method: http.MethodPost, path: path, in: req}, &out)
	return out, err
}

// Fork makes copies of a sandbox, which runs on. The error is nil when at least one
// of them runs: each says for itself what became of it. With an idempotency key,
// which may be empty, a repeated call answers with the same copies.
func (c *Client) Fork(ctx context.Context, id string, req api.Fork, idempotencyKey string) (api.Forked, error) {
	var out api.Forked
	path, err := sandboxPath(id, "/fork")
	if err != nil {
		return out, err
	}
	h := http.Header{}
	if idempotencyKey != "" {
		h.Set(api.HeaderIdempotencyKey, idempotencyKey)
	}
	err = c.do(ctx, call{method: http.MethodPost, path: path, header: h, in: req}, &out)
	return out, err
}

// SetLimits changes how long the sandbox lives from now on and when it pauses by
// itself; what is left out stays as it is.
func (c *Client) SetLimits(ctx context.Context, id string, limits api.Timeout) (api.Sandbox, error) {
	var out api.Sandbox
	path, err := sandboxPath(id, "/timeout")
	if err != nil {
		return out, err
	}
	err = c.do(ctx, call{method: http.MethodPost, path: path, in: limits}, &out)
	return out, err
}
