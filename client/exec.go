package client

import (
	"context"
	"net/http"

	"github.com/dormouse-sandbox/dormouse/api"
)

// Exec runs a command to its end and returns its output, of which each stream
// is cut at api.MaxExecOutput. A command that fails is no error: its exit code
// is in the result.
func (c *Client) Exec(ctx context.Context, id string, req api.Exec) (api.ExecResult, error) {
	var out api.ExecResult
	path, err := sandboxPath(id, "/exec")
	if err != nil {
		return out, err
	}
	err = c.do(ctx, call{method: http.MethodPost, path: path, in: req}, &out)
	return out, err
}
