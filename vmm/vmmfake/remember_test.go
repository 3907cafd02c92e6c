package vmmfake_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/dormouse-sandbox/dormouse/vmm"
	"github.com/dormouse-sandbox/dormouse/vmm/vmmfake"
	"github.com/dormouse-sandbox/dormouse/vmm/vmmtest"
)

const remembered = 64 // pages

// remember is the guest that knows what is in its memory. Its first page says how
// far it came, for its next life: the generation, and how many pages are of it;
// the one after those may be.
func remember(ctx context.Context, m vmmfake.Inside) {
	said := false
	for ctx.Err() == nil {
		generation, done := progress(m)
		if wrong := look(m, generation, done); wrong != "" {
			_, _ = fmt.Fprintln(m.Console, vmmtest.Forgot, wrong)
			return
		}
		if said {
			_, _ = fmt.Fprintln(m.Console, vmmtest.Remembers, generation)
			time.Sleep(time.Millisecond)
		}
		said = true
		if done == remembered {
			generation, done = generation+1, 0
			setProgress(m, generation, done)
		}
		for ; done < remembered && ctx.Err() == nil; done++ {
			_, _ = m.Memory.WriteAt(content(done, generation), int64(done+1)*vmm.PageSize) // it ends the machine if it fails
			setProgress(m, generation, done+1)
		}
	}
}

func progress(m vmmfake.Inside) (generation, done int) {
	var b [16]byte
	_, _ = m.Memory.ReadAt(b[:], 0) // it ends the machine if it fails
	return int(binary.LittleEndian.Uint64(b[:])), int(binary.LittleEndian.Uint64(b[8:]))
}

func setProgress(m vmmfake.Inside, generation, done int) {
	b := binary.LittleEndian.AppendUint64(nil, uint64(generation))
	_, _ = m.Memory.WriteAt(binary.LittleEndian.AppendUint64(b, uint64(done)), 0) // it ends the machine if it fails
}

// content is what a page has in a generation: zeros in every fifth one.
func content(page, generation int) []byte {
	if generation <= 0 || (page+generation)%5 == 0 {
		return make([]byte, vmm.PageSize)
	}
	return bytes.Repeat(binary.LittleEndian.AppendUint64(nil, uint64(page)<<32|uint64(generation)), vmm.PageSize/8)
}

func look(m vmmfake.Inside, generation, done int) string {
	got := make([]byte, vmm.PageSize)
	for page := range remembered {
		_, _ = m.Memory.ReadAt(got, int64(page+1)*vmm.PageSize) // it ends the machine if it fails
		now, before := content(page, generation), content(page, generation-1)
		switch {
		case page < done && bytes.Equal(got, now), page > done && bytes.Equal(got, before):
		case page == done && (bytes.Equal(got, now) || bytes.Equal(got, before)):
		default:
			return fmt.Sprintf("page %d of generation %d, of which %d are written", page, generation, done)
		}
	}
	return ""
}
