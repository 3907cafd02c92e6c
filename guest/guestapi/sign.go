package guestapi

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"
)

// ErrSignature is what a Verifier says of everything that the host did not sign.
var ErrSignature = errors.New("not signed by the host")

// signedBytes is what a signature covers. The sandbox makes it worthless for every
// other one, and the time makes every request unique.
func signedBytes(sandboxID, method, path string, nanos int64, body []byte) []byte {
	return fmt.Appendf(nil, "dormouse-control-v2\n%s\n%s\n%s\n%d\n%x", sandboxID, method, path, nanos, sha256.Sum256(body))
}

// Sign makes the value of HeaderSignature for a control request: the time in
// Unix nanoseconds, a dot, and an ed25519 signature in unpadded base64url. sandboxID
// is who the guest is before the request: what it was booted as, or what the last
// accepted one made it.
func Sign(key ed25519.PrivateKey, sandboxID, method, path string, at time.Time, body []byte) string {
	nanos := at.UnixNano()
	sig := ed25519.Sign(key, signedBytes(sandboxID, method, path, nanos, body))
	return strconv.FormatInt(nanos, 10) + "." + base64.RawURLEncoding.EncodeToString(sig)
}

// Verifier checks signatures with the host's public key and accepts each only
// once: a request must be newer than the last one accepted. It does not look at
// the guest's clock, which a restored VM cannot trust yet.
type Verifier struct {
	key ed25519.PublicKey

	mu   sync.Mutex
	last int64 // Unix nanoseconds of the newest accepted request
}

// NewVerifier checks against key.
func NewVerifier(key ed25519.PublicKey) *Verifier { return &Verifier{key: key} }

// Verify checks the header of a request to the guest of a sandbox and remembers it.
func (v *Verifier) Verify(header, sandboxID, method, path string, body []byte) error {
	stamp, encoded, ok := strings.Cut(header, ".")
	nanos, err := strconv.ParseInt(stamp, 10, 64)
	sig, err2 := base64.RawURLEncoding.DecodeString(encoded)
	if !ok || err != nil || err2 != nil {
		return ErrSignature
	}
	if !ed25519.Verify(v.key, signedBytes(sandboxID, method, path, nanos, body), sig) {
		return ErrSignature
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if nanos <= v.last {
		return fmt.Errorf("%w: it is a repetition", ErrSignature)
	}
	v.last = nanos
	return nil
}
