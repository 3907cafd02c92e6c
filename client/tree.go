package client

import (
	"context"
	"io"
	"net/http"

	"github.com/dormouse-sandbox/dormouse/api"
)

// ReadTree opens a directory and all below it as a tar stream. A transfer that
// breaks off is an error of Read, never an early end; the reason may be the last
// thing in the stream: package tree, which unpacks it, knows. What is in the stream
// was made inside the sandbox, by whomever. An empty user means the template's
// default one.
func (c *Client) ReadTree(ctx context.Context, id, path, user string) (io.ReadCloser, error) {
	p, err := sandboxPath(id, "/files/tree")
	if err != nil {
		return nil, err
	}
	resp, err := c.send(ctx, call{method: http.MethodGet, path: p, query: fileQuery(path, user)})
	if err != nil {
		return nil, err
	}
	return &fileBody{ctx: ctx, body: resp.Body, what: "read tree"}, nil
}

// WriteTree unpacks a tar stream below a directory, which is made if it is missing.
// When r or the transfer fails, what was unpacked before stays.
func (c *Client) WriteTree(ctx context.Context, id, path, user string, r io.Reader) (api.Tree, error) {
	var out api.Tree
	p, err := sandboxPath(id, "/files/tree")
	if err != nil {
		return out, err
	}
	k := call{method: http.MethodPut, path: p, query: fileQuery(path, user), raw: io.NopCloser(r), contentType: api.TreeType}
	err = c.do(ctx, k, &out)
	return out, err
}
