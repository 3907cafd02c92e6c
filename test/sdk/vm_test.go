package sdk_test

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/test/rig"
)

// common is the server of the tests with a VM.
var common = rig.NewShared(rig.Options{})

func TestMain(m *testing.M) {
	code := m.Run()
	if !common.Close() {
		code = 1
	}
	rig.RemoveBinaries()
	os.Exit(code)
}

// emulated is how much longer things may take in a VM under software emulation,
// on a machine with other work.
const emulated = 5

// agentInVM is the agent of a sandbox, reached as everybody reaches it: through the
// API's proxy to its ports, with a token for these. What the agent wants besides
// is known to the host alone.
func agentInVM(t *testing.T) peer {
	t.Helper()
	w := common.For(t)
	ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience(5*time.Minute))
	defer cancel()
	seconds := (3 * time.Hour).Seconds()
	box, err := w.Client.CreateSandbox(ctx, api.CreateSandbox{MemMiB: 1024, VCPUs: 2, TimeoutSeconds: &seconds}, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience(time.Minute))
		defer cancel()
		if _, err := w.Client.Delete(ctx, box.ID); err != nil {
			t.Error(err)
		}
	})
	port, err := w.Client.OpenPort(ctx, box.ID, api.OpenPort{Port: guestapi.Port})
	if err != nil {
		t.Fatal(err)
	}
	at, err := url.Parse(w.URL + "/v1/sandboxes/" + box.ID + "/ports/49983")
	if err != nil {
		t.Fatal(err)
	}
	return peer{
		url: at, dir: "/tmp/sdk", patience: emulated,
		header: http.Header{api.HeaderToken: {port.Token}, guestapi.HeaderToken: {tokenOf(t, w.Data, box.ID)}},
	}
}

// tokenOf reads the token of a sandbox's agent where the host keeps it.
func tokenOf(t *testing.T, data, id string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(data, "host", "journal", id+".json"))
	var entry struct{ Token string }
	if err == nil {
		err = json.Unmarshal(text, &entry)
	}
	if err != nil || entry.Token == "" {
		t.Fatalf("the token of %s: %q, %v", id, entry.Token, err)
	}
	return entry.Token
}

func TestJavaScriptInsideAVM(t *testing.T) {
	needNode(t)
	runJavaScript(t, agentInVM(t))
}

func TestPythonInsideAVM(t *testing.T) {
	needPython(t)
	runPython(t, agentInVM(t))
}
