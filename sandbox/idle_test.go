package sandbox_test

import (
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func TestAutoPauseBounds(t *testing.T) {
	for d, fine := range map[time.Duration]bool{
		0: true, time.Second: true, 30 * 24 * time.Hour: true,
		-1: false, time.Second - 1: false, 30*24*time.Hour + 1: false,
	} {
		if err := sandbox.CheckAutoPause(d); (err == nil) != fine || err != nil && !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("%v: %v", d, err)
		}
	}
}
