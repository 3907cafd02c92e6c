package server

import (
	"io"
	"sync"
	"time"

	"github.com/coder/websocket"

	"github.com/dormouse-sandbox/dormouse/api"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// inputLimit is how much input waits in the server before the client is no
// longer read. It is more than api.StdinWindow, so that a client that keeps to
// the window is always heard.
const inputLimit = 1 << 20

// inputQueue holds input between the client and the host.
type inputQueue struct {
	mu      sync.Mutex
	changed *sync.Cond
	items   [][]byte // nil: the input ends here
	bytes   int
	closed  bool // what arrives is thrown away
}

func newInputQueue() *inputQueue {
	q := &inputQueue{}
	q.changed = sync.NewCond(&q.mu)
	return q
}

// put waits while the queue is full.
func (q *inputQueue) put(item []byte) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.bytes >= inputLimit && !q.closed {
		q.changed.Wait()
	}
	if q.closed {
		return
	}
	q.items = append(q.items, item)
	q.bytes += len(item)
	q.changed.Broadcast()
}

// take waits for an item; ok is false when there will be none.
func (q *inputQueue) take() (item []byte, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.items) == 0 && !q.closed {
		q.changed.Wait()
	}
	if q.closed {
		return nil, false
	}
	item = q.items[0]
	q.items[0] = nil // let go of the bytes
	q.items = q.items[1:]
	q.bytes -= len(item)
	q.changed.Broadcast()
	return item, true
}

// close throws away what is queued and wakes everybody.
func (q *inputQueue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.items, q.bytes = nil, 0
	q.changed.Broadcast()
}

// readClient reads messages until the client is gone, which ends the command if
// it has not ended by itself.
func (st *stream) readClient() {
	defer st.input.close()
	for {
		typ, r, err := st.conn.Reader(st.connCtx)
		if err != nil {
			st.clientGone()
			return
		}
		data, err := io.ReadAll(r)
		if err != nil {
			st.clientGone()
			return
		}
		if err := st.message(typ, data); err != nil {
			st.sendError(err, "")
			st.abandon()
			st.cancel(err)
			return
		}
	}
}

const (
	hostTerm = 15
	hostKill = 9
)

func (st *stream) message(typ websocket.MessageType, data []byte) error {
	if typ == websocket.MessageBinary && st.tty != nil {
		if len(data) > 0 {
			st.input.put(data)
		}
		return nil
	}
	if typ == websocket.MessageBinary {
		if len(data) == 0 || data[0] != api.ChannelStdin {
			return sandbox.Errorf(sandbox.KindInvalid, "a binary message must begin with the byte %d", api.ChannelStdin)
		}
		if len(data) > 1 {
			st.input.put(data[1:])
		}
		return nil
	}
	var msg api.StreamMessage
	if err := DecodeStrict(data, &msg); err != nil {
		return err
	}
	switch {
	case msg.Type == api.StreamResize && st.tty != nil:
		return st.tty.resize(msg.Size)
	case msg.Type == api.StreamCloseStdin && st.tty == nil:
		st.input.put(nil)
	case msg.Type == api.StreamKill && msg.Signal == api.SignalTerm:
		st.kill(hostTerm)
	case msg.Type == api.StreamKill && msg.Signal == api.SignalKill:
		st.kill(hostKill)
	case msg.Type == api.StreamKill:
		return sandbox.Errorf(sandbox.KindInvalid, "signal %q is neither %s nor %s", cut(msg.Signal, 40), api.SignalTerm, api.SignalKill)
	default:
		return sandbox.Errorf(sandbox.KindInvalid, "a message of type %q makes no sense here", cut(msg.Type, 40))
	}
	return nil
}

// kill passes a signal on. It does not wait behind input that the command does
// not take: the host's stream may be full of it.
func (st *stream) kill(signal int32) {
	if st.tty != nil {
		st.tty.kill(st, signal)
		return
	}
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		_ = st.send(&hostv1.ExecStreamRequest{Message: &hostv1.ExecStreamRequest_Kill_{ // the receiving side reports a broken stream
			Kill: &hostv1.ExecStreamRequest_Kill{Signal: signal},
		}})
	}()
	timer := time.NewTimer(killLimit)
	defer timer.Stop()
	select {
	case <-sent:
	case <-timer.C:
		if signal == hostKill {
			st.cancel(sandbox.Errorf(sandbox.KindConflict, "the command was killed while it did not take its input"))
			<-sent
		}
	case <-st.ctx.Done():
		<-sent // a cancelled stream lets its sender go
	}
}

// clientGone ends the session: nobody is there to read it.
func (st *stream) clientGone() {
	if st.ended.Load() || st.ctx.Err() != nil {
		return
	}
	st.input.close()
	st.abandon()
	st.cancel(errClientGone)
}

// abandon kills a command whose client is no longer served, unless it is kept.
func (st *stream) abandon() {
	switch {
	case st.tty == nil:
		st.kill(hostKill)
	case !st.tty.kept.Load():
		st.tty.signal(st, hostKill)
	}
}

// feedHost sends input on, and tells the client how much of it was taken.
func (st *stream) feedHost() {
	var taken int64
	for {
		item, ok := st.input.take()
		if !ok {
			return
		}
		msg := &hostv1.ExecStreamRequest{Message: &hostv1.ExecStreamRequest_Stdin{Stdin: item}}
		if item == nil {
			msg.Message = &hostv1.ExecStreamRequest_CloseStdin_{CloseStdin: &hostv1.ExecStreamRequest_CloseStdin{}}
		}
		if st.send(msg) != nil {
			return // the receiving side has the reason
		}
		taken += int64(len(item))
		if item != nil && st.sendText(api.StreamMessage{Type: api.StreamStdinAck, Bytes: taken}) != nil {
			return // the reader sees it too
		}
	}
}
