package past

import "testing"

// TestLinesOfTheTable: what may lead to another machine, and what cannot be read.
func TestLinesOfTheTable(t *testing.T) {
	const rest = " 00000000:00000000 00:00000000 00000000     0        0 1 1 0000000000000000 100 0 0 10 0"
	for _, tt := range []struct {
		line  string
		leads bool
	}{
		{"   0: 00000000:1F90 00000000:0000 0A" + rest, false},
		{"   1: 0200090A:9C40 0100090A:0050 01" + rest, true},
		{"   2: 0200090A:9C40 0100090A:0050 02" + rest, true},
		{"   3: 0200090A:9C40 0100090A:0050 06" + rest, false},
		{"   4: 0200090A:9C40 0100090A:0050 07" + rest, false},
		{"   5: 0200090A:C33F 0100090A:0050 01" + rest, false}, // the spared port
		{"   6: 0100007F:9C40 0100007F:1F90 01" + rest, true},  // netlink says that it is our own
		{"   7: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A" + rest, false},
		{"   8: 0000000000000000FFFF00000200090A:1F90 0000000000000000FFFF00000100090A:9C40 01" + rest, true},
		{"   9: 0200090A 0100090A:0050 01" + rest, true},
		{"  10: 0200090A:9C40 0100090A:0050", true},
		{"  11: 0200090A:x 0100090A:0050 01" + rest, true},
		{"", true},
	} {
		if got := lineLeads(tt.line, 49983); got != tt.leads {
			t.Errorf("%q: %v", tt.line, got)
		}
	}
	if noneLeadsIn("/proc/no-such-table", 49983) {
		t.Error("a table that is not there says that none leads")
	}
}
