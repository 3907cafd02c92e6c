// Package api_test lets Schemathesis, which knows nothing of our code, compare a
// live server with its OpenAPI description: thousands of requests that the
// description allows, and thousands that it does not.
package api_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/test/rig"
)

func TestMain(m *testing.M) {
	code := m.Run()
	rig.RemoveBinaries()
	os.Exit(code)
}

// pinned is the version that the results below are of.
const pinned = "4.32.5"

// config names what OpenAPI cannot say, and what this program takes for wrong: a
// cursor is one that a list has returned, of two parameters only one may be given,
// an image has to be named where it is the source, a path may lead to something
// else than is wanted, a command may not be there, 1.0 is no whole number to us,
// and in a query everything is a string.
const config = `
[[operations]]
include-operation-id = ["listSandboxes", "logs", "openPort", "createSandbox", "fork", "buildTemplate", "exec", "listDir", "readFile", "readTree", "statFile", "writeFile", "makeDir", "moveFile", "removeFile"]
checks.positive_data_acceptance.enabled = false

[[operations]] # what a server in a sandbox answers is its own affair
include-path-regex = "/ports/.port./"
checks.not_a_server_error.enabled = false

[[operations]]
include-operation-id = "listSandboxes"
checks.negative_data_rejection.enabled = false
`

// schemathesis finds the program, or installs it into a folder of its own.
func schemathesis(t *testing.T) string {
	t.Helper()
	testkit.Tool(t, "python3")
	cache, err := os.UserCacheDir()
	testkit.Require(t, "schemathesis", err == nil, "no folder for caches")
	dir := filepath.Join(cache, "dormouse", "schemathesis-"+pinned)
	program := filepath.Join(dir, "bin", "schemathesis")
	if _, err := os.Stat(program); err == nil {
		return program
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	for _, argv := range [][]string{
		{"python3", "-m", "venv", "--clear", dir},
		{filepath.Join(dir, "bin", "pip"), "install", "--quiet", "--disable-pip-version-check", "schemathesis==" + pinned},
	} {
		out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
		if err != nil {
			_ = os.RemoveAll(dir) // half of it is worse than nothing
		}
		testkit.Require(t, "schemathesis", err == nil, fmt.Sprintf("%s: %v: %.300s", strings.Join(argv, " "), err, out))
	}
	return program
}

// TestServerIsWhatItsDescriptionSays, within a few minutes.
func TestServerIsWhatItsDescriptionSays(t *testing.T) {
	testkit.Long(t, "it sends thousands of requests")
	program := schemathesis(t)
	// Room for two sandboxes: creates beyond are refused, which is an answer, too.
	s := rig.Start(t, rig.Options{Args: []string{"--max-mem", "800"}})
	seconds := time.Hour.Seconds()
	box, err := s.Client.CreateSandbox(t.Context(), api.CreateSandbox{MemMiB: 256, TimeoutSeconds: &seconds}, "")
	if err != nil {
		t.Fatal(err)
	}
	const proxied = `/ports/\{port\}/`
	for name, args := range map[string][]string{
		// Streams are WebSockets, or do not end.
		"the API": {
			"--max-time", "150", "--exclude-path-regex", proxied, "--exclude-operation-id", "execStream", "--exclude-operation-id", "pty",
			"--exclude-operation-id", "portTCP", "--exclude-operation-id", "watchFiles",
			"--exclude-operation-id", "writeTree", // it cannot make tar files
		},
		"the proxy": {"--max-time", "30", "--include-path-regex", proxied},
	} {
		t.Run(name, func(t *testing.T) { run(t, program, s, args) })
	}
	if _, err := s.Client.Health(t.Context()); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	if text := s.Log(); strings.Contains(text, "level=ERROR") || strings.Contains(text, "panic") {
		t.Errorf("the server's log has errors in it:\n%.4000s", errorLines(text))
	}
	_, _ = s.Client.Delete(t.Context(), box.ID) // a request may have done so
}

func errorLines(text string) string {
	var out []string
	for line := range strings.SplitSeq(text, "\n") {
		if strings.Contains(line, "level=ERROR") || strings.Contains(line, "panic") {
			out = append(out, line)
		}
	}
	return strings.Join(out, "\n")
}

func run(t *testing.T, program string, s *rig.Server, args []string) {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "schemathesis.toml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	argv := append([]string{
		"--config-file", file, "run", s.URL + "/openapi.json", "--header", "Authorization: Bearer " + s.Key(),
		"--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--request-timeout", "120", "--seed", "1", "--no-color",
	}, args...)
	cmd := exec.CommandContext(ctx, program, argv...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("schemathesis: %v\n%s", err, out)
		return
	}
	t.Logf("%s", out[max(0, len(out)-1500):])
}
