package lab

import "testing"

func TestWhatIsImpossible(t *testing.T) {
	for console, want := range map[string]bool{
		"":                     false,
		"[ 1.0] nothing wrong": false,
		"[ 1.0] Kernel panic - not syncing: Fatal exception in interrupt":                          true,
		"[ 1.0] Kernel panic - not syncing: corrupted stack end detected inside scheduler\n[ 1.1]": true,
		"[ 1.0] Kernel panic - not syncing: System is deadlocked on memory":                        false,
	} {
		if got := impossible(console); got != want {
			t.Errorf("%q: %v", console, got)
		}
	}
}
