package kernel

// readTSC is RDTSC behind a load fence, so that it is not executed early.
func readTSC() uint64

func rdtsc() (uint64, bool) { return readTSC(), true }
