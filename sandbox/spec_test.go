package sandbox_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func TestDefaultsAreInBounds(t *testing.T) {
	s := sandbox.Spec{}.WithDefaults()
	if err := s.Check(); err != nil {
		t.Fatalf("a spec of defaults: %v", err)
	}
	if err := sandbox.CheckTimeout(sandbox.DefaultTimeout); err != nil {
		t.Fatal(err)
	}
	if s.Template != "base" || s.VCPUs != 1 || s.MemMiB != 512 || s.DiskMiB != 4096 {
		t.Errorf("defaults are %+v", s)
	}
}

func TestWithDefaultsKeepsWhatWasAsked(t *testing.T) {
	s := sandbox.Spec{Template: "mine", VCPUs: 3, MemMiB: 129, DiskMiB: 65}
	if got := s.WithDefaults(); got.Template != "mine" || got.VCPUs != 3 || got.MemMiB != 129 || got.DiskMiB != 65 {
		t.Errorf("got %+v", got)
	}
}

func TestSpecBounds(t *testing.T) {
	for _, tt := range []struct {
		what     string
		set      func(*sandbox.Spec, int)
		min, max int
		message  string
	}{
		{"vcpus", func(s *sandbox.Spec, n int) { s.VCPUs = n }, 1, 32, "from 1 to 32"},
		{"mem_mib", func(s *sandbox.Spec, n int) { s.MemMiB = n }, 128, 65536, "from 128 to 65536 MiB"},
		{"disk_mib", func(s *sandbox.Spec, n int) { s.DiskMiB = n }, 64, 1 << 20, "from 64 to 1048576 MiB"},
	} {
		t.Run(tt.what, func(t *testing.T) {
			for _, n := range []int{tt.min, tt.max} {
				s := sandbox.Spec{}.WithDefaults()
				tt.set(&s, n)
				if err := s.Check(); err != nil {
					t.Errorf("%d: %v", n, err)
				}
			}
			for _, n := range []int{-1, 0, tt.min - 1, tt.max + 1, 1 << 40} {
				s := sandbox.Spec{}.WithDefaults()
				tt.set(&s, n)
				err := s.Check()
				if !sandbox.Is(err, sandbox.KindInvalid) {
					t.Errorf("%d: %v, want an error of kind invalid", n, err)
					continue
				}
				for _, part := range []string{tt.what, fmt.Sprint(n), tt.message} {
					if !strings.Contains(err.Error(), part) {
						t.Errorf("the message %q does not have %q", err, part)
					}
				}
			}
		})
	}
}

func TestSpecRefusesATemplateThatIsAPath(t *testing.T) {
	s := sandbox.Spec{Template: "../base"}.WithDefaults()
	if err := s.Check(); !sandbox.Is(err, sandbox.KindInvalid) {
		t.Fatalf("got %v", err)
	}
}

func TestTimeoutBounds(t *testing.T) {
	for _, d := range []time.Duration{time.Second, 30 * 24 * time.Hour} {
		if err := sandbox.CheckTimeout(d); err != nil {
			t.Errorf("%v: %v", d, err)
		}
	}
	for _, d := range []time.Duration{-time.Second, 0, time.Second - 1, 30*24*time.Hour + 1} {
		if err := sandbox.CheckTimeout(d); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("%v: %v, want an error of kind invalid", d, err)
		}
	}
}

func many(n int) map[string]string {
	m := map[string]string{}
	for i := range n {
		m[fmt.Sprintf("K%d", i)] = "v"
	}
	return m
}

func TestCheckEnv(t *testing.T) {
	for name, env := range map[string]map[string]string{
		"nothing":        nil,
		"empty value":    {"A": ""},
		"odd but fine":   {"_x9": "a=b\nc é"},
		"as many as may": many(sandbox.MaxEnvVars),
		"as much as may": {"A": strings.Repeat("x", sandbox.MaxEnvBytes-1)},
	} {
		if err := sandbox.CheckEnv(env); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, env := range map[string]map[string]string{
		"an empty name":        {"": "x"},
		"a digit first":        {"1A": "x"},
		"an equals sign":       {"A=B": "x"},
		"a newline in a name":  {"A\n": "x"},
		"a NUL in a value":     {"A": "x\x00y"},
		"one too many":         many(sandbox.MaxEnvVars + 1),
		"one byte too much":    {"A": strings.Repeat("x", sandbox.MaxEnvBytes)},
		"too much in together": {"A": strings.Repeat("x", 40<<10), "B": strings.Repeat("x", 40<<10)},
	} {
		if err := sandbox.CheckEnv(env); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("%s: %v, want an error of kind invalid", name, err)
		}
	}
}

func TestCheckMetadata(t *testing.T) {
	long := strings.Repeat("x", sandbox.MaxMetadataSize)
	for name, m := range map[string]map[string]string{
		"nothing": nil, "any characters": {"a b/ü": "\n"}, "as long as may": {long: long}, "as many as may": many(sandbox.MaxMetadata),
	} {
		if err := sandbox.CheckMetadata(m); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, m := range map[string]map[string]string{
		"an empty key": {"": "x"}, "a long key": {long + "x": ""}, "a long value": {"k": long + "x"}, "one too many": many(sandbox.MaxMetadata + 1),
	} {
		if err := sandbox.CheckMetadata(m); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("%s: %v, want an error of kind invalid", name, err)
		}
	}
}
