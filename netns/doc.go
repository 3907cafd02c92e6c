// Package netns is one sandbox's network: a namespace with a veth pair to the
// host and a TAP for the VMM.
//
// # Promises
//
// A guest reaches its gateway's resolver, and the public internet if its
// [Policy] says so. It reaches nothing else: no service on the host, no
// network that the host is part of, no other guest, no private or link-local
// range, no metadata address, and nothing over IPv6. Nothing but the agent on
// the host opens a connection to a guest.
//
// Making a slot is a transaction: after an error nothing of it is on the host.
// Removing one tries everything and joins the errors. Everything on the host
// carries the instance in its name: Sweep and Remove need no state, and two
// instances never touch each other's. Tables of other tools are not touched.
//
// # Design
//
//	guest 100.127.255.2 ── tap0 100.127.255.1 ─ [namespace] ─ eth0 ══ dm<instance>-<index> ─ [host] ─ uplink
//
// The inside of every namespace is the same, MACs included, so that a snapshot
// restores in any slot. The namespace translates the guest's address to its
// end of the veth, the index-th /31 of the pool; the host translates the pool
// to its own address. The pool's default is chosen among 100.96.0.0/16 to
// 100.126.0.0/16 and kept as a comment in the host's table.
//
// The rules are in two places. Inside the namespace, a netdev table lets in
// only frames with the guest's own MAC and address, before ARP or IPv6 see
// them, and an inet table opens the gateway's port 53, translates, and resets
// TCP connections from before a resume. On the host, one inet table holds the
// policy: it knows a veth by the prefix of its name, so that "deny" holds from
// the moment the veth exists, a set of the veths that may reach the internet,
// and a set of denied ranges. The second follows the host's addresses and
// connected networks while they change. What is denied is refused with a reset
// or an ICMP message, so that nothing in a guest hangs; packets to the host
// itself are dropped.
//
// An accept in our table does not overrule a drop in another tool's, such as
// Docker's FORWARD policy: Check finds that, and says the cure.
//
// DNS: sockets made inside the namespace listen at the gateway; the questions
// are asked from the host, over the transport that the guest used. Answers are
// passed as they are: the firewall denies private addresses anyway. Without
// internet the resolver answers REFUSED, since a question carries data out.
//
// IPv4 forwarding is turned on for the host as a whole: for single interfaces
// it is not enough, because answers enter through the uplink, which can
// change. The value from before is kept in the table's comment, and the last
// instance to be removed restores it.
//
// Nothing is kept in files: Adopt reads what it needs from the kernel. The VMM
// of an adopted slot still holds its TAP queue; only the DNS sockets are made
// anew.
//
// Threads: whoever visits a namespace does so on a locked thread, which is
// thrown away if it cannot come home. Every call to the kernel is a failpoint
// "netns/<step>".
//
// It needs Linux 5.2 (address translation in inet tables) and root.
package netns
