package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// TestDeadlineFires: a sandbox ends when its time is up, though it is busy, and
// says so afterwards; TestTimeoutExtends: unless somebody gives it more.
func TestDeadlineFires(t *testing.T) {
	w := shared(t)
	req, seconds := small(), 4.0
	req.TimeoutSeconds = &seconds
	s := w.create(req)
	if s.Deadline == nil {
		t.Fatal("a sandbox without a deadline")
	}
	start := time.Now()
	_, err := w.Client.Exec(within(t, time.Minute), s.ID, api.Exec{Command: []string{"sleep", "600"}})
	if !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(fmt.Sprint(err), "ttl") {
		t.Errorf("the exec that the end cut: %v", err)
	}
	cut := time.Since(start)
	end := w.await(s.ID, time.Minute)
	if end.State != string(sandbox.Gone) || end.Cause != string(sandbox.CauseTTL) || end.EndedAt == nil {
		t.Fatalf("its end: %+v", end)
	}
	late := end.EndedAt.Sub(*s.Deadline)
	if late < 0 || late > 15*time.Second {
		t.Errorf("it ended %v after its deadline", late)
	}
	t.Logf("timeout_seconds 4: ended with cause ttl %v after its deadline, the exec under way after %v with %q", late, cut, err)
}

func TestTimeoutExtends(t *testing.T) {
	w := shared(t)
	req, seconds := small(), 8.0
	req.TimeoutSeconds = &seconds
	s := w.create(req)
	longer, err := w.Client.SetTimeout(within(t, time.Minute), s.ID, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if longer.Deadline == nil || longer.Deadline.Before(s.Deadline.Add(50*time.Minute)) {
		t.Errorf("the new deadline is %v, it was %v", longer.Deadline, s.Deadline)
	}
	time.Sleep(time.Until(s.Deadline.Add(time.Second))) // past the old one: nothing is to happen, so nothing can be waited for
	if got := w.sh(s.ID, "echo alive"); got != "alive" {
		t.Errorf("after its first deadline: %q", got)
	}
	if _, err := w.Client.SetTimeout(within(t, time.Minute), s.ID, time.Second); err != nil {
		t.Fatal(err)
	}
	end := w.await(s.ID, time.Minute)
	if end.Cause != string(sandbox.CauseTTL) {
		t.Errorf("its end: %+v", end)
	}
	t.Logf("it outlived its first deadline, and ended %v after a shorter one", end.EndedAt.Sub(*end.Deadline))
}

// TestLogs: the console can be read, and read on, during life and after the end.
func TestLogs(t *testing.T) {
	w := shared(t)
	id := w.create(small()).ID
	first, next, err := w.Client.Logs(within(t, time.Minute), id, client.LogOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(first) == 0 || uint64(len(first)) != next {
		t.Fatalf("the console has %d bytes, the next are at %d", len(first), next)
	}
	w.root(id, "echo a squirrel is no dormouse >/dev/console")
	var more []byte
	testkit.Eventually(t, 10*time.Second, "seeing the new line", func() bool {
		data, after, err := w.Client.Logs(within(t, time.Minute), id, client.LogOptions{Offset: next})
		if err != nil {
			t.Fatal(err)
		}
		next, more = after, append(more, data...)
		return bytes.Contains(more, []byte("a squirrel is no dormouse"))
	})
	w.destroy(id)
	all, _, err := w.Client.Logs(within(t, time.Minute), id, client.LogOptions{})
	if err != nil || !bytes.HasPrefix(all, append(first, more...)) {
		t.Errorf("after the end the console has %d bytes, %v", len(all), err)
	}
	tail, _, err := w.Client.Logs(within(t, time.Minute), id, client.LogOptions{TailBytes: 20})
	if err != nil || len(tail) != 20 || !bytes.HasSuffix(all, tail) {
		t.Errorf("its last 20 bytes are %q, %v", tail, err)
	}
	t.Logf("%d bytes of console during life, %d after the end", len(first)+len(more), len(all))
}

// TestMetrics: what a sandbox uses, and what Prometheus sees of the server.
func TestMetrics(t *testing.T) {
	w := shared(t)
	id := w.box()
	m, err := w.Client.Metrics(within(t, time.Minute), id)
	if err != nil {
		t.Fatal(err)
	}
	const mib = 1 << 20
	if m.CPUCount != 1 || m.MemTotalBytes < 600*mib || m.MemTotalBytes > 768*mib || m.MemUsedBytes == 0 || m.MemUsedBytes > m.MemTotalBytes ||
		m.DiskTotalBytes < 6<<30 || m.DiskTotalBytes > 8<<30 || m.DiskUsedBytes == 0 || m.HostRSSBytes < 32*mib || m.HostOverlayBytes == 0 ||
		time.Since(m.At).Abs() > time.Minute {
		t.Errorf("metrics of a sandbox with 768 MiB and a disk of 8 GiB: %+v", m)
	}
	text := w.prometheus()
	for _, name := range []string{
		"go_goroutines ", "process_open_fds ", "process_resident_memory_bytes ", "dormouse_http_requests_total{", "dormouse_create_seconds_count ",
		`dormouse_sandboxes{state="running"} `, "dormouse_exec_streams ",
	} {
		if !strings.Contains(text, "\n"+name) {
			t.Errorf("/metrics has no %q", name)
		}
	}
	t.Logf("metrics: memory %d of %d MiB, disk %d of %d MiB, on the host %d MiB resident and %d MiB of disk",
		m.MemUsedBytes/mib, m.MemTotalBytes/mib, m.DiskUsedBytes/mib, m.DiskTotalBytes/mib, m.HostRSSBytes/mib, m.HostOverlayBytes/mib)
}

func TestPing(t *testing.T) {
	w := shared(t)
	p, err := w.Client.Ping(within(t, time.Minute), w.box())
	if err != nil {
		t.Fatal(err)
	}
	if p.Millis <= 0 || p.Millis > 10_000 {
		t.Errorf("a ping took %v ms", p.Millis)
	}
	t.Logf("ping: %v ms", p.Millis)
}

// TestListFilters: pages, and filters by state, template and metadata.
func TestListFilters(t *testing.T) {
	w := shared(t)
	mark := fmt.Sprint("list-", time.Now().UnixNano())
	var ids []string
	for i := range 3 {
		req := small()
		req.Metadata = map[string]string{"mark": mark, "odd": fmt.Sprint(i%2 == 1)}
		ids = append(ids, w.create(req).ID)
	}
	w.destroy(ids[0])
	list := func(o client.ListOptions) (got []string) {
		t.Helper()
		for s, err := range w.Client.Sandboxes(within(t, time.Minute), o) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, s.ID)
		}
		return got
	}
	marked := map[string]string{"mark": mark}
	for _, tt := range []struct {
		name string
		opts client.ListOptions
		want []string // newest first
	}{
		{"those that live", client.ListOptions{Metadata: marked}, []string{ids[2], ids[1]}},
		{"all", client.ListOptions{Metadata: marked, All: true}, []string{ids[2], ids[1], ids[0]}},
		{"all, a page each", client.ListOptions{Metadata: marked, All: true, Limit: 1}, []string{ids[2], ids[1], ids[0]}},
		{"the ended", client.ListOptions{Metadata: marked, States: []string{"gone", "failed"}}, []string{ids[0]}},
		{"by two labels", client.ListOptions{Metadata: map[string]string{"mark": mark, "odd": "true"}}, []string{ids[1]}},
		{"by template", client.ListOptions{Metadata: marked, Template: "base"}, []string{ids[2], ids[1]}},
		{"by another template", client.ListOptions{Metadata: marked, Template: "other"}, nil},
	} {
		if got := list(tt.opts); fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
	for what, o := range map[string]client.ListOptions{
		"a made-up cursor": {Cursor: "bm9uc2Vuc2U"}, "a made-up state": {States: []string{"asleep"}},
		"a page of 1001": {Limit: 1001}, "a template that climbs": {Template: "../base"},
	} {
		if _, err := w.Client.List(within(t, time.Minute), o); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("%s: %v, want an error of kind invalid", what, err)
		}
	}
}

// TestIdempotentCreate: creates with the same key, one after the other and at
// the same time, make one sandbox.
func TestIdempotentCreate(t *testing.T) {
	w := shared(t)
	key := fmt.Sprint("idem-", time.Now().UnixNano())
	ids := make([]string, 5)
	before := len(w.VMs())
	var creates errgroup.Group
	for i := range ids {
		creates.Go(func() error {
			s, err := w.Client.CreateSandbox(within(t, 3*time.Minute), small(), key)
			ids[i] = s.ID
			return err
		})
	}
	if err := creates.Wait(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.destroy(ids[0]) })
	again, err := w.Client.CreateSandbox(within(t, time.Minute), small(), key)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range append(ids, again.ID) {
		if id != ids[0] {
			t.Errorf("the same key made %s and %s", ids[0], id)
		}
	}
	if n := len(w.VMs()) - before; n != 1 {
		t.Errorf("%d VMs were started, want 1", n)
	}
	other := small()
	other.MemMiB = 300
	_, err = w.Client.CreateSandbox(within(t, time.Minute), other, key)
	if !sandbox.Is(err, sandbox.KindConflict) {
		t.Errorf("the same key with another body: %v, want a conflict", err)
	}
	t.Logf("6 creates with one key made 1 sandbox; with another body: %v", err)
}

// TestKeys: a key works from its creation to its deletion, and not after.
func TestKeys(t *testing.T) {
	w := shared(t)
	ctx := within(t, time.Minute)
	key, err := w.Client.CreateKey(ctx, "e2e")
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := client.New(client.Config{BaseURL: w.URL, Key: key.Secret})
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.CloseIdle()
	if _, err := theirs.Host(ctx); err != nil {
		t.Errorf("a new key: %v", err)
	}
	keys, err := theirs.Keys(ctx)
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, k := range keys {
		if k.Secret != "" {
			t.Errorf("the list shows the secret of %s", k.ID)
		}
		found = found || k.ID == key.ID && strings.HasPrefix(key.Secret, k.Prefix)
	}
	if !found {
		t.Errorf("the new key is not in the list: %+v", keys)
	}
	if err := theirs.DeleteKey(ctx, key.ID); !sandbox.Is(err, sandbox.KindConflict) {
		t.Errorf("a key that deletes itself: %v, want a conflict", err)
	}
	if err := w.Client.DeleteKey(ctx, key.ID); err != nil {
		t.Fatal(err)
	}
	_, err = theirs.Host(ctx)
	var answer *client.Error
	if !errors.As(err, &answer) || answer.Status != 401 {
		t.Errorf("a key right after its deletion: %v", err)
	}
	if left := strings.Count(w.Log(), key.Secret); left != 0 {
		t.Errorf("the server's log has the key %d times", left)
	}
}
