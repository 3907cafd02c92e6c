package rig

import (
	"bytes"
	"sync"
)

// tape keeps what a process writes; a test reads it while the process runs.
type tape struct {
	mu    sync.Mutex
	bytes bytes.Buffer
}

func (t *tape) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.bytes.Write(p)
}

func (t *tape) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.bytes.String()
}
