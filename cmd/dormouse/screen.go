package main

import (
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// screen is a terminal that a program elsewhere draws on. It remembers what that
// program has switched on, so that it can be switched off when the program is gone
// and cannot do it any more: an editor's own screen, a hidden cursor, a mouse that
// sends bytes.
type screen struct {
	w io.Writer

	state    int
	params   []byte       // of the sequence that is being read
	switched map[int]bool // modes that are not as they were
}

// The states of a screen: in text, behind an escape, behind ESC [, and behind ESC [ ?.
const (
	inText = iota
	inEscape
	inSequence
	inPrivate
)

// maxParams is how many bytes of parameters a sequence may have that is understood.
const maxParams = 64

// modes are the switches that are watched, by their numbers (DECSET), and whether
// they are on at first: cursor keys, the cursor, mice, focus, alternate screens,
// bracketed paste.
var modes = map[int]bool{
	1: false, 9: false, 25: true, 47: false, 1000: false, 1001: false, 1002: false, 1003: false, 1004: false,
	1005: false, 1006: false, 1015: false, 1016: false, 1047: false, 1049: false, 2004: false,
}

// Write draws.
func (s *screen) Write(p []byte) (int, error) {
	for _, b := range p {
		s.read(b)
	}
	return s.w.Write(p)
}

func (s *screen) read(b byte) {
	switch {
	case b == 0x1b:
		s.state = inEscape
	case s.state == inEscape && b == '[':
		s.state, s.params = inSequence, s.params[:0]
	case s.state == inEscape && b == 'c': // a full reset
		s.state, s.switched = inText, nil
	case s.state == inSequence && b == '?' && len(s.params) == 0:
		s.state = inPrivate
	case s.state == inPrivate && (b >= '0' && b <= '9' || b == ';') && len(s.params) < maxParams:
		s.params = append(s.params, b)
	case s.state == inPrivate && (b == 'h' || b == 'l'):
		s.state = inText
		s.set(string(s.params), b == 'h')
	default:
		s.state = inText
	}
}

func (s *screen) set(params string, on bool) {
	for text := range strings.SplitSeq(params, ";") {
		n, err := strconv.Atoi(text)
		atFirst, watched := modes[n]
		switch {
		case err != nil || !watched:
		case on == atFirst:
			delete(s.switched, n)
		default:
			if s.switched == nil {
				s.switched = map[int]bool{}
			}
			s.switched[n] = on
		}
	}
}

// undo is what sets all back that is not as it was.
func (s *screen) undo() string {
	var b strings.Builder
	for _, n := range slices.Sorted(maps.Keys(s.switched)) {
		last := "l"
		if modes[n] {
			last = "h"
		}
		b.WriteString("\x1b[?" + strconv.Itoa(n) + last)
	}
	s.switched = nil
	return b.String()
}
