package hooks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/dormouse-sandbox/dormouse/guest/reap"
)

// run runs one hook and gives the end of what it has written.
func (r *Runner) run(ctx context.Context, name string, env []string) (string, error) {
	if ctx.Err() != nil {
		return "", fmt.Errorf("not run: the hooks before it have taken %v", r.Total)
	}
	place, err := r.openPlace()
	if err != nil {
		return "", err
	}
	defer place.close()
	out, err := openOutput()
	if err != nil {
		return "", err
	}
	child, err := r.start(filepath.Join(r.Dir, name), env, out.theirs, place)
	out.started()
	if err != nil {
		out.wait(quiet)
		return "", fmt.Errorf("start: %w", err)
	}
	began, ended := time.Now(), make(chan struct{})
	var exit error // read once it has ended
	go func() {
		defer close(ended)
		exit = exitError(child.Wait())
	}()
	ctx, cancel := context.WithTimeout(ctx, r.Limit)
	defer cancel()
	select {
	case <-ended:
		err = errors.Join(exit, place.adopt(r.Leftovers))
	case <-ctx.Done():
		place.kill()
		err = fmt.Errorf("killed after %v%s", time.Since(began).Round(100*time.Millisecond), end(child, ended))
	}
	return out.wait(quiet), err
}

func (r *Runner) start(path string, env []string, output *os.File, place *place) (*reap.Child, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer func() { _ = null.Close() }() // a device
	sys := &syscall.SysProcAttr{Setsid: true}
	if place.dir != nil {
		sys.UseCgroupFD, sys.CgroupFD = true, int(place.dir.Fd())
	}
	return r.Reaper.Start(path, []string{path}, &os.ProcAttr{
		Dir: "/", Env: env, Files: []*os.File{null, output, output}, Sys: sys,
	})
}

// end ends a hook's process group.
func end(child *reap.Child, ended <-chan struct{}) (but string) {
	_ = child.SignalGroup(syscall.SIGKILL) // it may have ended just now
	select {
	case <-ended:
		return ""
	case <-time.After(dying):
		return ", and it does not die"
	}
}

func exitError(state *os.ProcessState, err error) error {
	switch {
	case err != nil:
		return err
	case !state.Success():
		return errors.New(state.String())
	}
	return nil
}

// output reads what a hook writes, and keeps the end of it.
type output struct {
	ours, theirs *os.File
	closed       chan struct{} // when everybody has closed his end

	mu   sync.Mutex
	kept []byte
}

func openOutput() (*output, error) {
	ours, theirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	o := &output{ours: ours, theirs: theirs, closed: make(chan struct{})}
	go o.read()
	return o, nil
}

// started closes the hook's end: it has its own.
func (o *output) started() { _ = o.theirs.Close() } // nothing was written

// read goes on for as long as anybody writes: what a hook leaves running must not
// die of a closed pipe.
func (o *output) read() {
	defer close(o.closed)
	buf := make([]byte, maxOutput)
	for {
		n, err := o.ours.Read(buf)
		o.mu.Lock()
		o.kept = append(o.kept, buf[:n]...)
		o.kept = o.kept[max(0, len(o.kept)-maxOutput):]
		o.mu.Unlock()
		if err != nil {
			_ = o.ours.Close() // read only
			return
		}
	}
}

// wait gives what was written, when there can be no more or after a while.
func (o *output) wait(limit time.Duration) string {
	select {
	case <-o.closed:
	case <-time.After(limit):
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.kept)
}

// printable takes out what a terminal would obey, and the half of a character that
// a cut has left.
func printable(s string) string {
	for i := 0; i < utf8.UTFMax && len(s) > 0 && !utf8.RuneStart(s[0]); i++ {
		s = s[1:]
	}
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, strings.ToValidUTF8(s, "?"))
}
