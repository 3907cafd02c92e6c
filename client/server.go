package client

import (
	"context"
	"net/http"
	"net/url"

	"github.com/dormouse-sandbox/dormouse/api"
)

// Health asks whether the server serves; it needs no key.
func (c *Client) Health(ctx context.Context) (api.Health, error) {
	var out api.Health
	err := c.do(ctx, call{method: http.MethodGet, path: "/healthz"}, &out)
	return out, err
}

// Host describes the machine that runs the sandboxes.
func (c *Client) Host(ctx context.Context) (api.Host, error) {
	var out api.Host
	err := c.do(ctx, call{method: http.MethodGet, path: "/v1/host"}, &out)
	return out, err
}

// Templates lists what sandboxes can be made from.
func (c *Client) Templates(ctx context.Context) ([]api.Template, error) {
	var out api.TemplateList
	err := c.do(ctx, call{method: http.MethodGet, path: "/v1/templates"}, &out)
	return out.Templates, err
}

// CreateKey makes an API key. Its secret is in the answer and can never be read
// again.
func (c *Client) CreateKey(ctx context.Context, name string) (api.Key, error) {
	var out api.Key
	err := c.do(ctx, call{method: http.MethodPost, path: "/v1/api-keys", in: api.CreateKey{Name: name}}, &out)
	return out, err
}

// Keys lists the API keys, without their secrets.
func (c *Client) Keys(ctx context.Context) ([]api.Key, error) {
	var out api.KeyList
	err := c.do(ctx, call{method: http.MethodGet, path: "/v1/api-keys"}, &out)
	return out.Keys, err
}

// DeleteKey revokes a key at once. A key cannot revoke itself, so that there is
// always one left.
func (c *Client) DeleteKey(ctx context.Context, id string) error {
	return c.do(ctx, call{method: http.MethodDelete, path: "/v1/api-keys/" + url.PathEscape(id)}, nil)
}
