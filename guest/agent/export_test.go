package agent

import (
	"testing"
	"time"
)

// SetPastGrace changes how long calls of the past have, until the test ends. It comes
// before the start of an agent.
func SetPastGrace(t *testing.T, d time.Duration) {
	was := pastGrace
	pastGrace = d
	t.Cleanup(func() { pastGrace = was })
}
