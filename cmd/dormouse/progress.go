package main

import (
	"io"
	"os"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// patience is how long something may take before its progress is shown.
const patience = time.Second

func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// waiting shows on a terminal that something goes on, once it takes over a
// second. The function it returns ends that; it may be called twice.
func waiting(cmd *cobra.Command, what string) (stop func()) {
	w := cmd.ErrOrStderr()
	if !isTerminal(w) {
		return func() {}
	}
	quit, gone := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(gone)
		spin(w, what, quit)
	}()
	return func() {
		select {
		case <-gone:
		default:
			close(quit)
			<-gone
		}
	}
}

func spin(w io.Writer, what string, quit <-chan struct{}) {
	select {
	case <-quit:
		return
	case <-time.After(patience):
	}
	bar := progressbar.NewOptions(-1, progressbar.OptionSetWriter(w), progressbar.OptionSetDescription(what),
		progressbar.OptionSpinnerType(14), progressbar.OptionSetElapsedTime(true), progressbar.OptionClearOnFinish())
	defer func() { _ = bar.Finish() }() // it is only paint
	for tick := time.NewTicker(100 * time.Millisecond); ; {
		select {
		case <-quit:
			tick.Stop()
			return
		case <-tick.C:
			_ = bar.Add(1) // it is only paint
		}
	}
}

// transferring shows the progress of a copy on a terminal. A total below 0 is
// not known.
func transferring(cmd *cobra.Command, what string, total int64) io.WriteCloser {
	w := cmd.ErrOrStderr()
	if !isTerminal(w) {
		w = io.Discard
	}
	return &paint{progressbar.NewOptions64(total, progressbar.OptionSetWriter(w), progressbar.OptionSetDescription(what),
		progressbar.OptionShowBytes(true), progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionClearOnFinish())}
}

// paint is a progress bar whose errors do not stop a copy.
type paint struct{ bar *progressbar.ProgressBar }

func (p *paint) Write(b []byte) (int, error) {
	_ = p.bar.Add(len(b)) // it is only paint
	return len(b), nil
}

func (p *paint) Close() error { return p.bar.Close() }
