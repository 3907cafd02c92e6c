package host_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/host/server"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/vmm/vmmfake"

	"connectrpc.com/connect"
)

// TestLastWordsOfAGuest: a guest chooses the text of the kernel panic that it
// ends with. Whatever it is, the host can still say what it has: one that could
// not be encoded would cut control off from every other sandbox of the host.
func TestLastWordsOfAGuest(t *testing.T) {
	for name, words := range map[string]string{
		"no UTF-8":         "kernel panic: \xff\xfe",
		"orders":           "kernel panic: \x1b]0;owned\x07\x1b[2J",
		"cut in two":       "a" + strings.Repeat("€", 2000),
		"half a character": strings.Repeat("\xe2\x82", 3000),
		"a megabyte":       strings.Repeat("\x01\"", 1<<20),
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			panics := make(chan struct{})
			r.vms.Driver = vmmfake.New(func(ctx context.Context, m vmmfake.Inside) error {
				inner, cancel := context.WithCancel(ctx)
				defer cancel()
				go func() { <-panics; cancel() }()
				_ = r.guest(inner, m) // ends with inner
				return errors.New(words)
			})
			agent := r.open()
			id, other := r.mustCreate(), r.mustCreate()
			close(panics)
			testkit.Eventually(t, 5*time.Second, "both have ended", func() bool {
				return r.status(id).State == "ended" && r.status(other).State == "ended"
			})
			detail := r.status(id).Detail
			if !utf8.ValidString(detail) || strings.ContainsAny(detail, "\x1b\x07\x01") || len(detail) > 4100 {
				t.Errorf("the detail has %d bytes: %.200q", len(detail), detail)
			}
			_, handler := server.New(agent)
			local := hostapi.NewLocal(handler)
			defer func() { _ = local.Close() }() // the test's own
			list, err := hostapi.NewClient(local.Client(), local.BaseURL()).ListSandboxes(t.Context(), connect.NewRequest(&hostv1.ListSandboxesRequest{}))
			if err != nil || len(list.Msg.GetSandboxes()) != 2 {
				t.Fatalf("list: %v, %v", list, err)
			}
		})
	}
}
