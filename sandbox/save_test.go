package sandbox_test

import (
	"testing"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func TestWordsOfSaving(t *testing.T) {
	for word, valid := range map[string]bool{
		"reason user": sandbox.PauseUser.Valid(), "reason idle": sandbox.PauseIdle.Valid(), "durability": sandbox.DurableLocal.Valid(),
		"boot": sandbox.StartBoot.Valid(), "warm": sandbox.StartWarm.Valid(), "snapshot": sandbox.StartSnapshot.Valid(),
		"fork": sandbox.StartFork.Valid(), "resume": sandbox.StartResume.Valid(),
	} {
		if !valid {
			t.Errorf("%s is not valid", word)
		}
	}
	if sandbox.PauseReason("").Valid() || sandbox.Start("").Valid() || sandbox.Durability("").Valid() || sandbox.Durability("s3").Valid() {
		t.Error("an unknown word is valid")
	}
	seen := map[sandbox.SavePhase]bool{}
	for _, p := range sandbox.SavePhases() {
		if p == "" || seen[p] {
			t.Errorf("phase %q is empty or there twice", p)
		}
		seen[p] = true
	}
}
