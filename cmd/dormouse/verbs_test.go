package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

const (
	boxA = "aaaabbbbccccddddeeeeffff"
	boxB = "aaaazzzzccccddddeeeeffff"
)

func TestLs(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	f.end(f.add(boxB), sandbox.CauseTTL)
	got := ask(t, "ls")
	want := "ID                         STATE     TEMPLATE   VCPUS   MEM       AGE     EXPIRES IN\n" +
		boxA + "   running   base       1       512 MiB   1m00s   5m00s\n"
	if diff := cmp.Diff(want, noSeconds(got.out)); diff != "" || got.code != 0 {
		t.Errorf("exit status %d\n%s", got.code, diff)
	}
	if got := ask(t, "ls", "-a"); !strings.Contains(got.out, "gone") || !strings.Contains(got.out, "ttl") {
		t.Errorf("ls -a does not show the ended one and its cause: %q", got.out)
	}
	if got := ask(t, "ls", "-q"); got.out != boxA+"\n" {
		t.Errorf("ls -q: %q", got.out)
	}
	var list api.SandboxList
	if err := json.Unmarshal([]byte(ask(t, "ls", "--json").out), &list); err != nil || len(list.Sandboxes) != 1 || list.Sandboxes[0].ID != boxA {
		t.Errorf("ls --json: %+v, %v", list, err)
	}
}

func TestEmptyListsAreListsInJSON(t *testing.T) {
	newFake(t)
	if got := ask(t, "ls", "--json"); !strings.Contains(got.out, `"sandboxes": []`) {
		t.Errorf("got %q", got.out)
	}
}

func TestIDsMayBeAbbreviated(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	b := f.add(boxB)
	for name, tt := range map[string]struct {
		given string
		code  int
		says  string
	}{
		"unique":    {"aaaab", 0, boxA + " answered in 2.3 ms"},
		"whole":     {boxB, 0, boxB},
		"ambiguous": {"aaaa", 2, "2 sandboxes"},
		"too short": {"aaa", 2, "at least 4 characters"},
		"unknown":   {"qqqq", 3, "dormouse ls -a"},
		"a path":    {"../../x", 2, "not a sandbox ID"},
	} {
		t.Run(name, func(t *testing.T) {
			got := ask(t, "ping", tt.given)
			if got.code != tt.code || !strings.Contains(got.out+got.errOut, tt.says) {
				t.Errorf("got %+v, want %d and %q", got, tt.code, tt.says)
			}
		})
	}
	f.end(b, sandbox.CauseUser)
	if got := ask(t, "ping", "aaaa"); got.code != 0 {
		t.Errorf("a living sandbox does not come before an ended one: %+v", got)
	}
	if got := ask(t, "get", "aaaaz"); got.code != 0 || !strings.Contains(got.out, "user") {
		t.Errorf("an ended one is not found when it is the only one: %+v", got)
	}
}

func TestCreatePrintsTheIDAlone(t *testing.T) {
	f := newFake(t)
	got := ask(t, "create", "--vcpus", "2", "--disk", "8G", "--metadata", "job=7")
	if got.code != 0 || got.out != f.boxes[0].ID+"\n" || got.errOut != "" {
		t.Errorf("got %+v", got)
	}
	if f.lastReq.VCPUs != 2 || f.lastReq.DiskMiB != 8192 || f.lastReq.Metadata["job"] != "7" || !f.lastReq.Network.Internet {
		t.Errorf("asked for %+v", f.lastReq)
	}
}

func TestCreateRefusesNonsenseBeforeItAsks(t *testing.T) {
	f := newFake(t)
	for _, flags := range [][]string{{"--vcpus", "0"}, {"--mem", "0"}, {"--mem", "1GB"}, {"--timeout", "soon"}, {"-e", "=x"}, {"--metadata", "x"}, {"a", "b"}} {
		if got := ask(t, append([]string{"create"}, flags...)...); got.code != 2 || got.errOut == "" {
			t.Errorf("%v: %+v, want exit status 2 and a reason", flags, got)
		}
	}
	if f.creates != 0 {
		t.Errorf("%d sandboxes were made", f.creates)
	}
}

func TestRm(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	f.add(boxB)
	if got := ask(t, "rm", "aaaab", "nosuch"); got.code != 3 {
		t.Errorf("with one that does not exist: %+v", got)
	}
	if diff := cmp.Diff([]string{"running", "running"}, f.states()); diff != "" {
		t.Errorf("some went all the same: %s", diff)
	}
	if got := ask(t, "rm", "--all"); got.code != 2 || !strings.Contains(got.errOut, "nothing was destroyed") {
		t.Errorf("without an answer: %+v", got)
	}
	if got := dormouse(t, t.Context(), strings.NewReader("n\n"), "rm", "--all"); got.code != 2 {
		t.Errorf("after a no: %+v", got)
	}
	if diff := cmp.Diff([]string{"running", "running"}, f.states()); diff != "" {
		t.Errorf("some went all the same: %s", diff)
	}
	if got := dormouse(t, t.Context(), strings.NewReader("y\n"), "rm", "--all"); got.code != 0 || !strings.Contains(got.out, boxA) || !strings.Contains(got.out, boxB) {
		t.Errorf("after a yes: %+v", got)
	}
	if diff := cmp.Diff([]string{"gone", "gone"}, f.states()); diff != "" {
		t.Error(diff)
	}
	if got := ask(t, "rm", "--all", "--yes"); got.code != 0 {
		t.Errorf("of none: %+v", got)
	}
	if got := ask(t, "rm"); got.code != 2 {
		t.Errorf("without arguments: %+v", got)
	}
}

func TestTimeout(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	if got := ask(t, "timeout", boxA, "2h"); got.code != 0 || got.out != boxA+" expires in 2h00m\n" {
		t.Errorf("got %+v", got)
	}
	if got := ask(t, "timeout", "--", boxA, "-1s"); got.code != 2 || !strings.Contains(got.errOut, "at least 1s") {
		t.Errorf("a negative one: %+v", got)
	}
}

func TestCpBothWays(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	dir := t.TempDir()
	local := filepath.Join(dir, "main.py")
	if err := os.WriteFile(local, []byte("print(42)"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		line []string
		in   string
		want result
	}{
		{[]string{"cp", local, "aaaab:/tmp/"}, "", result{}},
		{[]string{"cp", local, "aaaab:/tmp"}, "", result{}},
		{[]string{"cp", "-", "aaaab:/srv/in"}, "from stdin", result{}},
		{[]string{"cp", "aaaab:/tmp/main.py", "-"}, "", result{out: "print(42)"}},
		{[]string{"cp", "aaaab:/srv/in", filepath.Join(dir, "out")}, "", result{}},
		{[]string{"cp", "aaaab:/srv/in", dir}, "", result{}},
		{[]string{"cp", "aaaab:/srv/in", "aaaab:/srv/copy"}, "", result{}},
		{[]string{"cp", "aaaab:/srv/in", "/dev/null"}, "", result{}},
	} {
		if got := dormouse(t, t.Context(), strings.NewReader(step.in), step.line...); got != step.want {
			t.Errorf("%v: %+v", step.line, got)
		}
	}
	want := map[string]string{"/tmp/main.py": "print(42)", "/srv/in": "from stdin", "/srv/copy": "from stdin"}
	if diff := cmp.Diff(want, f.files); diff != "" {
		t.Error(diff)
	}
	for _, name := range []string{"out", "in"} {
		if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != "from stdin" {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	if info, err := os.Stat(filepath.Join(dir, "out")); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("the copy's mode is %v (%v), want that of the source", info.Mode(), err)
	}
}

func TestCpRefuses(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	dir := t.TempDir()
	for name, tt := range map[string]struct {
		line []string
		code int
		says string
	}{
		"two local files":          {[]string{"a", "b"}, 2, "neither"},
		"a local directory":        {[]string{dir, "aaaab:/x"}, 2, "is a directory: copy it with -r"},
		"a directory in a sandbox": {[]string{"aaaab:/tmp", dir}, 2, "is a directory: copy it with -r"},
		"a missing local file":     {[]string{dir + "/no", "aaaab:/x"}, 3, "no such file"},
		"a missing remote file":    {[]string{"aaaab:/no", dir}, 3, "no file /no"},
		"no path":                  {[]string{"aaaab:", dir}, 2, "names no path"},
		"a stream into a folder":   {[]string{"-", "aaaab:/tmp/"}, 2, "no name"},
	} {
		t.Run(name, func(t *testing.T) {
			got := ask(t, append([]string{"cp"}, tt.line...)...)
			if got.code != tt.code || !strings.Contains(got.errOut, tt.says) {
				t.Errorf("got %+v, want %d and %q", got, tt.code, tt.says)
			}
		})
	}
}

func TestAnAbortedDownloadKeepsTheOldFile(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	local := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(local, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := ask(t, "cp", "aaaab:/gone", local); got.code != 3 {
		t.Errorf("got %+v", got)
	}
	if b, err := os.ReadFile(local); err != nil || string(b) != "old" {
		t.Errorf("the file has %q, %v", b, err)
	}
}

func TestErrorsAreOneSentenceWithTheNextStep(t *testing.T) {
	newFake(t)
	t.Setenv("DORMOUSE_API_KEY", "dm_wrong")
	if got := ask(t, "ls"); got.code != 4 || got.errOut != "dormouse: the key is wrong (check the key: dormouse login, or DORMOUSE_API_KEY)\n" {
		t.Errorf("a wrong key: %+v", got)
	}
	t.Setenv("DORMOUSE_API_KEY", "")
	if got := ask(t, "ls"); got.code != 4 || !strings.Contains(got.errOut, "no API key: run make up") {
		t.Errorf("no key: %+v", got)
	}
	t.Setenv("DORMOUSE_API_KEY", testKey)
	t.Setenv("DORMOUSE_URL", "http://127.0.0.1:1")
	if got := ask(t, "ls"); got.code != 9 || !strings.Contains(got.errOut, "make up starts it") {
		t.Errorf("no server: %+v", got)
	}
	t.Setenv("DORMOUSE_URL", "nonsense")
	if got := ask(t, "ls"); got.code != 2 {
		t.Errorf("a bad address: %+v", got)
	}
	if got := ask(t, "frobnicate"); got.code != 2 || !strings.Contains(got.errOut, "unknown command") {
		t.Errorf("an unknown verb: %+v", got)
	}
}

func TestCompletionOffersLivingSandboxes(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	f.end(f.add(boxB), sandbox.CauseUser)
	got := ask(t, "__complete", "exec", "aa")
	if !strings.HasPrefix(got.out, boxA+"\tbase running\n") || strings.Contains(got.out, boxB) {
		t.Errorf("got %q", got.out)
	}
	if got := ask(t, "__complete", "run", ""); !strings.HasPrefix(got.out, "base\n") {
		t.Errorf("got %q", got.out)
	}
}

func TestLoginWritesAPrivateConfig(t *testing.T) {
	f := newFake(t)
	dir := t.TempDir()
	t.Setenv("XDG_CONFIG_HOME", dir)
	if got := dormouse(t, t.Context(), strings.NewReader("dm_wrong\n"), "login", "--url", f.url); got.code != 4 {
		t.Errorf("a wrong key: %+v", got)
	}
	if got := ask(t, "login", "--url", f.url); got.code != 2 {
		t.Errorf("no key: %+v", got)
	}
	if got := dormouse(t, t.Context(), strings.NewReader(testKey+"\n"), "login", "--url", f.url); got.code != 0 {
		t.Fatalf("got %+v", got)
	}
	t.Setenv("DORMOUSE_URL", "")
	t.Setenv("DORMOUSE_API_KEY", "")
	c, err := loadConfig()
	if want := (config{URL: f.url, Key: testKey}); err != nil || c != want {
		t.Errorf("loaded %+v, %v", c, err)
	}
	for path, want := range map[string]os.FileMode{"dormouse": 0o700, "dormouse/config.json": 0o600} {
		if info, err := os.Stat(filepath.Join(dir, path)); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v; want mode %o", path, info.Mode(), err, want)
		}
	}
	t.Setenv("DORMOUSE_API_KEY", "dm_other")
	if c, err := loadConfig(); err != nil || c.Key != "dm_other" || c.URL != f.url {
		t.Errorf("the environment does not come first: %+v, %v", c, err)
	}
}

func TestWriteConfigForAnotherUser(t *testing.T) {
	testkit.Root(t)
	home := t.TempDir()
	path := configPathIn(home)
	const uid, gid = 4321, 4322
	for _, key := range []string{"one", "two"} { // the second replaces the first
		if err := writeConfig(path, config{URL: defaultURL, Key: key}, uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []string{filepath.Join(home, ".config"), filepath.Dir(path), path} {
		if u, g := ownerOf(t, p); u != uid || g != gid {
			t.Errorf("%s belongs to %d:%d, want %d:%d", p, u, g, uid, gid)
		}
	}
	if c, err := readConfig(path); err != nil || c.Key != "two" {
		t.Errorf("read %+v, %v", c, err)
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("left beside the config: %v, %v", entries, err)
	}
}

func TestParseMiB(t *testing.T) {
	for text, want := range map[string]int{"512": 512, "512MiB": 512, "512M": 512, "2GiB": 2048, "2 GiB": 2048, "1.5G": 1536, "1TiB": 1 << 20} {
		if got, err := parseMiB(text); err != nil || got != want {
			t.Errorf("parseMiB(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "G", "1GB", "1MB", "-1G", "0.3", "1e99", "nan", "1K", "1GiG"} {
		if got, err := parseMiB(text); err == nil {
			t.Errorf("parseMiB(%q) = %d", text, got)
		}
	}
}

func TestSpans(t *testing.T) {
	for text, want := range map[string]time.Duration{"90": 90 * time.Second, "1.5": 1500 * time.Millisecond, "2h": 2 * time.Hour, "-1s": -time.Second} {
		if got, err := parseSpan(text); err != nil || got != want {
			t.Errorf("parseSpan(%q) = %v, %v", text, got, err)
		}
	}
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 0: "0s", 59 * time.Second: "59s", 61 * time.Second: "1m01s", 90 * time.Minute: "1h30m", 25 * time.Hour: "1d01h",
	} {
		if got := span(d); got != want {
			t.Errorf("span(%v) = %q, want %q", d, got, want)
		}
	}
}

func TestTablesKeepControlCharactersFromTheTerminal(t *testing.T) {
	var b strings.Builder
	if err := table(&b, nil, [][]string{{"a\x1b[31mb\tc\u009bd", "é"}}); err != nil {
		t.Fatal(err)
	}
	if strings.ContainsAny(b.String(), "\x1b\t\u009b") || !strings.Contains(b.String(), "é") {
		t.Errorf("printed %q", b.String())
	}
}
