package snapshot

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// The encoding of a manifest; docs/formats/manifest.md has it with an example.
//
//	 0   8  magic "DRMSEMAN"
//	 8   4  format version, 1
//	12   4  kind: 1 memory, 2 disk
//	16   4  block size in bytes, 4096
//	20   4  generation
//	24   8  size of the image in blocks
//	32  32  digest of the parent, or zeros
//	64   4  number of layers
//	68   4  zeros
//	72   8  number of extents
//	80      layers: digest (32), blocks (8)
//	        extents: varints, see putExtent
//	   -32  BLAKE3 of everything before: the manifest's name
//
// Numbers are little-endian. Extents follow one another from block 0, so that the
// format has no way to say that two overlap or that there is a gap.
const (
	manifestMagic   = "DRMSEMAN"
	manifestVersion = 1
	headBytes       = 80
	layerRefBytes   = 40
	// maxManifestBytes is what a manifest with an extent for every block of 64 GiB
	// takes, several times over.
	maxManifestBytes = 1 << 30
)

var errCut = errors.New("it ends too early")

// encode is everything but the digest.
func (m *Manifest) encode() []byte {
	out := make([]byte, headBytes, headBytes+layerRefBytes*len(m.Layers)+4*m.Extents())
	copy(out, manifestMagic)
	le := binary.LittleEndian
	le.PutUint32(out[8:], manifestVersion)
	le.PutUint32(out[12:], uint32(m.Kind))
	le.PutUint32(out[16:], BlockBytes)
	le.PutUint32(out[20:], m.Generation)
	le.PutUint64(out[24:], uint64(m.Blocks))
	copy(out[32:64], m.Parent[:])
	le.PutUint32(out[64:], uint32(len(m.Layers)))
	le.PutUint64(out[72:], uint64(m.Extents()))
	for _, l := range m.Layers {
		out = append(out, l.Digest[:]...)
		out = le.AppendUint64(out, uint64(l.Blocks))
	}
	next := make([]int64, len(m.Layers))
	for i := range m.Extents() {
		out = putExtent(out, m.Extent(i), next)
	}
	return out
}

// putExtent writes how many blocks, then 0 for zeros, or the layer's number plus
// one and how far the place is from the end of the last extent in that layer:
// layers are written in the order of the image, so that is 0 most of the time.
func putExtent(out []byte, e Extent, next []int64) []byte {
	out = binary.AppendUvarint(out, uint64(e.Blocks))
	out = binary.AppendUvarint(out, uint64(e.Layer+1))
	if e.Layer != Zero {
		out = binary.AppendVarint(out, e.Offset-next[e.Layer])
		next[e.Layer] = e.Offset + e.Blocks
	}
	return out
}

// Encode is the manifest's file.
func (m *Manifest) Encode() []byte {
	return append(m.encode(), m.digest[:]...)
}

// Decode reads a manifest's file and checks all of it.
func Decode(data []byte) (*Manifest, error) {
	if len(data) > maxManifestBytes {
		return nil, fmt.Errorf("manifest of %d bytes is larger than %d", len(data), maxManifestBytes)
	}
	m, err := decode(data)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	return m, nil
}

func decode(data []byte) (*Manifest, error) {
	var m Manifest
	if len(data) < headBytes+len(m.digest) {
		return nil, errCut
	}
	if string(data[:8]) != manifestMagic {
		return nil, fmt.Errorf("it begins with %q, not %q", data[:8], manifestMagic)
	}
	le := binary.LittleEndian
	if v := le.Uint32(data[8:]); v != manifestVersion {
		return nil, fmt.Errorf("format version %d, this build reads %d", v, manifestVersion)
	}
	body := data[:len(data)-len(m.digest)]
	if m.digest = Digest(data[len(body):]); m.digest != DigestOf(body) {
		return nil, errors.New("it is not what was written: its digest is another one")
	}
	layers, count, err := m.decodeHead(body)
	if err != nil {
		return nil, err
	}
	rest, err := m.decodeLayers(body[headBytes:], layers)
	if err != nil {
		return nil, err
	}
	if err := m.decodeExtents(rest, count); err != nil {
		return nil, err
	}
	if m.dropUnused(); len(m.Layers) != int(layers) {
		return nil, fmt.Errorf("only %d of its %d layers are in use", len(m.Layers), layers)
	}
	return &m, m.check()
}

func (m *Manifest) decodeHead(head []byte) (layers uint32, extents uint64, err error) {
	le := binary.LittleEndian
	m.Kind, m.Generation, m.Parent = Kind(le.Uint32(head[12:])), le.Uint32(head[20:]), Digest(head[32:64])
	blocks := le.Uint64(head[24:])
	if size := le.Uint32(head[16:]); size != BlockBytes {
		return 0, 0, fmt.Errorf("blocks of %d bytes, not %d", size, BlockBytes)
	}
	if blocks > MaxBlocks {
		return 0, 0, fmt.Errorf("%d blocks are more than %d", blocks, int64(MaxBlocks))
	}
	m.Blocks = int64(blocks)
	if layers = le.Uint32(head[64:]); layers > MaxLayers {
		return 0, 0, fmt.Errorf("%d layers are more than %d", layers, MaxLayers)
	}
	if le.Uint32(head[68:]) != 0 {
		return 0, 0, errors.New("the reserved bytes are not zero")
	}
	return layers, le.Uint64(head[72:]), nil
}

func (m *Manifest) decodeLayers(data []byte, count uint32) (rest []byte, err error) {
	if uint64(len(data)) < uint64(count)*layerRefBytes {
		return nil, errCut
	}
	for range count {
		blocks := binary.LittleEndian.Uint64(data[32:])
		if blocks > MaxBlocks {
			return nil, fmt.Errorf("a layer of %d blocks is larger than %d", blocks, int64(MaxBlocks))
		}
		m.Layers = append(m.Layers, LayerRef{Digest(data[:32]), int64(blocks)})
		data = data[layerRefBytes:]
	}
	return data, nil
}

func (m *Manifest) decodeExtents(data []byte, count uint64) error {
	if count > uint64(len(data))/2 { // two bytes at least
		return errCut
	}
	m.extents = extents{make([]uint32, 0, count), make([]place, 0, count)}
	next := make([]int64, len(m.Layers))
	var end int64
	for range count {
		e, n := takeExtent(data, next)
		if n == 0 {
			return errCut
		}
		e.Start = end
		if err := m.checkExtent(e, end); err != nil {
			return err
		}
		if e.Layer != Zero {
			next[e.Layer] = e.Offset + e.Blocks
		}
		if err := checkSpelling(data[:n]); err != nil {
			return err
		}
		before := len(m.extents.starts)
		if m.extents.add(e); len(m.extents.starts) == before {
			return fmt.Errorf("extent at block %d is part of the one before", e.Start)
		}
		end, data = e.End(), data[n:]
	}
	if len(data) > 0 || end != m.Blocks {
		return fmt.Errorf("its extents end at block %d of %d, with %d bytes behind them", end, m.Blocks, len(data))
	}
	return nil
}

// takeExtent reads what putExtent wrote, and how many bytes that were; 0 for what
// it did not write.
func takeExtent(data []byte, next []int64) (e Extent, n int) {
	blocks, a := binary.Uvarint(data)
	if a <= 0 || blocks > MaxBlocks {
		return e, 0
	}
	layer, b := binary.Uvarint(data[a:])
	if b <= 0 || layer > uint64(len(next)) {
		return e, 0
	}
	e.Blocks, e.Layer = int64(blocks), int(layer)-1
	if e.Layer == Zero {
		return e, a + b
	}
	step, c := binary.Varint(data[a+b:])
	if c <= 0 || step > MaxBlocks || step < -MaxBlocks {
		return e, 0
	}
	e.Offset = next[e.Layer] + step
	return e, a + b + c
}

// checkSpelling refuses a number in more bytes than it needs: the same extents
// have one encoding, and so one digest.
func checkSpelling(data []byte) error {
	for i := 1; i < len(data); i++ {
		if data[i] == 0 && data[i-1]&0x80 != 0 {
			return errors.New("a number is spelled in more bytes than it needs")
		}
	}
	return nil
}
