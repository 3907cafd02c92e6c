package snapshot

import (
	"encoding/hex"
	"fmt"

	"github.com/zeebo/blake3"
)

// Digest is a BLAKE3 hash of 256 bits. The zero Digest stands for nothing.
type Digest [32]byte

// DigestOf hashes bytes.
func DigestOf(data []byte) Digest { return blake3.Sum256(data) }

// String is 64 hex digits.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// IsZero reports whether it is the digest of nothing.
func (d Digest) IsZero() bool { return d == Digest{} }

// MarshalText is String, for JSON.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads what String wrote.
func (d *Digest) UnmarshalText(text []byte) (err error) {
	*d, err = ParseDigest(string(text))
	return err
}

// ParseDigest reads what String wrote, and nothing else.
func ParseDigest(s string) (Digest, error) {
	var d Digest
	if len(s) != hex.EncodedLen(len(d)) {
		return d, fmt.Errorf("%q is no digest: it must be %d hex digits", s, hex.EncodedLen(len(d)))
	}
	if _, err := hex.Decode(d[:], []byte(s)); err != nil || d.String() != s {
		return Digest{}, fmt.Errorf("%q is no digest: it must be %d hex digits", s, hex.EncodedLen(len(d)))
	}
	return d, nil
}
