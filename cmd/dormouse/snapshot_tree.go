package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
)

func showTree(cmd *cobra.Command, c *client.Client, given []string) error {
	tree, err := c.SnapshotTree(cmd.Context(), given[0])
	if err != nil {
		return err
	}
	if asJSON(cmd) {
		return printJSON(cmd, tree)
	}
	return drawTree(cmd.OutOrStdout(), tree.Nodes, given[0])
}

// drawTree draws nodes below their parents, and marks one by its name. A node whose
// parent is not among them is drawn as a root.
func drawTree(w io.Writer, nodes []api.SnapshotNode, marked string) error {
	known := map[string]bool{}
	for _, n := range nodes {
		known[n.Digest] = true
	}
	below := map[string][]api.SnapshotNode{}
	for _, n := range nodes {
		if !known[n.Parent] || n.Parent == n.Digest {
			n.Parent = ""
		}
		below[n.Parent] = append(below[n.Parent], n)
	}
	d := drawing{w: w, below: below, marked: marked, drawn: map[string]bool{}}
	for _, root := range below[""] {
		d.node(root, "", "")
	}
	return d.err
}

// drawing is a tree that is being drawn; the first error of its writer stays.
type drawing struct {
	w      io.Writer
	below  map[string][]api.SnapshotNode
	marked string
	drawn  map[string]bool // a server that lies about parents must not keep us for ever
	err    error
}

func (d *drawing) node(n api.SnapshotNode, first, rest string) {
	if d.drawn[n.Digest] {
		return
	}
	d.drawn[n.Digest] = true
	d.line(first + nodeText(n, d.marked))
	children := d.below[n.Digest]
	for i, id := range n.Running {
		last := i == len(n.Running)-1 && len(children) == 0
		branch, _ := branches(last)
		d.line(rest + branch + printable(id) + " (sandbox, running)")
	}
	for i, child := range children {
		branch, trunk := branches(i == len(children)-1)
		d.node(child, rest+branch, rest+trunk)
	}
}

func branches(last bool) (branch, trunk string) {
	if last {
		return "└─ ", "   "
	}
	return "├─ ", "│  "
}

func (d *drawing) line(text string) {
	if d.err == nil {
		_, d.err = fmt.Fprintln(d.w, text)
	}
}

func nodeText(n api.SnapshotNode, marked string) string {
	name, about := n.Name, []string{n.Kind}
	switch n.Kind {
	case "pause":
		name, about = n.SandboxID, []string{"sandbox, paused"}
	case "point":
		name = "·"
	}
	if n.Kind != "template" {
		about = append(about, fmt.Sprintf("generation %d", n.Generation))
	}
	if n.OwnBytes > 0 {
		about = append(about, bytesText(n.OwnBytes))
	}
	text := printable(name + " (" + strings.Join(about, ", ") + ")")
	if n.Kind == "snapshot" && n.Name == marked {
		text += " ←"
	}
	return text
}
