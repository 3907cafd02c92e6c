package host

import (
	"slices"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
)

// Node is one point of the tree that snapshots form.
type Node struct {
	Digest, Parent snapshot.Digest // of memories; the parent is the nearest that there still is
	Kind           string          // "snapshot", "pause" or "point"
	Name           string          // of a snapshot
	Sandbox        sandbox.ID      // which it was taken of
	Generation     int
	OwnBytes       int64
	At             time.Time
	Running        []string // sandboxes that went on from here and run

	above []snapshot.Digest
}

// points are all that this host knows of: named, of sandboxes, and warm ones.
func (a *Agent) points() (map[snapshot.Digest]*Node, error) {
	nodes := map[snapshot.Digest]*Node{}
	refs, err := a.cfg.Snapshots.Refs()
	for _, r := range refs {
		p, bad := pointOf(r)
		if bad != nil {
			continue // not a point: the image of a template
		}
		n := addNode(nodes, p, "point")
		if !strings.HasPrefix(r.Name, ownPrefix) {
			n.Kind, n.Name = "snapshot", r.Name
		}
	}
	for _, b := range a.all() {
		e := b.now()
		if e.Last != nil && e.State == statePaused {
			if n := addNode(nodes, e.Last, "pause"); n.Kind != "snapshot" {
				n.Kind, n.Sandbox = "pause", b.id
			}
		}
		if e.Began != nil && e.State == stateRunning {
			n := addNode(nodes, e.Began, "point")
			n.Running = append(n.Running, string(b.id))
		}
	}
	return nodes, err
}

func addNode(nodes map[snapshot.Digest]*Node, p *point, kind string) *Node {
	if n := nodes[p.Memory]; n != nil {
		return n
	}
	n := &Node{
		Digest: p.Memory, Kind: kind, Sandbox: p.Guest, Generation: p.Generation, OwnBytes: p.Written, At: p.At, above: p.above(),
	}
	nodes[p.Memory] = n
	return n
}

// SnapshotTree tells what a snapshot descends from and what descends from it,
// parents first. Points that nothing keeps any more are left out: what was below
// one lies below the next that is there.
func (a *Agent) SnapshotTree(name string) ([]Node, error) {
	p, release, err := a.pointNamed(name)
	if err != nil {
		return nil, err
	}
	defer release()
	nodes, err := a.points()
	if err != nil {
		a.log.Error("snapshots not all read", "err", err)
	}
	var out []Node
	for _, n := range nodes {
		if i := slices.IndexFunc(n.above, func(d snapshot.Digest) bool { return nodes[d] != nil && nodes[d] != n }); i >= 0 {
			n.Parent = n.above[i]
		}
	}
	for d, n := range nodes {
		if below(nodes, d, p.Memory) || below(nodes, p.Memory, d) {
			out = append(out, *n)
		}
	}
	slices.SortFunc(out, func(x, y Node) int {
		switch { // one that was flattened has the generation and the time of what it was
		case x.Generation != y.Generation:
			return x.Generation - y.Generation
		case x.Digest == y.Parent:
			return -1
		case y.Digest == x.Parent:
			return 1
		}
		return x.At.Compare(y.At)
	})
	return out, nil
}

// below says whether a point is another one, or descends from it.
func below(nodes map[snapshot.Digest]*Node, d, from snapshot.Digest) bool {
	for range len(nodes) + 1 { // a manifest names its parent by its hash: there are no circles
		if d == from {
			return true
		}
		n := nodes[d]
		if n == nil || n.Parent.IsZero() {
			return false
		}
		d = n.Parent
	}
	return false
}
