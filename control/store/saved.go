package store

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Saved is a memory and a disk that are kept, as their host describes them. The
// zero value is that nothing is kept.
type Saved struct {
	At         time.Time `json:"at"` // the moment that it holds
	Generation int       `json:"generation"`
	// Allocated bytes: of all that it consists of, and of what was written for it.
	MemoryBytes  int64              `json:"memory_bytes"`
	DiskBytes    int64              `json:"disk_bytes"`
	OwnBytes     int64              `json:"own_bytes"`
	MemoryDigest string             `json:"memory_digest"`
	DiskDigest   string             `json:"disk_digest"`
	ParentDigest string             `json:"parent_digest,omitempty"`
	Compat       string             `json:"compat"`
	Durability   sandbox.Durability `json:"durability"`
}

// Kept says whether there is anything.
func (s Saved) Kept() bool { return s != Saved{} }

func encodeSaved(s Saved) (string, error) {
	if !s.Kept() {
		return "", nil
	}
	b, err := json.Marshal(s)
	if err != nil {
		return "", fmt.Errorf("encode pause point: %w", err)
	}
	return string(b), nil
}

func decodeSaved(text string) (s Saved, err error) {
	if text == "" {
		return s, nil
	}
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		return Saved{}, fmt.Errorf("decode pause point: %w", err)
	}
	return s, nil
}
