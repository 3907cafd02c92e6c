package oci

import (
	"context"
	"io"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Limits bound what one image may take. Zero fields get defaults.
type Limits struct {
	Bytes   int64 // of all files together, holes included; 16 GiB
	Entries int64 // of all layers together; 1 million
	Names   int64 // bytes of all names and link targets together; 256 MiB
	Layers  int   // 256
	// Path bounds one name and one link target, in bytes; 2048.
	Path int
	// Ratio is how many bytes one compressed byte may become, once a layer has
	// become more than RatioFrom; 200 and 256 MiB.
	Ratio     int64
	RatioFrom int64
}

const (
	maxComponent = 255     // of a file name, in every file system here
	maxMetadata  = 4 << 20 // of a manifest, an index or a configuration
	// maxAttributes bounds the extended attributes of one file: ext4 keeps them
	// in one block.
	maxAttributes = 3 << 10
	// maxBlob bounds one layer as it is stored.
	maxBlob = 16 << 30
)

func (l Limits) withDefaults() Limits {
	for _, d := range []struct {
		field *int64
		value int64
	}{
		{&l.Bytes, 16 << 30},
		{&l.Entries, 1_000_000},
		{&l.Names, 256 << 20},
		{&l.Ratio, 200},
		{&l.RatioFrom, 256 << 20},
	} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	if l.Layers == 0 {
		l.Layers = 256
	}
	if l.Path == 0 {
		l.Path = 2048
	}
	return l
}

// budget is what is left of the limits.
type budget struct {
	limits                Limits
	bytes, entries, names int64
}

func newBudget(l Limits) *budget {
	l = l.withDefaults()
	return &budget{limits: l, bytes: l.Bytes, entries: l.Entries, names: l.Names}
}

// entry pays for one entry and its names.
func (b *budget) entry(names ...string) error {
	if b.entries--; b.entries < 0 {
		return invalid("it has more than %d entries", b.limits.Entries)
	}
	for _, name := range names {
		if len(name) > b.limits.Path {
			return invalid("a name has %d bytes, at most %d: %.60q…", len(name), b.limits.Path, name)
		}
		if b.names -= int64(len(name)); b.names < 0 {
			return invalid("its names have more than %d bytes together", b.limits.Names)
		}
	}
	return nil
}

func (b *budget) data(bytes int64) error {
	if bytes < 0 || bytes > b.bytes {
		return invalid("its files have more than %d bytes together", b.limits.Bytes)
	}
	b.bytes -= bytes
	return nil
}

// meter counts what passes, and ends with the context.
type meter struct {
	ctx   context.Context
	r     io.Reader
	bytes int64
}

func (m *meter) Read(p []byte) (int, error) {
	if m.ctx.Err() != nil {
		return 0, context.Cause(m.ctx)
	}
	n, err := m.r.Read(p)
	m.bytes += int64(n)
	return n, err
}

// valve ends a stream that unpacks to too much, in all or by each byte.
type valve struct {
	r      io.Reader
	packed *meter
	limits Limits
	bytes  int64
}

func (v *valve) Read(p []byte) (int, error) {
	n, err := v.r.Read(p)
	v.bytes += int64(n)
	if v.bytes > v.limits.RatioFrom && v.bytes/v.limits.Ratio > v.packed.bytes {
		return n, invalid("%d compressed bytes unpack to more than %d times as much", v.packed.bytes, v.limits.Ratio)
	}
	// Headers and padding are at most a kilobyte for each entry, and a megabyte of
	// extended ones; what is beyond all bounds is noise around the entries.
	if v.bytes > 2*v.limits.Bytes+(1<<30) {
		return n, invalid("it unpacks to more than %d bytes", 2*v.limits.Bytes+(1<<30))
	}
	return n, err
}

func invalid(format string, args ...any) error {
	return sandbox.Errorf(sandbox.KindInvalid, format, args...)
}
