package template

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"sync"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Of a log that is longer, the beginning and the end are kept, so many bytes each:
// what it was made from, and how that ended.
const (
	logFile  = "build.log"
	logHalf  = 256 << 10
	maxLog   = 4 * logHalf // of a file that is read back
	logLines = 4 << 10     // bytes of one line
)

// buildLog keeps what a build tells, as people read it: the name of each step, and
// under it its lines.
type buildLog struct {
	mu    sync.Mutex
	step  string
	begin strings.Builder
	end   []string
	size  int // of end, in bytes
	lost  int // lines between the two
}

// recorded is a Progress that hears the same, and the log of it.
func recorded(p Progress) (*buildLog, Progress) {
	l := &buildLog{}
	return l, func(e Event) {
		l.add(e)
		if p != nil {
			p(e)
		}
	}
}

func (l *buildLog) add(e Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e.Step != l.step {
		l.step = e.Step
		l.line(e.Step)
	}
	if e.Line != "" {
		l.line("  " + e.Line)
	}
}

func (l *buildLog) line(text string) {
	if len(text) > logLines {
		text = strings.ToValidUTF8(text[:logLines], "") + "…"
	}
	text += "\n"
	if len(l.end) == 0 && l.begin.Len()+len(text) <= logHalf {
		l.begin.WriteString(text)
		return
	}
	l.end, l.size = append(l.end, text), l.size+len(text)
	for l.size > logHalf {
		l.size -= len(l.end[0])
		l.end = l.end[1:]
		l.lost++
	}
}

func (l *buildLog) text() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	gap := ""
	if l.lost > 0 {
		gap = fmt.Sprintf("… %d lines are left out …\n", l.lost)
	}
	return []byte(l.begin.String() + gap + strings.Join(l.end, ""))
}

// Log is what the build of a template has told; empty for one that was built
// before logs were kept.
func (s *Store) Log(name string) ([]byte, error) {
	t, err := s.Get(name)
	if err != nil {
		return nil, err
	}
	data, err := readLog(filepath.Join(s.cfg.Dir, t.Name))
	if err != nil {
		return nil, fmt.Errorf("read the log of template %q: %w", name, err)
	}
	return data, nil
}

func readLog(dir string) ([]byte, error) {
	data, err := osfs.ReadFileLimit(filepath.Join(dir, logFile), maxLog)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return data, err
}

func writeLog(dir string, text []byte) error {
	return sandbox.NoSpace(osfs.WriteFile("template-log", filepath.Join(dir, logFile), text, 0o644))
}
