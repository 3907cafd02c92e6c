package main

import (
	"encoding/binary"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

const pageBytes = 4096

// remember keeps pages full of words that follow from the page, and from when it
// was last written; in each generation it writes some anew and makes some zero,
// and looks at all of them before and after. It never ends.
func remember(mib int) {
	memory, err := unix.Mmap(-1, 0, mib<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		say("GUEST-FORGOT everything: %v", err)
		return
	}
	_ = unix.Madvise(memory, unix.MADV_NOHUGEPAGE) // a page is what is looked at from outside
	written := make([]int, len(memory)/pageBytes)  // the generation, negative for zeros
	for i := range written {
		fill(memory, i, 1)
		written[i] = 1
	}
	for generation := 2; ; generation++ {
		if wrong := look(memory, written); wrong != "" {
			say("GUEST-FORGOT %s", wrong)
			return
		}
		say("GUEST-REMEMBERS %d", generation-1)
		for i := range written {
			switch (i*7 + generation*13) % 16 {
			case 0, 5:
				fill(memory, i, generation)
				written[i] = generation
			case 9:
				clear(memory[i*pageBytes:][:pageBytes])
				written[i] = -generation
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func word(page, generation, at int) uint64 {
	return uint64(page)<<32 ^ uint64(generation)<<12 ^ uint64(at) ^ 0x5ca1ab1e<<24
}

func fill(memory []byte, page, generation int) {
	p := memory[page*pageBytes:][:pageBytes]
	for at := 0; at < len(p); at += 8 {
		binary.LittleEndian.PutUint64(p[at:], word(page, generation, at))
	}
}

// look names the first page that is not what was written.
func look(memory []byte, written []int) string {
	for page, generation := range written {
		p := memory[page*pageBytes:][:pageBytes]
		for at := 0; at < len(p); at += 8 {
			want := uint64(0)
			if generation > 0 {
				want = word(page, generation, at)
			}
			if got := binary.LittleEndian.Uint64(p[at:]); got != want {
				return fmt.Sprintf("page %d of generation %d: at %d it has %#x, not %#x", page, generation, at, got, want)
			}
		}
	}
	return ""
}
