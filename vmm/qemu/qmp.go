package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
)

// maxMessage bounds one line from QEMU, which may be in the guest's hands.
const maxMessage = 1 << 20

// monitor is a client of QMP, QEMU's control protocol: JSON objects, one per
// line; see docs/interop/qmp-spec.txt in QEMU's source. QEMU serves one client
// at a time; the next one waits for its greeting until the first is gone.
type monitor struct {
	conn    net.Conn
	onEvent func(event)
	closed  chan struct{} // when the reader has ended

	passing sync.Mutex // held while a descriptor is passed; taken before mu

	mu      sync.Mutex // guards what follows and writes to conn
	nextID  int
	waiting map[int]chan message
	err     error // why the reader ended
}

// event is an asynchronous message.
type event struct {
	Name string
	Data json.RawMessage
}

// message is everything that QEMU sends.
type message struct {
	QMP    json.RawMessage `json:"QMP"`
	Event  string          `json:"event"`
	Data   json.RawMessage `json:"data"`
	ID     *int            `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

// dialMonitor connects, waits for the greeting (QEMU sends it once the machine
// is built) and leaves the negotiation mode. onEvent is called from one goroutine.
func dialMonitor(ctx context.Context, path string, onEvent func(event)) (*monitor, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("connect to qemu: %w", err)
	}
	m := &monitor{conn: conn, onEvent: onEvent, closed: make(chan struct{}), waiting: map[int]chan message{}}
	lines := bufio.NewScanner(conn)
	lines.Buffer(nil, maxMessage)
	if err := greet(ctx, conn, lines); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	go m.read(lines)
	if err := m.run(ctx, "qmp_capabilities", nil, nil); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

func greet(ctx context.Context, conn net.Conn, lines *bufio.Scanner) error {
	stop := context.AfterFunc(ctx, func() {
		_ = conn.SetReadDeadline(time.Unix(1, 0)) // ends the Scan; fails only on a closed connection
	})
	defer stop()
	if !lines.Scan() {
		if ctx.Err() != nil {
			return fmt.Errorf("wait for qemu: %w", ctx.Err())
		}
		return fmt.Errorf("wait for qemu: %w", scanError(lines))
	}
	var hello message
	if err := json.Unmarshal(lines.Bytes(), &hello); err != nil || hello.QMP == nil {
		return fmt.Errorf("qemu greets with %.80q", lines.Bytes())
	}
	return nil
}

func scanError(lines *bufio.Scanner) error {
	if err := lines.Err(); err != nil {
		return err
	}
	return errors.New("it closed its control socket")
}

func (m *monitor) read(lines *bufio.Scanner) {
	defer close(m.closed)
	for lines.Scan() {
		var msg message
		if err := json.Unmarshal(lines.Bytes(), &msg); err != nil {
			break // not QEMU any more
		}
		if msg.Event != "" {
			m.onEvent(event{msg.Event, msg.Data})
			continue
		}
		m.deliver(msg)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = scanError(lines)
	for id, reply := range m.waiting {
		delete(m.waiting, id)
		close(reply)
	}
}

func (m *monitor) deliver(msg message) {
	if msg.ID == nil {
		return // an error about a command that we did not number: there is none
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if reply, ok := m.waiting[*msg.ID]; ok {
		delete(m.waiting, *msg.ID)
		reply <- msg // has room for one
	}
}

// run executes one command and decodes what it returns into result, if not nil.
func (m *monitor) run(ctx context.Context, command string, arguments, result any) error {
	return m.execute(ctx, nil, command, arguments, result)
}

// runWith passes a descriptor along with a command that takes one. The command
// takes the newest that came, so there is one such command at a time.
func (m *monitor) runWith(ctx context.Context, file *os.File, command string, arguments, result any) error {
	m.passing.Lock()
	defer m.passing.Unlock()
	return m.execute(ctx, file, command, arguments, result)
}

func (m *monitor) execute(ctx context.Context, file *os.File, command string, arguments, result any) error {
	id, reply, err := m.send(ctx, file, command, arguments)
	if err != nil {
		return fmt.Errorf("qemu: %s: %w", command, err)
	}
	defer m.forget(id)
	select {
	case <-ctx.Done():
		return fmt.Errorf("qemu: %s: %w", command, ctx.Err())
	case msg, ok := <-reply:
		switch {
		case !ok:
			return fmt.Errorf("qemu: %s: %w", command, m.readError())
		case msg.Error != nil:
			return fmt.Errorf("qemu: %s: %s (%s)", command, msg.Error.Desc, msg.Error.Class)
		case result == nil:
			return nil
		}
		return json.Unmarshal(msg.Return, result)
	}
}

func (m *monitor) send(ctx context.Context, file *os.File, command string, arguments any) (int, chan message, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return 0, nil, m.err
	}
	m.nextID++
	request := map[string]any{"execute": command, "id": m.nextID}
	if arguments != nil {
		request["arguments"] = arguments
	}
	line, err := json.Marshal(request)
	if err != nil {
		return 0, nil, err
	}
	deadline, _ := ctx.Deadline() // none is the zero time, which SetWriteDeadline takes as none
	if err := m.conn.SetWriteDeadline(deadline); err != nil {
		return 0, nil, err
	}
	reply := make(chan message, 1)
	m.waiting[m.nextID] = reply
	if err := m.write(append(line, '\n'), file); err != nil {
		delete(m.waiting, m.nextID)
		return 0, nil, err
	}
	return m.nextID, reply, nil
}

func (m *monitor) write(line []byte, file *os.File) error {
	if file == nil {
		_, err := m.conn.Write(line)
		return err
	}
	socket, ok := m.conn.(*net.UnixConn)
	if !ok {
		return errors.New("the connection carries no descriptors")
	}
	n := 0
	err := kernel.WithFD(file, func(fd int) (err error) {
		n, _, err = socket.WriteMsgUnix(line, unix.UnixRights(fd), nil)
		return err
	})
	if err == nil && n < len(line) {
		_, err = m.conn.Write(line[n:])
	}
	return err
}

func (m *monitor) forget(id int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.waiting, id)
}

func (m *monitor) readError() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Close hangs up and waits for the reader. QEMU goes on.
func (m *monitor) Close() error {
	err := m.conn.Close()
	<-m.closed
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
