package server_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/store/storetest"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// The disk of the database is full: creates are refused with that reason, what
// exists goes on, and nothing is left on the host.
func TestAFullDiskIsSaid(t *testing.T) {
	disk := storetest.SmallDisk(t, 4<<20)
	t.Setenv("TMPDIR", disk) // where the rig's database is
	r := newRig(t)
	id := r.create()
	empty := storetest.Fill(t, disk)
	body := fmt.Sprintf(`{"env":{"A":%q}}`, strings.Repeat("x", 60_000))
	var d api.ErrorDetail
	have := 1
	for range 100 {
		var resp *http.Response
		if resp, d = r.send("POST", "/v1/sandboxes", body); resp.StatusCode != http.StatusCreated {
			if resp.StatusCode != http.StatusInsufficientStorage || d.Code != string(sandbox.KindNoSpace) {
				t.Fatalf("on a full disk: %d %+v", resp.StatusCode, d)
			}
			break
		}
		have++
	}
	if d.Code == "" {
		t.Fatal("the disk was never full")
	}
	if got := len(r.host.Running()); got != have {
		t.Errorf("the host has %d sandboxes, want the %d that were created", got, have)
	}
	if res, err := r.c.Exec(r.ctx(), id, api.Exec{Shell: "echo still here"}); err != nil || res.Stdout != "still here\n" {
		t.Errorf("exec on a full disk: %+v, %v", res, err)
	}
	empty()
	r.create()
	if got := len(r.host.Running()); got != have+1 {
		t.Errorf("the host has %d sandboxes, want %d", got, have+1)
	}
}
