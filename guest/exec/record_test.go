package exec_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	processv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
	"github.com/dormouse-sandbox/dormouse/guest/guesttest"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// startRecorded starts a line whose output is to be kept, and leaves.
func startRecorded(t *testing.T, g *guesttest.Guest, name, line string) error {
	t.Helper()
	req := connect.NewRequest(guesttest.Shell(line))
	req.Header().Set(guestapi.HeaderRecord, name)
	stream, err := g.Process.Start(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stream.Close() }() // the process goes on
	if !stream.Receive() {
		return stream.Err()
	}
	return nil
}

// TestRecordOfAProcessThatNobodyFollows: all that it says is kept from its first
// byte to its end, also when its starter has left.
func TestRecordOfAProcessThatNobodyFollows(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "records")
	g := guesttest.Start(t, guesttest.Options{Records: dir})
	gate := filepath.Join(t.TempDir(), "gate")
	if err := startRecorded(t, g, "start", "echo one; echo two >&2; while [ ! -e "+gate+" ]; do sleep 0.01; done; echo three; exit 3"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var text string
	testkit.Eventually(t, 30*time.Second, "at the end", func() bool {
		data, _ := os.ReadFile(filepath.Join(dir, "start.log"))
		text = string(data)
		return strings.Contains(text, "[")
	})
	// Two pipes have no order between them.
	if text != "one\nthree\ntwo\n[exit status 3]\n" && text != "one\ntwo\nthree\n[exit status 3]\n" && text != "two\none\nthree\n[exit status 3]\n" {
		t.Errorf("kept: %q", text)
	}
}

// TestRecordIsBounded: of an endless producer the newest is there, and it is not
// held up.
func TestRecordIsBounded(t *testing.T) {
	dir := t.TempDir()
	g := guesttest.Start(t, guesttest.Options{Records: dir})
	if err := startRecorded(t, g, "much", `i=0; while [ $i -lt 3000 ]; do echo "$i `+strings.Repeat("x", 300)+`"; i=$((i+1)); done`); err != nil {
		t.Fatal(err)
	}
	var newest []byte
	testkit.Eventually(t, time.Minute, "at the end", func() bool {
		newest, _ = os.ReadFile(filepath.Join(dir, "much.log"))
		return strings.HasSuffix(string(newest), "[exit status 0]\n")
	})
	older, err := os.ReadFile(filepath.Join(dir, "much.log.1"))
	if err != nil || len(newest)+len(older) > 512<<10 || len(older) == 0 {
		t.Errorf("%d and %d bytes are kept, %v", len(newest), len(older), err)
	}
	if all := string(older) + string(newest); !strings.Contains(all, "\n2999 xxx") || strings.Contains(all, "\n5 xxx") {
		t.Error("what is kept is not the newest")
	}
}

func TestRecordNeedsAName(t *testing.T) {
	dir := t.TempDir()
	g := guesttest.Start(t, guesttest.Options{Records: dir})
	if err := startRecorded(t, g, "../up", "echo x"); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("a name that leads up: %v", err)
	}
	if err := startRecorded(t, g, "", "echo x"); err != nil {
		t.Error(err)
	}
	mustRun(t, g, &processv1.StartRequest{Process: &processv1.ProcessConfig{Cmd: "/bin/true"}})
	if kept, err := os.ReadDir(dir); err != nil || len(kept) > 0 {
		t.Errorf("kept without a name: %v, %v", kept, err)
	}
}
