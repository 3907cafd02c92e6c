package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// overSSH is a command line of ours that somebody runs through ssh: a server that
// speaks with its client through two pipes, and listens nowhere.
func overSSH(t *testing.T, line string) *exec.Cmd {
	t.Helper()
	testkit.Tool(t, "ssh")
	testkit.Tool(t, "sshd")
	testkit.Tool(t, "ssh-keygen")
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	sshd, err := exec.LookPath("sshd")
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, key := range []string{"host", "client"} {
		if out, err := exec.CommandContext(t.Context(), "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, key)).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	config := fmt.Sprintf("HostKey %s/host\nAuthorizedKeysFile %s/client.pub\nStrictModes no\nUsePAM no\nPermitRootLogin yes\nPidFile none\n", dir, dir)
	if err := os.WriteFile(filepath.Join(dir, "config"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if log, err := os.ReadFile(filepath.Join(dir, "log")); t.Failed() {
			t.Logf("sshd: %s (%v)", log, err)
		}
	})
	vars := ""
	for _, name := range []string{"DORMOUSE_URL", "DORMOUSE_API_KEY", "XDG_CONFIG_HOME"} {
		vars += name + "=" + os.Getenv(name) + " "
	}
	return exec.CommandContext(t.Context(), "ssh", "-tt", "-q", "-F", "none", "-i", filepath.Join(dir, "client"),
		"-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
		"-o", fmt.Sprintf("ProxyCommand=%s -i -e -f %s/config 2>>%s/log", sshd, dir, dir),
		me.Username+"@sandbox.test", vars+asCommand+"=1 exec "+self+" "+line)
}

// TestOverSSH: keys, sizes and the status come through two terminals, and whoever
// loses his connection leaves nothing running.
func TestOverSSH(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	sizes := make(chan api.TerminalSize, 10)
	gone := make(chan struct{})
	f.inTerminal(func(ctx context.Context, p *fakeTerminal) (int, string) {
		p.show(ctx, fmt.Sprint("size ", *p.first.Size, " "))
		if len(p.first.Exec.Command) == 0 {
			<-ctx.Done()
			close(gone)
			return 0, ""
		}
		sizes <- <-p.sizes
		p.show(ctx, fmt.Sprintf("typed %q", p.read(4)))
		return 42, "exit status 42"
	})
	w := windowFor(t, 23, 4, overSSH(t, "exec -it aaaab -- vi")).start()
	w.await("size {23 4}")
	w.resize(17, 3)
	if got := <-sizes; got != (api.TerminalSize{Cols: 17, Rows: 3}) {
		t.Errorf("resized to %v", got)
	}
	w.press("a\x03\x1a\r")
	w.await(`typed "a\x03\x1a\r"`)
	w.ends(42)

	w = windowFor(t, 80, 24, overSSH(t, "exec -it aaaab")).start()
	w.await("size {80 24}")
	if err := w.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-gone
	if got := statusOf(t, w.cmd.Wait()); got != -1 {
		t.Errorf("ssh ended with %d: %s", got, strings.TrimSpace(w.screen()))
	}
}
