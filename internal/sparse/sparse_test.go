package sparse_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/sparse"
)

const block = sparse.BlockBytes

func create(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // the test has read it by then
	return f
}

// filled is zeros but for parts: where they begin, and how long they are.
func filled(size int, parts ...[2]int) []byte {
	p := make([]byte, size)
	for _, part := range parts {
		for i := range part[1] {
			p[part[0]+i] = byte(i%255) + 1
		}
	}
	return p
}

func holds(t *testing.T, f *os.File, want []byte, most int64) {
	t.Helper()
	got, err := os.ReadFile(f.Name())
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes that are not the %d wanted (%v)", len(got), len(want), err)
	}
	size, err := sparse.AllocatedAt(f.Name())
	if err != nil || size > most {
		t.Errorf("it takes %d bytes, more than %d (%v)", size, most, err)
	}
}

func TestZerosAreHoles(t *testing.T) {
	for _, tt := range []struct {
		name string
		data []byte
		most int64 // of allocated bytes
	}{
		{"nothing", nil, 0},
		{"zeros only", filled(100 * block), 0},
		{"zeros that end within a block", filled(100*block + 7), 0},
		{"one byte in the middle", filled(100*block, [2]int{50*block + 5, 1}), block},
		{"the first and the last byte", filled(100*block, [2]int{0, 1}, [2]int{100*block - 1, 1}), 2 * block},
		{"a short block at the end", filled(100*block+7, [2]int{100 * block, 7}), block},
		{"runs of several blocks", filled(200*block, [2]int{block, 3 * block}, [2]int{40 * block, 60 * block}), 63 * block},
		{"no zeros at all", filled(70*block, [2]int{0, 70 * block}), 70 * block},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := create(t)
			if n, err := sparse.Copy(f, bytes.NewReader(tt.data)); err != nil || n != int64(len(tt.data)) {
				t.Fatal(n, err)
			}
			holds(t, f, tt.data, tt.most)
			again := create(t)
			if err := sparse.CopyFile(again, f); err != nil {
				t.Fatal(err)
			}
			holds(t, again, tt.data, tt.most)
			if zero := sparse.IsZero(tt.data); zero != bytes.Equal(tt.data, make([]byte, len(tt.data))) {
				t.Errorf("IsZero: %v", zero)
			}
		})
	}
}

// TestDataIsFound: what is not in any range is zero, and ranges come in order.
func TestDataIsFound(t *testing.T) {
	want := filled(300*block+9, [2]int{0, block}, [2]int{77 * block, 5 * block}, [2]int{300 * block, 9})
	f := create(t)
	if _, err := sparse.Copy(f, bytes.NewReader(want)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	end, total := int64(0), int64(0)
	for part, err := range sparse.Data(f) {
		if err != nil || part.Offset < end || part.Bytes <= 0 {
			t.Fatalf("%+v behind byte %d: %v", part, end, err)
		}
		end, total = part.Offset+part.Bytes, total+part.Bytes
		if _, err := f.ReadAt(got[part.Offset:end], part.Offset); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(got, want) || total > 100*block {
		t.Errorf("the data are %d bytes, and not all", total)
	}
	for _, err := range sparse.Data(f) {
		if err != nil {
			t.Error(err)
		}
		break // whoever has seen enough
	}
}

type broken struct{}

var errBroken = errors.New("broken")

func (broken) Read(p []byte) (int, error) { return 0, errBroken }

func TestErrorsAreReported(t *testing.T) {
	f := create(t)
	if _, err := sparse.Copy(f, io.MultiReader(bytes.NewReader(filled(10*block, [2]int{0, block})), broken{})); !errors.Is(err, errBroken) {
		t.Errorf("a reader that breaks: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := sparse.WriteAt(f, []byte("x"), 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a file that is closed: %v", err)
	}
	if err := sparse.CopyFile(create(t), f); err == nil {
		t.Error("a copy of a file that is closed: no error")
	}
	for _, err := range sparse.Data(f) {
		if err == nil {
			t.Error("data in a file that is closed")
		}
	}
	if _, err := sparse.AllocatedAt(f.Name() + ".missing"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
}
