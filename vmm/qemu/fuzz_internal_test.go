package qemu

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/dormouse-sandbox/dormouse/vmm"
)

// FuzzMonitor: whatever comes over the control socket of a QEMU that its guest
// has taken over, the reader ends, and whoever waits for a reply is told.
func FuzzMonitor(f *testing.F) {
	f.Add([]byte(`{"id": 1, "return": {}}` + "\n" + `{"event": "SHUTDOWN", "data": {"reason": "guest-reset"}}` + "\n"))
	f.Add([]byte(`{"id": 1, "error": {"class": "x", "desc": "y"}}` + "\n"))
	f.Add([]byte(`{"id": 1, "return": {"status": 7}}`)) // cut short, or of another type
	f.Add([]byte(`{"event": "SHUTDOWN", "data": "?"}` + "\n" + `{"event": "STOP"}` + "\n{}\nnull\n[]\n\x00\n"))
	f.Add(bytes.Repeat([]byte("x"), maxMessage+1))
	f.Fuzz(func(t *testing.T, data []byte) {
		near, far := net.Pipe()
		vm := &machine{stopped: make(chan struct{}, 1)}
		m := &monitor{conn: near, onEvent: vm.note, closed: make(chan struct{}), waiting: map[int]chan message{}}
		lines := bufio.NewScanner(near)
		lines.Buffer(nil, maxMessage)
		go m.read(lines)
		go func() {
			_, _ = bufio.NewReader(far).ReadString('\n') // the command
			_, _ = io.Copy(far, bytes.NewReader(data))   // the reader may hang up first
			_ = far.Close()                              // a pipe's never fails
		}()
		var reply struct {
			Status string `json:"status"`
		}
		if err := m.run(t.Context(), "query-status", nil, &reply); err == nil && !bytes.Contains(data, []byte("return")) {
			t.Error("a command has succeeded that nobody answered")
		}
		_ = near.Close() // a pipe's never fails
		<-m.closed
	})
}

// FuzzRecall: an answer that is not whole, or not about this machine, does not
// count; the probe is made again.
func FuzzRecall(f *testing.F) {
	b := basis{QEMU: "7.2.0", BootID: "boot"}
	whole, err := json.Marshal(answer{b, vmm.Capabilities{Driver: Name, Accelerator: KVM}})
	if err != nil {
		f.Fatal(err)
	}
	for n := 0; n < len(whole); n += 5 { // cut short anywhere
		f.Add(whole[:n])
	}
	f.Add([]byte(fmt.Sprintf(`{"basis": {}, "capabilities": {"Driver": %q}}`, Name)))
	path := filepath.Join(f.TempDir(), "kvm-probe.json")
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if caps, ok := recall(path, b); ok && (!json.Valid(data) || caps.Driver != Name) {
			t.Errorf("%q is taken for %+v", data, caps)
		}
	})
}
