package qcow

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestOnlyWhatIsLaidOutAsWeKnowItIsABlank: of anything else, qemu-img makes the next too.
func TestOnlyWhatIsLaidOutAsWeKnowItIsABlank(t *testing.T) {
	const name, at, cluster = "/base", 200, 512
	h := header{backing: name, size: 1 << 20}
	good := make([]byte, 4*cluster)
	binary.BigEndian.PutUint32(good, magic)
	binary.BigEndian.PutUint32(good[4:], 3)
	binary.BigEndian.PutUint64(good[8:], at)
	binary.BigEndian.PutUint32(good[16:], uint32(len(name)))
	binary.BigEndian.PutUint32(good[20:], 9) // bits of a cluster
	binary.BigEndian.PutUint64(good[24:], uint64(h.size))
	binary.BigEndian.PutUint32(good[100:], headerV3)
	copy(good[at:], name)
	good[3*cluster] = 7
	for _, tt := range []struct {
		what  string
		spoil func(data []byte) []byte
		ok    bool
	}{
		{"as it should be", func(data []byte) []byte { return data }, true},
		{"something after the name", func(data []byte) []byte { data[at+len(name)+1] = 1; return data }, false},
		{"the name in another cluster", func(data []byte) []byte {
			binary.BigEndian.PutUint64(data[8:], 2*cluster)
			copy(data[2*cluster:], name)
			return data
		}, false},
		{"another name", func(data []byte) []byte { data[at+1] = 'x'; return data }, false},
		{"clusters of no bytes", func(data []byte) []byte { binary.BigEndian.PutUint32(data[20:], 64); return data }, false},
		{"clusters of one byte", func(data []byte) []byte { binary.BigEndian.PutUint32(data[20:], 0); return data }, false},
		{"not the format", func(data []byte) []byte { data[0] = 0; return data }, false},
		{"too large", func(data []byte) []byte { return append(data, make([]byte, maxBlank)...) }, false},
	} {
		t.Run(tt.what, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "overlay")
			if err := os.WriteFile(path, tt.spoil(slices.Clone(good)), 0o600); err != nil {
				t.Fatal(err)
			}
			b, err := blankOf(path, h)
			if (err == nil) != tt.ok {
				t.Fatalf("it says %v", err)
			}
			if err != nil {
				return
			}
			if b.at != at || b.room != cluster-at {
				t.Errorf("%d bytes at %d are the name's", b.room, b.at)
			}
			for length, ok := range map[int]bool{len(name): true, b.room: true, b.room + 1: false} {
				if err := b.write(path, string(slices.Repeat([]byte("n"), length))); (err == nil) != ok {
					t.Errorf("a name of %d bytes: %v", length, err)
				}
			}
		})
	}
}

// TestBlanksAreFew: who has made too many sizes begins anew.
func TestBlanksAreFew(t *testing.T) {
	var b blanks
	for i := range 3 * maxBlanks {
		h := header{backing: "a", format: "raw", size: int64(i)}
		b.put(h, &blank{at: i})
		h.backing = "another"
		if got := b.get(h); got == nil || got.at != i || len(b.have) > maxBlanks {
			t.Fatalf("after %d sizes there is %+v of %d", i+1, got, len(b.have))
		}
		h.format = "qcow2"
		if b.get(h) != nil {
			t.Fatal("another format has the same")
		}
	}
}
