package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"

	"github.com/coder/websocket"
	"github.com/coder/websocket/wsjson"

	"github.com/dormouse-sandbox/dormouse/api"
)

// fakeTerminal is one command in a terminal.
type fakeTerminal struct {
	first api.StreamMessage
	typed io.Reader // an error at its end says that the client has gone
	sizes chan api.TerminalSize
	conn  *websocket.Conn
}

// show shows something.
func (p *fakeTerminal) show(ctx context.Context, text string) {
	_ = p.conn.Write(ctx, websocket.MessageBinary, []byte(text)) // a client that left sees nothing
}

// read reads so many bytes of what is typed; fewer if the client goes.
func (p *fakeTerminal) read(n int) string {
	buf := make([]byte, n)
	got, _ := io.ReadFull(p.typed, buf)
	return string(buf[:got])
}

// inTerminal says what plays commands in terminals.
func (f *fakeServer) inTerminal(play func(ctx context.Context, p *fakeTerminal) (int, string)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tty = play
}

// errCut is for a command whose connection breaks off without a word.
var errCut = errors.New("cut")

func (f *fakeServer) pty(w http.ResponseWriter, r *http.Request, _ *api.Sandbox) {
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer func() { _ = conn.CloseNow() }()
	conn.SetReadLimit(api.MaxStreamMessage + 1)
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	p := &fakeTerminal{conn: conn, sizes: make(chan api.TerminalSize, 100)}
	if err := wsjson.Read(ctx, conn, &p.first); err != nil {
		return
	}
	if p.first.PID == 404 {
		_ = wsjson.Write(ctx, conn, api.StreamMessage{Type: api.StreamError, Error: &api.ErrorDetail{Code: "not_found", Message: "no process with pid 404"}})
		return
	}
	input, feed := io.Pipe()
	p.typed = input
	_ = wsjson.Write(ctx, conn, api.StreamMessage{Type: api.StreamStarted, PID: 77})
	go func() {
		defer cancel() // whoever goes away takes its command along
		p.hear(ctx, feed)
	}()
	f.mu.Lock()
	play := f.tty
	f.mu.Unlock()
	code, status := play(ctx, p)
	switch {
	case status == errCut.Error(), ctx.Err() != nil:
		return
	case code < 0 && status == "":
		_ = wsjson.Write(ctx, conn, api.StreamMessage{Type: api.StreamError, Error: &api.ErrorDetail{Code: "unauthorized", Message: "the API key was revoked"}})
	default:
		_ = wsjson.Write(ctx, conn, api.StreamMessage{Type: api.StreamExit, ExitCode: &code, Status: status})
	}
	_ = conn.Close(websocket.StatusNormalClosure, "")
}

func (p *fakeTerminal) hear(ctx context.Context, feed *io.PipeWriter) {
	var total int64
	for {
		typ, data, err := p.conn.Read(ctx)
		if err != nil {
			_ = feed.CloseWithError(err)
			return
		}
		if typ == websocket.MessageText {
			p.message(data)
			continue
		}
		n, _ := feed.Write(data)
		total += int64(n)
		_ = wsjson.Write(ctx, p.conn, api.StreamMessage{Type: api.StreamStdinAck, Bytes: total})
	}
}

func (p *fakeTerminal) message(data []byte) {
	var msg api.StreamMessage
	if json.Unmarshal(data, &msg) == nil && msg.Type == api.StreamResize {
		p.sizes <- *msg.Size
	}
}
