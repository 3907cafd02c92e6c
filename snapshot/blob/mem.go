package blob

import (
	"bytes"
	"context"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
)

// Mem keeps blobs in memory, for tests. The zero value is empty and ready.
type Mem struct {
	mu    sync.Mutex
	blobs map[string][]byte
}

// Put keeps a copy.
func (m *Mem) Put(ctx context.Context, key string, data io.Reader, size int64) error {
	if err := CheckKey(key); err != nil {
		return err
	}
	var buf bytes.Buffer
	if err := copyExactly(ctx, &buf, data, size); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.blobs == nil {
		m.blobs = map[string][]byte{}
	}
	m.blobs[key] = buf.Bytes()
	return nil
}

func (m *Mem) get(key string) ([]byte, error) {
	if err := CheckKey(key); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	data, ok := m.blobs[key]
	if !ok {
		return nil, notFound(key)
	}
	return data, nil
}

// Get reads a blob.
func (m *Mem) Get(_ context.Context, key string) (io.ReadCloser, error) {
	data, err := m.get(key)
	if err != nil {
		return nil, err
	}
	return io.NopCloser(bytes.NewReader(data)), nil
}

// Size is a blob's.
func (m *Mem) Size(_ context.Context, key string) (int64, error) {
	data, err := m.get(key)
	return int64(len(data)), err
}

// List names blobs.
func (m *Mem) List(_ context.Context, prefix string) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	keys := slices.Sorted(maps.Keys(m.blobs))
	return slices.DeleteFunc(keys, func(k string) bool { return !strings.HasPrefix(k, prefix) }), nil
}

// Delete removes a blob.
func (m *Mem) Delete(_ context.Context, key string) error {
	if err := CheckKey(key); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.blobs, key)
	return nil
}
