package host

import (
	"sync"
	"time"
)

// stopLimit is how long an agent that closes waits for the commands that it
// ends with their calls; tests lengthen it.
var stopLimit = 2 * time.Second

// commands counts those that a caller follows, so that none of them outlives a
// graceful stop by oversight.
type commands struct {
	running sync.WaitGroup

	mu     sync.Mutex
	closed bool
}

// begin counts one until done; an agent that closes starts none.
func (c *commands) begin() (done func(), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errClosing
	}
	c.running.Add(1)
	return c.running.Done, nil
}

func (c *commands) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
}

// wait waits until none runs, for so long at the most.
func (c *commands) wait(limit time.Duration) (none bool) {
	ended := make(chan struct{})
	go func() { // ends at the latest when every Finish has given up
		defer close(ended)
		c.running.Wait()
	}()
	select {
	case <-ended:
		return true
	case <-time.After(limit):
		return false
	}
}
