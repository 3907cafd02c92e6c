package place_test

import (
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/control/place"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func TestChoose(t *testing.T) {
	small := place.Host{Name: "small", MemTotalMiB: 1024, MemCommittedMiB: 0, MaxSandboxes: 10}
	large := place.Host{Name: "large", MemTotalMiB: 8192, MemCommittedMiB: 7000, Sandboxes: 3, MaxSandboxes: 10}
	full := place.Host{Name: "full", MemTotalMiB: 8192, Sandboxes: 10, MaxSandboxes: 10}
	for _, tt := range []struct {
		name  string
		hosts []place.Host
		mem   int
		want  string
		kind  sandbox.Kind
		says  string
	}{
		{"the one with most left", []place.Host{small, large}, 512, "large", "", ""},
		{"the one where it fits", []place.Host{small, large}, 1100, "large", "", ""},
		{"exactly", []place.Host{small}, 1024, "small", "", ""},
		{"never", []place.Host{small, large}, 9000, "", sandbox.KindInvalid, "mem_mib is 9000, the host has 8192 MiB"},
		{"not now", []place.Host{small, large}, 2000, "", sandbox.KindBusy, "mem_mib is 2000, but 7000 of the host's 8192 MiB"},
		{"too many", []place.Host{full}, 512, "", sandbox.KindBusy, "runs 10 sandboxes, its limit is 10"},
		{"room elsewhere", []place.Host{full, small}, 512, "small", "", ""},
		{"nobody there", nil, 512, "", sandbox.KindTransient, "no host answers"},
	} {
		got, err := place.Choose(tt.hosts, sandbox.Spec{MemMiB: tt.mem})
		if got.Name != tt.want || (tt.kind == "") != (err == nil) {
			t.Errorf("%s: %q, %v", tt.name, got.Name, err)
		}
		if err != nil && (sandbox.KindOf(err) != tt.kind || !strings.Contains(err.Error(), tt.says)) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}
