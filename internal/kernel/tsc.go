package kernel

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// What a processor's counter can plausibly run at, and how far the two halves
// of a measurement may lie apart.
const (
	minTSCkHz    = 100_000
	maxTSCkHz    = 10_000_000
	maxTSCSpread = 0.002
	tscHalf      = 100 * time.Millisecond
)

// TSCkHz is the frequency of this machine's time-stamp counter in kHz, measured
// once per process against CLOCK_MONOTONIC for 200 ms. A guest under software
// emulation sees that counter and has nothing else to calibrate it with. The
// two halves of the measurement must agree, and the value must be one that
// processors have; otherwise it is an error.
var TSCkHz = sync.OnceValues(measureTSC)

func measureTSC() (int, error) {
	for range 3 { // a busy machine may spoil one measurement
		khz, err := tryTSC()
		if err == nil || !errors.Is(err, errUnsteady) {
			return khz, err
		}
	}
	return 0, errUnsteady
}

var errUnsteady = errors.New("the time-stamp counter does not run evenly")

func tryTSC() (int, error) {
	var s [3]sample
	for i := range s {
		if i > 0 {
			time.Sleep(tscHalf)
		}
		var err error
		if s[i], err = takeSample(); err != nil {
			return 0, err
		}
	}
	return khzOf(s[0], s[1], s[2])
}

// khzOf computes the frequency from three samples, or says why they are nonsense.
func khzOf(a, b, c sample) (int, error) {
	first, second, whole := rate(a, b), rate(b, c), rate(a, c)
	if whole < minTSCkHz || whole > maxTSCkHz {
		return 0, fmt.Errorf("the time-stamp counter runs at %.0f kHz, which no processor does", whole)
	}
	if spread := (first - second) / whole; spread > maxTSCSpread || spread < -maxTSCSpread {
		return 0, errUnsteady
	}
	return int(whole + 0.5), nil
}

// sample is the counter and the clock at the same instant.
type sample struct {
	tsc   uint64
	nanos int64
}

// rate is in kHz: cycles per millisecond.
func rate(a, b sample) float64 {
	return float64(int64(b.tsc-a.tsc)) / (float64(b.nanos-a.nanos) / 1e6)
}

// takeSample reads the clock between two reads of the counter, several times,
// and keeps the tightest: no interrupt came between those.
func takeSample() (sample, error) {
	var best sample
	width := ^uint64(0)
	for range 20 {
		var ts unix.Timespec
		before, ok := rdtsc()
		if !ok {
			return sample{}, errors.New("this processor has no time-stamp counter: only x86-64 is supported")
		}
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
			return sample{}, fmt.Errorf("read CLOCK_MONOTONIC: %w", err)
		}
		after, _ := rdtsc()
		if after-before < width {
			width = after - before
			best = sample{tsc: before + width/2, nanos: ts.Nano()}
		}
	}
	return best, nil
}
