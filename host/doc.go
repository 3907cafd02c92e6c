// Package host is the agent that owns the sandboxes of one machine.
//
// It promises: a create that fails leaves nothing on the host; a running VM
// outlives the agent and is taken over again by the next one; a sandbox is
// destroyed at its deadline without anybody asking; every end has a cause that
// is kept until it was acknowledged. What it knows is in its journal, so that
// the agent may be killed at any instruction.
//
// It leaves to others what a VM, a disk, a network and an image are (vmm, disk,
// netns, template) and what was asked for (control). DESIGN.md has the rest.
package host
