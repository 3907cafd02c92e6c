package template

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
)

const digestPrefix = "sha256:"

// digestFile hashes a file's bytes, holes as zeros.
func digestFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }() // read only
	h := sha256.New()
	if _, err := io.CopyBuffer(h, struct{ io.Reader }{f}, make([]byte, 1<<20)); err != nil {
		return "", fmt.Errorf("hash %s: %w", path, err)
	}
	return digestPrefix + hex.EncodeToString(h.Sum(nil)), nil
}

// hashOf is a short name for a value, the same for equal values.
func hashOf(v any) string {
	data, err := json.Marshal(v)
	if err != nil {
		panic("template: hash of " + err.Error()) // only called with plain data
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func isHex(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == sha256.Size
}
