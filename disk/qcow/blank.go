package qcow

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/internal/sparse"
)

// Empty overlays of a size differ in the name of what they lie on. So qemu-img makes
// the first, and the next are that one with another name: starting qemu-img takes
// several times as long as all of the rest.

const (
	maxBlanks  = 16      // sizes and formats that are remembered
	maxBlank   = 2 << 20 // bytes of one
	maxBacking = 1023    // bytes of a name, says the format
)

// blank is an empty overlay without a name.
type blank struct {
	data []byte
	at   int // where the name goes
	room int // for it, in bytes
}

// blanks are known by their header without a name.
type blanks struct {
	mu   sync.Mutex
	have map[header]*blank
}

func (b *blanks) get(h header) *blank {
	h.backing = ""
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.have[h]
}

func (b *blanks) put(h header, made *blank) {
	h.backing = ""
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.have == nil || len(b.have) >= maxBlanks {
		b.have = map[header]*blank{}
	}
	b.have[h] = made
}

// blankOf takes the name out of an overlay that qemu-img has just made. It says no to
// one that is not laid out as we know it.
func blankOf(path string, h header) (*blank, error) {
	data, err := osfs.ReadFileLimit(path, maxBlank)
	if err != nil {
		return nil, err
	}
	got, err := parseHeader(data)
	if err != nil {
		return nil, err
	}
	if got != h {
		return nil, fmt.Errorf("it is %s, want %s", got, h)
	}
	at, clusterBits := binary.BigEndian.Uint64(data[8:]), binary.BigEndian.Uint32(data[20:])
	cluster := min(uint64(len(data)), 1<<clusterBits)
	end := at + uint64(len(h.backing)) // parseHeader has looked at that
	if end > cluster || !sparse.IsZero(data[end:cluster]) {
		return nil, errors.New("the name of what it lies on is not the last in its first cluster")
	}
	clear(data[at:end])
	return &blank{data: data, at: int(at), room: int(min(cluster-at, maxBacking))}, nil
}

// write makes an overlay over what is called backing. It is not durable yet.
func (b *blank) write(path, backing string) (err error) {
	if len(backing) > b.room {
		return fmt.Errorf("%s: a name of %d bytes, %d is the bound", backing, len(backing), b.room)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Truncate(int64(len(b.data))); err != nil {
		return err
	}
	if err := sparse.WriteAt(f, b.data, 0); err != nil {
		return err
	}
	length := binary.BigEndian.AppendUint32(nil, uint32(len(backing)))
	if _, err := f.WriteAt(length, 16); err != nil {
		return err
	}
	_, err = f.WriteAt([]byte(backing), int64(b.at))
	return err
}
