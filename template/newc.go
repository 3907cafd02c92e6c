package template

import (
	"fmt"
	"io"
)

// Types of cpio entries, as in stat(2).
const (
	typeDir  = 0o040000
	typeChar = 0o020000
	typeFile = 0o100000
)

// newc writes a cpio archive of the "new ASCII" form, which Linux unpacks as an
// initramfs. (The cpio library cannot write device nodes.) Everything belongs to
// root and has the time 0. After an error all calls do nothing.
// https://docs.kernel.org/driver-api/early-userspace/buffer-format.html
type newc struct {
	w     io.Writer
	inode uint32
	err   error
}

type newcEntry struct {
	name         string
	mode         uint32 // type and permissions
	major, minor uint32 // of a device node
	data         []byte
}

func (c *newc) dir(name string) { c.entry(newcEntry{name: name, mode: typeDir | 0o755}) }

func (c *newc) file(name string, perm uint32, data []byte) {
	c.entry(newcEntry{name: name, mode: typeFile | perm, data: data})
}

func (c *newc) char(name string, perm, major, minor uint32) {
	c.entry(newcEntry{name: name, mode: typeChar | perm, major: major, minor: minor})
}

func (c *newc) entry(e newcEntry) {
	c.inode++
	links := uint32(1)
	if e.mode&typeDir != 0 && e.mode&typeFile != typeFile {
		links = 2
	}
	c.record(e, c.inode, links)
}

func (c *newc) record(e newcEntry, inode, links uint32) {
	header := "070701"
	for _, field := range []uint32{
		inode, e.mode, 0, 0, links, 0, uint32(len(e.data)), 0, 0, e.major, e.minor, uint32(len(e.name) + 1), 0,
	} {
		header += fmt.Sprintf("%08X", field)
	}
	head := append([]byte(header), e.name...)
	head = append(head, 0)
	c.write(pad4(head))
	c.write(e.data)
	c.write(make([]byte, -len(e.data)&3))
}

// close writes the trailer.
func (c *newc) close() error {
	c.record(newcEntry{name: "TRAILER!!!"}, 0, 1)
	return c.err
}

func (c *newc) write(p []byte) {
	if c.err == nil {
		_, c.err = c.w.Write(p)
	}
}

func pad4(p []byte) []byte { return append(p, make([]byte, -len(p)&3)...) }
