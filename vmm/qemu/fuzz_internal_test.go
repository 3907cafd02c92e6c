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
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/sandbox"
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

// FuzzJudge: a guest chooses the text of its console, and a QEMU that it has taken
// over what stands in QEMU's own log. The verdict has a known cause all the same,
// and only a guest that ended by itself is believed.
func FuzzJudge(f *testing.F) {
	f.Add("guest-reset", "Kernel panic - not syncing: Out of memory\r\n", "qemu: hello\n", false)
	f.Add("", "Kernel panic - not syncing: \xff", "\x00\n\n", true)
	f.Add("host-qmp-quit", "", "", false)
	f.Add("guest-shutdown", "", "\n", true)
	f.Fuzz(func(t *testing.T, shutdown, console, log string, known bool) {
		cause, detail := judge(evidence{shutdown: shutdown, console: console, log: log, status: kernel.Status{Known: known, Signal: 9}})
		if !cause.Valid() || detail == "" {
			t.Errorf("cause %q, detail %q", cause, detail)
		}
		if cause == sandbox.CauseOOMGuest && !strings.HasPrefix(shutdown, "guest-") {
			t.Error("the console alone was believed")
		}
		if said := oneLine(log); strings.ContainsAny(said, "\n") || !utf8.ValidString(said) {
			t.Errorf("one line: %q", said)
		}
	})
}

// FuzzDirOf: every process on the machine chooses its command line; ours says
// exactly the directory that it was given.
func FuzzDirOf(f *testing.F) {
	f.Add("/run/dormouse-abcde/x", []byte("sh\x00-c\x00,opaque=dormouse:/"))
	f.Add("/a,,b,opaque=dormouse:/c", []byte(",opaque="))
	f.Fuzz(func(t *testing.T, dir string, cmdline []byte) {
		_, _ = dirOf(cmdline) // must return, whatever it says
		if !filepath.IsAbs(dir) || strings.ContainsRune(dir, 0) {
			return
		}
		got, ok := dirOf([]byte("qemu\x00-add-fd\x00fd=3,set=1,opaque=" + tag(dir) + "\x00-x\x00"))
		if want := resolve(dir); !ok || got != want {
			t.Errorf("%q is found as %q", want, got)
		}
	})
}
