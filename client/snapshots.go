package client

import (
	"context"
	"net/http"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// CreateSnapshot keeps the state of a sandbox, which runs on, under a name, and
// returns when that is durable.
func (c *Client) CreateSnapshot(ctx context.Context, req api.CreateSnapshot) (api.Snapshot, error) {
	var out api.Snapshot
	err := c.do(ctx, call{method: http.MethodPost, path: "/v1/snapshots", in: req}, &out)
	return out, err
}

// Snapshots lists all snapshots, oldest first.
func (c *Client) Snapshots(ctx context.Context) ([]api.Snapshot, error) {
	var out api.SnapshotList
	err := c.do(ctx, call{method: http.MethodGet, path: "/v1/snapshots"}, &out)
	return out.Snapshots, err
}

// Snapshot returns one snapshot.
func (c *Client) Snapshot(ctx context.Context, name string) (api.Snapshot, error) {
	var out api.Snapshot
	return out, c.snapshot(ctx, http.MethodGet, name, "", &out)
}

// DeleteSnapshot deletes a snapshot that nothing depends on. When its host does not
// answer, done is false: it will be deleted once the host is back.
func (c *Client) DeleteSnapshot(ctx context.Context, name string) (done bool, err error) {
	var rest api.Snapshot
	if err := c.snapshot(ctx, http.MethodDelete, name, "", &rest); err != nil {
		return false, err
	}
	return rest.State == "", nil
}

// SnapshotTree returns what a snapshot descends from and what descends from it.
func (c *Client) SnapshotTree(ctx context.Context, name string) (api.SnapshotTree, error) {
	var out api.SnapshotTree
	return out, c.snapshot(ctx, http.MethodGet, name, "/tree", &out)
}

// VerifySnapshot has the host read all of a snapshot. Damage is in the answer, and
// no error.
func (c *Client) VerifySnapshot(ctx context.Context, name string) (api.Verified, error) {
	var out api.Verified
	return out, c.snapshot(ctx, http.MethodPost, name, "/verify", &out)
}

func (c *Client) snapshot(ctx context.Context, method, name, more string, out any) error {
	if err := sandbox.SafeName("snapshot", name); err != nil {
		return err
	}
	return c.do(ctx, call{method: method, path: "/v1/snapshots/" + name + more}, out)
}
