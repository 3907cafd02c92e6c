package dm

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/dormouse-sandbox/dormouse/disk"
)

const (
	causeChanged = "is not what was sealed"
	causeInTree  = "of the hash tree is not what was sealed"
	// maxDamage is how many blocks of one layer are listed: of one that is another
	// file altogether it would be all.
	maxDamage = 4096

	causeUnjudged = "cannot be judged: its block of the hash tree is damaged"
)

// Verify reads a whole layer and its hash tree and says which blocks are not
// what they were when the layer was sealed. An error says that it could not be
// found out.
func (d *Driver) Verify(ctx context.Context, layer string) ([]disk.Damage, error) {
	damage, err := verify(ctx, layer)
	if err != nil {
		return nil, fmt.Errorf("verify %s: %w", layer, err)
	}
	return damage, nil
}

func verify(ctx context.Context, layer string) (damage []disk.Damage, err error) {
	s, err := readSeal(layer)
	if err != nil {
		return nil, err
	}
	data, err := os.Open(layer)
	if err != nil {
		return nil, err
	}
	defer func() { _ = data.Close() }() // read only
	stored, good, damage, err := readTree(ctx, layer+treeSuffix, s)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	unreadable := map[int64]bool{}
	leaves, err := hashAll(ctx, data, s.blocks(), func(block int64, err error) {
		mu.Lock()
		defer mu.Unlock()
		unreadable[block] = true
		damage = append(damage, disk.Damage{File: layer, Block: block, Cause: "cannot be read: " + err.Error()})
	})
	if err != nil {
		return nil, err
	}
	more := int64(0)
	for block, sum := range leaves {
		if unreadable[int64(block)] || sum == stored[block] {
			continue
		}
		cause := causeChanged
		if len(good) > 0 && !good[block/hashesPerBlock] {
			cause = causeUnjudged
		}
		if len(damage) > maxDamage {
			more++
			continue
		}
		damage = append(damage, disk.Damage{File: layer, Block: int64(block), Cause: cause})
	}
	if more > 0 {
		last := &damage[len(damage)-1]
		last.Cause = fmt.Sprintf("%s, and so are %d blocks behind it", last.Cause, more)
	}
	slices.SortFunc(damage, func(a, b disk.Damage) int {
		return cmp.Or(strings.Compare(a.File, b.File), cmp.Compare(a.Block, b.Block))
	})
	return damage, nil
}

// readTree reads a tree from the root down: the digests of the data blocks, and
// which blocks of leaves can be trusted.
func readTree(ctx context.Context, path string, s seal) (stored []digest, good []bool, damage []disk.Damage, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, nil, err
	}
	defer func() { _ = f.Close() }() // read only
	want, good := []digest{s.root}, []bool(nil)
	at := int64(1)
	head := make([]byte, blockBytes) // which the kernel does not read; veritysetup does
	if _, err := f.ReadAt(head, 0); err != nil {
		damage = append(damage, disk.Damage{File: path, Cause: "cannot be read: " + err.Error()})
	} else if !bytes.Equal(head, superblock(s.blocks(), s.root)) {
		damage = append(damage, disk.Damage{File: path, Cause: causeInTree})
	}
	sizes := levels(s.blocks())
	for _, blocks := range slices.Backward(sizes) {
		below := make([]digest, 0, blocks*hashesPerBlock)
		above := good
		good = make([]bool, blocks)
		for i := range blocks {
			if err := ctx.Err(); err != nil {
				return nil, nil, nil, err
			}
			block := make([]byte, blockBytes)
			if _, err := f.ReadAt(block, (at+i)*blockBytes); err != nil && !errors.Is(err, io.EOF) {
				damage = append(damage, disk.Damage{File: path, Block: at + i, Cause: "cannot be read: " + err.Error()})
			} else if good[i] = sha256.Sum256(block) == want[i]; !good[i] {
				cause := causeInTree
				if above != nil && !above[i/hashesPerBlock] {
					cause = causeUnjudged
				}
				damage = append(damage, disk.Damage{File: path, Block: at + i, Cause: cause})
			}
			good[i] = good[i] && (above == nil || above[i/hashesPerBlock])
			for entry := range slices.Chunk(block, digestBytes) {
				below = append(below, digest(entry))
			}
		}
		want, at = below, at+blocks
	}
	return want, good, damage, nil
}
