package template

import (
	"fmt"

	"github.com/dormouse-sandbox/dormouse/template/oci"
)

// Unknown is the fraction of a step that cannot tell how far it is.
const Unknown = -1.0

// Event is one piece of news from a build.
type Event struct {
	Step     string  // "fetch kernel", "install packages", …: changes when a step begins
	Fraction float64 // of this step, 0 to 1, or Unknown
	Line     string  // a line of the step's log, or empty
}

// Progress receives events in order, from one goroutine at a time. Nil is fine.
type Progress func(Event)

func (p Progress) step(name string, fraction float64) {
	if p != nil {
		p(Event{Step: name, Fraction: fraction})
	}
}

func (p Progress) line(name string, fraction float64, line string) {
	if p != nil {
		p(Event{Step: name, Fraction: fraction, Line: line})
	}
}

// leftOut tells what a tree has not got of what was to be put there.
func (p Progress) leftOut(step string, r oci.Report) {
	for _, line := range r.LeftOut {
		p.line(step, 1, "left out: "+line)
	}
	if more := r.LeftOutCount - len(r.LeftOut); more > 0 {
		p.line(step, 1, fmt.Sprintf("left out: %d more", more))
	}
}
