package kernel

import "testing"

func TestNonsenseFrequenciesAreRefused(t *testing.T) {
	const ms = int64(1e6)
	for _, tt := range []struct {
		name    string
		a, b, c sample
		want    int
	}{
		{"an even counter", sample{0, 0}, sample{200e6, 100 * ms}, sample{400e6, 200 * ms}, 2_000_000},
		{"a counter that stands still", sample{5, 0}, sample{5, 100 * ms}, sample{5, 200 * ms}, 0},
		{"a counter that runs backwards", sample{900, 0}, sample{500, 100 * ms}, sample{100, 200 * ms}, 0},
		{"a counter that changes its pace", sample{0, 0}, sample{200e6, 100 * ms}, sample{500e6, 200 * ms}, 0},
		{"a clock that stands still", sample{0, 0}, sample{200e6, 0}, sample{400e6, 0}, 0},
	} {
		got, err := khzOf(tt.a, tt.b, tt.c)
		if got != tt.want || (err == nil) != (tt.want != 0) {
			t.Errorf("%s: %d, %v; want %d", tt.name, got, err, tt.want)
		}
	}
}

func TestStatLinesThatAreCutShort(t *testing.T) {
	for _, line := range []string{"", "1 (x", "1 (x) S 1 2", "1 (x) S y 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20"} {
		if _, err := parseStat(line); err == nil {
			t.Errorf("%q was understood", line)
		}
	}
}
