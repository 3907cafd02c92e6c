package host

// Abandon drops the agent as the death of its process would: nothing is rolled
// back, released or written. Only the lock goes, as the kernel would have it.
func (a *Agent) Abandon() {
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.stop()
	_ = a.lock.Close() // the process is "dead"
}

// Closed says that Close has begun.
func (a *Agent) Closed() bool { return a.isClosed() }

// DecodeEntry is for the fuzz target.
func DecodeEntry(data []byte) error {
	_, err := decodeEntry(data)
	return err
}
