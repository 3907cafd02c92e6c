// Package past ends what ties a machine to the time before it was saved: its TCP
// connections to others.
//
// What stays: sockets that listen; connections between two processes of the
// machine, both ends of which were saved; UDP sockets, which have no state that
// could be wrong; and whatever is in a network namespace that the machine's user
// has made.
package past
