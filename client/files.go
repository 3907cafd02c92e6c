package client

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"

	"github.com/dormouse-sandbox/dormouse/api"
)

func fileQuery(path, user string) url.Values {
	q := url.Values{"path": {path}}
	if user != "" {
		q.Set("user", user)
	}
	return q
}

// ReadFile opens a file for reading. Its size is -1 when the server does not
// know it beforehand. A transfer that breaks off is an error of Read, never an
// early end. An empty user means the template's default one.
func (c *Client) ReadFile(ctx context.Context, id, path, user string) (io.ReadCloser, int64, error) {
	p, err := sandboxPath(id, "/files/read")
	if err != nil {
		return nil, 0, err
	}
	resp, err := c.send(ctx, call{method: http.MethodGet, path: p, query: fileQuery(path, user)})
	if err != nil {
		return nil, 0, err
	}
	return &fileBody{ctx: ctx, body: resp.Body, what: "read file"}, resp.ContentLength, nil
}

// fileBody gives errors in the middle of a transfer their kind.
type fileBody struct {
	ctx  context.Context // of the one call that this body answers
	body io.ReadCloser
	what string
}

func (b *fileBody) Read(p []byte) (int, error) {
	n, err := b.body.Read(p)
	if err != nil && !errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = networkError(b.ctx, b.what, err)
	}
	return n, err
}

func (b *fileBody) Close() error { return b.body.Close() }

// WriteFile writes what r has to a file, making its parents. When r or the
// transfer fails, the file is not replaced.
func (c *Client) WriteFile(ctx context.Context, id, path, user string, r io.Reader) (api.Written, error) {
	var out api.Written
	p, err := sandboxPath(id, "/files/write")
	if err != nil {
		return out, err
	}
	k := call{method: http.MethodPut, path: p, query: fileQuery(path, user), raw: io.NopCloser(r)}
	err = c.do(ctx, k, &out)
	return out, err
}

// Stat describes one file or directory.
func (c *Client) Stat(ctx context.Context, id, path, user string) (api.File, error) {
	var out api.File
	p, err := sandboxPath(id, "/files/stat")
	if err != nil {
		return out, err
	}
	err = c.do(ctx, call{method: http.MethodGet, path: p, query: fileQuery(path, user)}, &out)
	return out, err
}

// ListDir lists a directory down to a depth; 0 means 1.
func (c *Client) ListDir(ctx context.Context, id, path, user string, depth int) ([]api.File, error) {
	p, err := sandboxPath(id, "/files/list")
	if err != nil {
		return nil, err
	}
	q := fileQuery(path, user)
	if depth != 0 {
		q.Set("depth", strconv.Itoa(depth))
	}
	var out api.FileList
	err = c.do(ctx, call{method: http.MethodGet, path: p, query: q}, &out)
	return out.Entries, err
}

// MakeDir makes a directory and its parents.
func (c *Client) MakeDir(ctx context.Context, id, path, user string) (api.File, error) {
	var out api.File
	p, err := sandboxPath(id, "/files/mkdir")
	if err != nil {
		return out, err
	}
	err = c.do(ctx, call{method: http.MethodPost, path: p, in: api.PathRequest{Path: path, User: user}}, &out)
	return out, err
}

// Move renames a file or directory, making the parents of the destination.
func (c *Client) Move(ctx context.Context, id, source, destination, user string) (api.File, error) {
	var out api.File
	p, err := sandboxPath(id, "/files/move")
	if err != nil {
		return out, err
	}
	in := api.MoveRequest{Source: source, Destination: destination, User: user}
	err = c.do(ctx, call{method: http.MethodPost, path: p, in: in}, &out)
	return out, err
}

// Remove removes a file, or a directory with all in it. Removing what is not
// there is no error.
func (c *Client) Remove(ctx context.Context, id, path, user string) error {
	p, err := sandboxPath(id, "/files/remove")
	if err != nil {
		return err
	}
	return c.do(ctx, call{method: http.MethodPost, path: p, in: api.PathRequest{Path: path, User: user}}, nil)
}
