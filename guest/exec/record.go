package exec

import (
	"os"
	"path/filepath"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// maxRecord bounds one file of a record, in bytes. There are two: what is older is
// in the one with ".1" behind its name.
const maxRecord = 256 << 10

// recordPath is where the output of a process goes that is to be kept; empty for
// none. It is for processes that nobody follows.
func (s *Server) recordPath(name string) (string, error) {
	if name == "" || s.cfg.Records == "" {
		return "", nil
	}
	if err := sandbox.SafeName("record", name); err != nil {
		return "", connect.NewError(connect.CodeInvalidArgument, err)
	}
	return filepath.Join(s.cfg.Records, name+".log"), nil
}

// record follows a process to its end and writes what it says to a file. That
// never holds the process up for long, nor fails it: it is a courtesy.
func record(p *process, r *reader, path string) {
	defer p.unsubscribe(r)
	f := &recordFile{path: path}
	defer f.close()
	for {
		select {
		case event := <-r.events:
			data := event.GetData()
			f.write(data.GetStdout())
			f.write(data.GetStderr())
			f.write(data.GetPty())
		case <-p.done: // after the last delivery
			f.write([]byte("[" + p.end.GetStatus() + "]\n"))
			return
		}
	}
}

// recordFile is the newer file of a record.
type recordFile struct {
	path string
	f    *os.File // nil before the first byte, and when it could not be made
	size int
}

func (r *recordFile) write(data []byte) {
	if len(data) == 0 {
		return
	}
	if r.f == nil || r.size+len(data) > maxRecord {
		r.next()
	}
	if r.f != nil {
		n, _ := r.f.Write(data) // a full disk leaves a gap
		r.size += n
	}
}

// next begins a new file.
func (r *recordFile) next() {
	r.close()
	_ = os.MkdirAll(filepath.Dir(r.path), 0o755)
	_ = os.Rename(r.path, r.path+".1") // there may be none
	r.f, _ = os.OpenFile(r.path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	r.size = 0
}

func (r *recordFile) close() {
	if r.f != nil {
		_ = r.f.Close() // as above
		r.f = nil
	}
}
