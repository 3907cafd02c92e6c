// Package pager is the page server: a process of its own that gives VMs their
// memory, and the bases of their disks, as files that are composed when they are
// read.
//
// Files is what it serves, over images that whoever runs it opens by name. Pager
// is how the host agent holds the process: it starts it, keeps duplicates of its
// descriptors, starts another one when it was killed, and finds it again when the
// agent itself was. The VMs notice neither: a page that nobody could serve for a
// moment is served by the next.
//
// A page that cannot be served is an I/O error for the one VM that asked (its VMM
// ends by SIGBUS), with the file and the place in the pager's log of failures; it
// is never left waiting, and never gets other bytes.
package pager
