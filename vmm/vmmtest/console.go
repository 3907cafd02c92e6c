package vmmtest

import (
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

func consoleOffsets(t *testing.T, h Harness) {
	m := start(t, h, h.Driver(t), Hold)
	booted(t, h, m)
	whole := console(t, m)
	var parts strings.Builder
	for offset := int64(0); offset < int64(len(whole)); {
		data, next, err := m.Console(offset, 7)
		if err != nil || len(data) == 0 || len(data) > 7 || next != offset+int64(len(data)) {
			t.Fatalf("at %d: %d bytes, next %d, %v", offset, len(data), next, err)
		}
		parts.Write(data)
		offset = next
	}
	if !strings.HasPrefix(parts.String(), whole) {
		t.Errorf("in pieces it reads otherwise:\n%q\n%q", parts.String(), whole)
	}
	for _, tt := range []struct {
		offset int64
		limit  int
		want   int
	}{{-5, 100, 5}, {-5, 3, 3}, {1 << 40, 100, 0}, {0, 0, 0}, {0, -1, 0}} {
		data, next, err := m.Console(tt.offset, tt.limit)
		if err != nil || len(data) != tt.want || next < int64(len(data)) || next > int64(len(whole))+4096 {
			t.Errorf("Console(%d, %d): %d bytes, next %d, %v; want %d bytes", tt.offset, tt.limit, len(data), next, err, tt.want)
		}
	}
	if data, _, err := m.Console(-1<<40, 4<<20); err != nil || !strings.HasPrefix(string(data), whole) {
		t.Errorf("from before the start: %d bytes, %v", len(data), err)
	}
}

func consoleBounded(t *testing.T, h Harness) {
	m := start(t, h, h.Driver(t), Count)
	shows(t, h, m, "line ")
	enough := int64(3 * h.ConsoleKeep)
	testkit.Eventually(t, 2*h.BootLimit, "past three times what is kept", func() bool {
		_, next, err := m.Console(1<<62, 0)
		return err == nil && next > enough
	})
	data, next, err := m.Console(0, 1<<30)
	if err != nil || len(data) > h.ConsoleKeep || len(data) < h.ConsoleKeep/2 || next < enough {
		t.Errorf("kept %d bytes up to %d, %v; want about %d", len(data), next, err, h.ConsoleKeep)
	}
	if strings.Contains(string(data), "\x00") || !strings.Contains(string(data), "line ") {
		t.Error("what is kept has holes")
	}
	if h.ConsoleDisk == nil {
		return
	}
	// The log is trimmed once a second; a full second of output may be there.
	testkit.Eventually(t, h.BootLimit, "trimmed on disk", func() bool {
		return h.ConsoleDisk(t, m.Record()) < int64(2*h.ConsoleKeep)
	})
}
