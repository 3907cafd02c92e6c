package oci

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
)

// layer is one tar file of an image, as it is stored.
type layer struct {
	digest string // "sha256:…" of the stored bytes; empty: only diffID is known
	size   int64  // of the stored bytes; -1: not known
	diffID string // "sha256:…" of the tar file in it
	open   func(context.Context) (io.ReadCloser, error)
}

func (l layer) name() string {
	if l.digest != "" {
		return l.digest
	}
	return l.diffID
}

// unpack puts the layer on the tree, and makes sure that it was the right one.
// By then it is there: whoever gets an error throws the tree away.
func (l layer) unpack(ctx context.Context, u *unpacker) (err error) {
	r, err := l.open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	packed, plain := newDigester(l.digest), newDigester(l.diffID)
	source := &meter{ctx: ctx, r: io.LimitReader(r, maxBlob+1)}
	stored := io.TeeReader(source, packed)
	content, done, err := decompress(stored)
	if err != nil {
		return err
	}
	defer done()
	out := &valve{r: content, packed: source, limits: u.budget.limits}
	tar := io.TeeReader(out, plain)
	if err := u.layer(tar); err != nil {
		return err
	}
	for _, rest := range []io.Reader{tar, stored} { // what lies behind the end of the tar file, and of its compression
		if _, err := io.Copy(io.Discard, rest); err != nil {
			return broken(err)
		}
	}
	switch {
	case source.bytes > maxBlob:
		return invalid("it has more than %d bytes", int64(maxBlob))
	case l.size >= 0 && source.bytes != l.size:
		return invalid("it has %d bytes, not %d", source.bytes, l.size)
	}
	return errors.Join(packed.check("stored"), plain.check("unpacked"))
}

// digester hashes what is written to it; with an empty digest it does nothing.
type digester struct {
	want string
	hash.Hash
}

func newDigester(want string) *digester { return &digester{want, sha256.New()} }

func (d *digester) check(what string) error {
	if have := "sha256:" + hex.EncodeToString(d.Sum(nil)); d.want != "" && have != d.want {
		return invalid("its bytes, as %s, have the digest %s, not %s", what, have, d.want)
	}
	return nil
}

// checkDigest makes sure that a digest is one that we can compare.
func checkDigest(digest string) error {
	hash, ok := bytes.CutPrefix([]byte(digest), []byte("sha256:"))
	raw := make([]byte, sha256.Size)
	if !ok || len(hash) != hex.EncodedLen(len(raw)) {
		return invalid("%.100q is not a sha256 digest", digest)
	}
	if _, err := hex.Decode(raw, hash); err != nil || !bytes.Equal(bytes.ToLower(hash), hash) {
		return invalid("%.100q is not a sha256 digest", digest)
	}
	return nil
}

func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return fmt.Sprintf("sha256:%x", sum)
}
