package host

import "time"

// SetSilence shortens how long a silent guest is waited for, and returns what
// undoes it.
func SetSilence(d time.Duration) (undo func()) { return set(&silenceKept, d) }

// SetStartGrace, SetStopLimit and SetAnswerGrace lengthen limits that a busy
// machine may miss. Each returns what undoes it.
func SetStartGrace(d time.Duration) (undo func()) { return set(&startGrace, d) }

// SetStopLimit is like SetStartGrace.
func SetStopLimit(d time.Duration) (undo func()) { return set(&stopLimit, d) }

// SetAnswerGrace is like SetStartGrace; guests that exist already keep theirs.
func SetAnswerGrace(d time.Duration) (undo func()) { return set(&answerGrace, d) }

func set(limit *time.Duration, to time.Duration) (undo func()) {
	before := *limit
	*limit = to
	return func() { *limit = before }
}
