package kernel

import (
	"fmt"
	"testing"
)

// FuzzParseStat: a process chooses its name, and with it the middle of its line.
// Nothing in it is ever taken for a field.
func FuzzParseStat(f *testing.F) {
	const fields = "S 7 8 9 0 -1 4194560 1 0 0 0 1 2 0 0 20 0 1 0 12345 6 7"
	f.Add("sh", fields)
	f.Add("a) R 1 1 1 1 (b", fields)
	f.Add(") ", fields)
	f.Add("\n\x00\xff", "Z 1")
	for n := range fields {
		f.Add("cut", fields[:n])
	}
	f.Fuzz(func(t *testing.T, name, rest string) {
		_, _ = parseStat(rest) // must return, whatever it says
		p, err := parseStat(fmt.Sprintf("42 (%s) %s", name, fields))
		if err != nil || p != (Proc{State: 'S', Parent: 7, Session: 9, StartTime: 12345}) {
			t.Errorf("a process named %q: %+v, %v", name, p, err)
		}
	})
}
