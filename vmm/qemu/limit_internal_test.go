package qemu

import (
	"bufio"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func fileLimit(t *testing.T, m *machine) int64 {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Prlimit(m.pid.PID(), unix.RLIMIT_FSIZE, nil, &limit); err != nil {
		t.Fatal(err)
	}
	return int64(min(limit.Cur, 1<<62))
}

// idle is a QEMU that nothing is asked of.
func idle(conn net.Conn, lines *bufio.Scanner) {
	negotiate(conn, lines)
	for lines.Scan() {
	}
}

// TestBothLogsAreBounded: one that has much does not let the other be filled.
func TestBothLogsAreBounded(t *testing.T) {
	m := unattended(t, idle)
	defer endUnattended(t, m)
	m.tendLogs()
	spare := m.driver.spare()
	if limit := fileLimit(t, m); limit != logBase+spare {
		t.Errorf("at first the limit is %d above the base, want %d", limit-logBase, spare)
	}
	const said = "something that QEMU said\n"
	if err := errors.Join(
		appendTo(filepath.Join(m.record.Dir, logName), said),
		os.Truncate(filepath.Join(m.record.Dir, consoleName), logBase+100*spare),
	); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := m.boundLogs(); err != nil {
			t.Fatal(err)
		}
	}
	if limit := fileLimit(t, m); limit != logBase+101*spare {
		t.Errorf("then it is %d above it, want %d", limit-logBase, 101*spare)
	}
	if size, err := m.log.size(); err != nil || size < 99*spare {
		t.Errorf("the other log is let grow by %d bytes, %v", 101*spare-size, err)
	}
	if err := appendTo(filepath.Join(m.record.Dir, logName), said); err != nil {
		t.Fatal(err)
	}
	if tail := m.log.tail(4096); tail != said {
		t.Errorf("its end is %q, want %q", tail, said)
	}
}

func endUnattended(t *testing.T, m *machine) {
	t.Helper()
	if err := errors.Join(m.destroy(t.Context()), m.monitor.Close(), m.console.Close(), m.log.Close()); err != nil {
		t.Error(err)
	}
}

func appendTo(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// TestLogsOfAnEarlierVersion begin at 0. A limit that bounds them would stop the
// disk of that VM.
func TestLogsOfAnEarlierVersion(t *testing.T) {
	m := unattended(t, idle)
	defer endUnattended(t, m)
	before := fileLimit(t, m)
	const text = "an old console"
	for _, l := range []struct {
		name string
		log  **logFile
	}{{consoleName, &m.console}, {logName, &m.log}} {
		path := filepath.Join(m.record.Dir, l.name)
		if err := errors.Join((*l.log).Close(), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
		log, err := openLog(m.record.Dir, l.name, keepLog)
		if err != nil {
			t.Fatal(err)
		}
		*l.log = log
	}
	if data, next, err := m.Console(3, 100); err != nil || string(data) != text[3:] || next != int64(len(text)) {
		t.Errorf("from 3 on: %q, next %d, %v", data, next, err)
	}
	if err := m.boundLogs(); err != nil {
		t.Fatal(err)
	}
	if limit := fileLimit(t, m); limit != before {
		t.Errorf("the limit was set to %d", limit)
	}
}
