package sandbox

import (
	"crypto/rand"
	"encoding/base32"
	"io"
	"regexp"
)

// ID names one sandbox for ever. It appears in host names, file names and log
// lines, so it has only lower-case letters and digits, and it cannot be guessed.
type ID string

// idBytes gives 120 random bits, which are exactly idLen base32 digits.
const (
	idBytes = 15
	idLen   = 24
)

var idEncoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// NewID makes an ID from the operating system's random source.
func NewID() ID {
	id, err := NewIDFrom(rand.Reader)
	if err != nil {
		panic("sandbox: the system's random source failed: " + err.Error()) // crypto/rand never returns an error
	}
	return id
}

// NewIDFrom makes an ID from r, for tests that need to repeat themselves.
func NewIDFrom(r io.Reader) (ID, error) {
	var b [idBytes]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return "", err
	}
	return ID(idEncoding.EncodeToString(b[:])), nil
}

var (
	idPattern   = regexp.MustCompile(`^[a-z0-9]{24}$`)
	namePattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$`)
	userPattern = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,31}$`)
)

// ParseID checks that s is an ID. Everything that arrives from outside passes
// through here before it becomes part of a path.
func ParseID(s string) (ID, error) {
	if !idPattern.MatchString(s) {
		return "", Errorf(KindInvalid, "sandbox ID %s is not %d characters of a-z and 0-9", quote(s), idLen)
	}
	return ID(s), nil
}

// SafeName checks a name that may become part of a path: what says what kind of
// name it is, for the message.
func SafeName(what, s string) error {
	if !namePattern.MatchString(s) {
		return Errorf(KindInvalid, "%s name %s must match %s", what, quote(s), namePattern)
	}
	return nil
}

// CheckUser checks the name of a unix user inside the sandbox.
func CheckUser(s string) error {
	if !userPattern.MatchString(s) {
		return Errorf(KindInvalid, "user name %s must match %s", quote(s), userPattern)
	}
	return nil
}
