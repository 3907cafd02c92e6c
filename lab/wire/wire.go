// Package wire is what a lab and the program that booted it say to each other:
// frames over one virtio-serial port. A frame is a type, a length and a payload;
// the payload is JSON or, for streams, the bytes themselves.
//
// Both ends are built from the same source at the same time, so there are no
// versions. A frame that cannot be read ends the connection.
package wire

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"sync"
	"time"
)

// Port is the name of the virtio-serial port.
const Port = "dormouse.lab"

// MaxPayload bounds a frame.
const MaxPayload = 1 << 20

// Type says what a frame is.
type Type byte

// From outside.
const (
	Hello    Type = 'H' // Setup
	Start    Type = 'S' // Command; one at a time
	Stdin    Type = 'i' // bytes; empty is their end
	Resize   Type = 'W' // Size
	Kill     Type = 'K' // everything the command has started
	Poweroff Type = 'P'
)

// From inside.
const (
	Ready  Type = 'R' // Inside: Setup is done
	Stdout Type = 'o' // bytes
	Stderr Type = 'e' // bytes
	Exit   Type = 'X' // Status: the command is over, all its output has been sent
	Fatal  Type = 'F' // text: the lab cannot work
)

// Setup is what a booted lab is told first.
type Setup struct {
	Time   time.Time
	Mounts []Mount
}

// Mount is one disk of the lab, found by its serial number.
type Mount struct {
	Serial   string
	Path     string
	ReadOnly bool
	// Overlay puts a writable layer of scratch over a read-only disk.
	Overlay bool
}

// Inside is what a lab says about itself.
type Inside struct {
	Release string        // of its kernel
	Boot    time.Duration // since the kernel started, by its own clock
	Phases  []Phase
	Missing []string // what should be there and is not
}

// Phase is one part of the boot, by the lab's own clock.
type Phase struct {
	Name string
	Took time.Duration
}

// Command is a program to run as root.
type Command struct {
	Args []string
	Env  []string // after the lab's own
	Dir  string
	TTY  *Size // the command gets a terminal; its error output is in the output
}

// Size is a terminal's.
type Size struct{ Rows, Cols uint16 }

// Status is how a command ended.
type Status struct {
	Code   int    // exit status; 128 + n after signal n
	Error  string // why it could not be started
	Core   bool   // it dumped core
	Left   []string
	Cores  []string // names of the core files there are by now
	Took   time.Duration
	Killed bool // because the outside said so
}

// Conn sends and receives frames. Sending is safe from several goroutines.
type Conn struct {
	r  io.Reader
	mu sync.Mutex // guards w: a frame is written whole
	w  io.Writer
}

// New makes a connection of a byte stream.
func New(rw io.ReadWriter) *Conn { return &Conn{r: rw, w: rw} }

const headerBytes = 5

// Send writes one frame.
func (c *Conn) Send(t Type, payload []byte) error {
	if len(payload) > MaxPayload {
		return fmt.Errorf("frame %q of %d bytes is longer than %d", t, len(payload), MaxPayload)
	}
	frame := make([]byte, headerBytes, headerBytes+len(payload))
	frame[0] = byte(t)
	binary.BigEndian.PutUint32(frame[1:], uint32(len(payload)))
	frame = append(frame, payload...)
	c.mu.Lock()
	defer c.mu.Unlock()
	_, err := c.w.Write(frame)
	return err
}

// SendJSON writes one frame with a value.
func (c *Conn) SendJSON(t Type, v any) error {
	payload, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return c.Send(t, payload)
}

// Receive reads one frame. At the end of the stream the error is io.EOF.
func (c *Conn) Receive() (Type, []byte, error) {
	var header [headerBytes]byte
	if _, err := io.ReadFull(c.r, header[:]); err != nil {
		return 0, nil, err
	}
	length := binary.BigEndian.Uint32(header[1:])
	if length > MaxPayload {
		return 0, nil, fmt.Errorf("a frame says that it has %d bytes, more than %d", length, MaxPayload)
	}
	payload := make([]byte, length)
	if _, err := io.ReadFull(c.r, payload); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return Type(header[0]), payload, nil
}

// Writer sends what is written to it as frames of one type.
func (c *Conn) Writer(t Type) io.Writer { return streamWriter{c, t} }

type streamWriter struct {
	c *Conn
	t Type
}

// chunk keeps frames small enough for others to get in between.
const chunk = 32 << 10

func (s streamWriter) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		part := p[:min(len(p), chunk)]
		if err := s.c.Send(s.t, part); err != nil {
			return n, err
		}
		n += len(part)
		p = p[len(part):]
	}
	return n, nil
}
