package kernel

import (
	"maps"
	"strings"
	"testing"
)

func TestProcessorsAreToldApart(t *testing.T) {
	one := map[string]string{"vendor_id": "GenuineIntel", "cpu family": "6", "model": "85", "stepping": "7", "flags": "fpu vme de"}
	same := maps.Clone(one)
	same["flags"] = "vme de fpu" // in another order
	other := maps.Clone(one)
	other["flags"] = "fpu vme"
	if identityOf(one) != identityOf(same) || identityOf(one) == identityOf(other) || !strings.HasPrefix(identityOf(one), "GenuineIntel 6-85-7 ") {
		t.Errorf("%q, %q, %q", identityOf(one), identityOf(same), identityOf(other))
	}
	delete(other, "flags")
	if got := identityOf(other) + identityOf(nil); got != "" {
		t.Errorf("of nothing: %q", got)
	}
	if CPUIdentity() == "" || CPUModel() == "" {
		t.Errorf("of this machine: %q, %q", CPUIdentity(), CPUModel())
	}
}
