package disk

import (
	"math/rand/v2"
	"slices"
	"testing"
)

func TestBlocksAreRuns(t *testing.T) {
	const blocks = 300 // not a multiple of a word
	for _, tt := range []struct {
		name string
		add  [][2]int64
		want []BlockRun
	}{
		{"nothing", nil, nil},
		{"the first and the last", [][2]int64{{299, 1}, {0, 1}}, []BlockRun{{0, 1}, {299, 1}}},
		{"all of them", [][2]int64{{0, 300}}, []BlockRun{{0, 300}}},
		{"neighbours from different places", [][2]int64{{64, 64}, {60, 4}, {128, 1}}, []BlockRun{{60, 69}}},
		{"the same ones twice", [][2]int64{{10, 5}, {12, 5}}, []BlockRun{{10, 7}}},
		{"more than the disk has", [][2]int64{{-5, 6}, {290, 1000}, {400, 3}}, []BlockRun{{0, 1}, {290, 10}}},
	} {
		b := NewBlocks(blocks*BlockBytes - 1)
		for _, a := range tt.add {
			b.Add(a[0], a[1])
		}
		if got := b.Runs(); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

// TestRunsAreBounded: with too many of them the smallest gaps are filled, and no
// block is left out.
func TestRunsAreBounded(t *testing.T) {
	const blocks = 10_000
	rng := rand.New(rand.NewPCG(1, 2))
	for most := 1; most < 3000; most = most*3 + 1 {
		b := NewBlocks(blocks * BlockBytes)
		var in []int64
		for range 2000 {
			at := rng.Int64N(blocks)
			b.Add(at, 1)
			in = append(in, at)
		}
		runs := b.runs(most)
		if len(runs) > most {
			t.Fatalf("%d runs, at most %d are wanted", len(runs), most)
		}
		covered := func(at int64) bool {
			return slices.ContainsFunc(runs, func(r BlockRun) bool { return r.Start <= at && at < r.End() })
		}
		for _, at := range in {
			if !covered(at) {
				t.Fatalf("of %d runs none has block %d", len(runs), at)
			}
		}
		for i, r := range runs {
			if r.Blocks < 1 || i > 0 && r.Start <= runs[i-1].End() {
				t.Fatalf("run %d is %v behind %v", i, r, runs[i-1])
			}
		}
	}
}
