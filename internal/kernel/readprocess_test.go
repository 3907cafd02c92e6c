package kernel_test

import (
	"bytes"
	"os"
	"testing"
	"unsafe"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
)

// TestReadProcess reads more pieces than the kernel takes at a time, with empty
// ones between, and what is not there.
func TestReadProcess(t *testing.T) {
	memory := make([]byte, 3*4096)
	for i := range memory {
		memory[i] = byte(i * 31 >> 3)
	}
	at := uint64(uintptr(unsafe.Pointer(&memory[0])))
	var ranges []kernel.Range
	var want []byte
	for i := 0; i < len(memory)-3; i += 4 {
		n := i / 4 % 4
		ranges = append(ranges, kernel.Range{Start: at + uint64(i), End: at + uint64(i+n)})
		want = append(want, memory[i:i+n]...)
	}
	got := make([]byte, len(want))
	if err := kernel.ReadProcess(os.Getpid(), got, ranges); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%v; right: %v", err, bytes.Equal(got, want))
	}
	if err := kernel.ReadProcess(os.Getpid(), got[1:], ranges); err == nil {
		t.Error("a byte more than there is room for was read")
	}
	if err := kernel.ReadProcess(os.Getpid(), got[:20], []kernel.Range{{Start: at, End: at + 10}, {Start: 0, End: 10}}); err == nil {
		t.Error("the first page of the address space was read")
	}
	if err := kernel.ReadProcess(os.Getpid(), nil, nil); err != nil {
		t.Errorf("nothing: %v", err)
	}
}
