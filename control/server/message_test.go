package server_test

import (
	"encoding/json"
	"testing"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/server"
)

// FuzzStreamMessage: a client's text message is understood as a whole or refused
// with a bounded reason.
func FuzzStreamMessage(f *testing.F) {
	const whole = `{"type":"start","exec":{"cmd":"sh","args":["-c","x"],"env":{"A":"b"},"timeout_seconds":1.5},"stdin":true}`
	for n := range len(whole) + 1 { // also cut short anywhere
		f.Add([]byte(whole[:n]))
	}
	f.Add([]byte(`{"type":"auth","key":"k"}`))
	f.Add([]byte(`{"type":"kill","signal":"TERM","pid":-1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var m api.StreamMessage
		if err := server.DecodeStrict(data, &m); err != nil {
			if len(err.Error()) > 600 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
			return
		}
		again, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		var same api.StreamMessage
		if err := server.DecodeStrict(again, &same); err != nil {
			t.Errorf("%s was taken, and encoded again as %s refused: %v", data, again, err)
		}
	})
}
