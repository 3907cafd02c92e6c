package main

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/template"
)

// painter shows the steps of a build: a bar on a terminal, and everywhere a
// line for each step that took over a second.
type painter struct {
	out io.Writer
	tty bool

	mu      sync.Mutex
	step    string
	started time.Time
	bar     *progressbar.ProgressBar
	quit    chan struct{} // ends the spinner's clock
}

func newPainter(cmd *cobra.Command) *painter {
	w := cmd.ErrOrStderr()
	return &painter{out: w, tty: isTerminal(w)}
}

// event takes one piece of news from a build.
func (p *painter) event(e template.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e.Step != "" && e.Step != p.step {
		p.finish()
		p.begin(e)
	}
	if p.bar == nil {
		return
	}
	if e.Fraction >= 0 {
		_ = p.bar.Set(int(e.Fraction * 100)) // it is only paint
	}
	if e.Line != "" {
		p.bar.Describe(p.step + ": " + short(e.Line))
	}
}

// done ends the last step.
func (p *painter) done() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.finish()
}

func (p *painter) begin(e template.Event) {
	p.step, p.started = e.Step, time.Now()
	if !p.tty {
		return
	}
	most := 100
	if e.Fraction < 0 {
		most = -1
	}
	p.bar = progressbar.NewOptions(most, progressbar.OptionSetWriter(p.out), progressbar.OptionSetDescription(e.Step),
		progressbar.OptionSetElapsedTime(true), progressbar.OptionClearOnFinish(), progressbar.OptionSpinnerType(14),
		progressbar.OptionThrottle(100*time.Millisecond))
	p.quit = make(chan struct{})
	go turn(p.bar, p.quit)
}

// turn repaints a bar so that a step without news still seems alive.
func turn(bar *progressbar.ProgressBar, quit <-chan struct{}) {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-quit:
			return
		case <-tick.C:
			_ = bar.RenderBlank() // it is only paint
		}
	}
}

func (p *painter) finish() {
	if p.bar != nil {
		close(p.quit)
		_ = p.bar.Finish() // it is only paint
		p.bar = nil
	}
	if p.step == "" {
		return
	}
	if took := time.Since(p.started); took > time.Second {
		_, _ = fmt.Fprintf(p.out, "%s: %v\n", p.step, took.Round(100*time.Millisecond)) // it is only paint
	}
	p.step = ""
}

// short cuts a line of a log to what fits beside a bar.
func short(line string) string {
	const most = 40
	line = strings.TrimSpace(line)
	if len(line) > most {
		return line[:most] + "…"
	}
	return line
}
