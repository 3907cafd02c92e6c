package sandbox

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"time"
)

// Bounds on what a sandbox may be. They hold everywhere; one host may allow less.
const (
	MinVCPUs   = 1
	MaxVCPUs   = 32
	MinMemMiB  = 128
	MaxMemMiB  = 64 << 10
	MinDiskMiB = 64
	MaxDiskMiB = 1 << 20

	MinTimeout = time.Second
	MaxTimeout = 30 * 24 * time.Hour

	MaxEnvVars      = 256
	MaxEnvBytes     = 64 << 10 // of all names and values together
	MaxMetadata     = 64
	MaxMetadataSize = 1 << 10 // of one key or value
)

// What a create gets when it does not ask.
const (
	DefaultTemplate = "base"
	DefaultVCPUs    = 1
	DefaultMemMiB   = 512
	DefaultDiskMiB  = 4 << 10
	DefaultTimeout  = 5 * time.Minute
)

// Network is what a guest may reach. The zero value is nothing but its resolver.
type Network struct {
	Internet bool // connections to public addresses
}

// Spec is the shape of a sandbox: what it is made from and how large it is.
type Spec struct {
	Template string
	VCPUs    int
	MemMiB   int
	DiskMiB  int
	Env      map[string]string
	Network  Network
}

// WithDefaults fills in what the caller left at zero.
func (s Spec) WithDefaults() Spec {
	if s.Template == "" {
		s.Template = DefaultTemplate
	}
	if s.VCPUs == 0 {
		s.VCPUs = DefaultVCPUs
	}
	if s.MemMiB == 0 {
		s.MemMiB = DefaultMemMiB
	}
	if s.DiskMiB == 0 {
		s.DiskMiB = DefaultDiskMiB
	}
	return s
}

// Check says what is out of bounds, with the bound.
func (s Spec) Check() error {
	if err := SafeName("template", s.Template); err != nil {
		return err
	}
	for _, b := range []struct {
		what          string
		got, min, max int
		unit          string
	}{
		{"vcpus", s.VCPUs, MinVCPUs, MaxVCPUs, ""},
		{"mem_mib", s.MemMiB, MinMemMiB, MaxMemMiB, " MiB"},
		{"disk_mib", s.DiskMiB, MinDiskMiB, MaxDiskMiB, " MiB"},
	} {
		if b.got < b.min || b.got > b.max {
			return Errorf(KindInvalid, "%s is %d, must be from %d to %d%s", b.what, b.got, b.min, b.max, b.unit)
		}
	}
	return CheckEnv(s.Env)
}

// CheckTimeout checks how long a sandbox may live from now on.
func CheckTimeout(d time.Duration) error {
	if d < MinTimeout || d > MaxTimeout {
		return Errorf(KindInvalid, "timeout is %v, must be from %v to %v", d, MinTimeout, MaxTimeout)
	}
	return nil
}

var envName = regexp.MustCompile(`^[a-zA-Z_][a-zA-Z0-9_]*$`)

// CheckEnv checks environment variables that a guest will be given.
func CheckEnv(env map[string]string) error {
	if len(env) > MaxEnvVars {
		return Errorf(KindInvalid, "env has %d variables, at most %d are allowed", len(env), MaxEnvVars)
	}
	total := 0
	for _, k := range slices.Sorted(maps.Keys(env)) {
		if !envName.MatchString(k) {
			return Errorf(KindInvalid, "env name %s must match %s", quote(k), envName)
		}
		if slices.Contains([]byte(env[k]), 0) {
			return Errorf(KindInvalid, "env %s has a NUL byte in its value", k)
		}
		total += len(k) + len(env[k])
	}
	if total > MaxEnvBytes {
		return Errorf(KindInvalid, "env has %d bytes, at most %d are allowed", total, MaxEnvBytes)
	}
	return nil
}

// CheckMetadata checks the labels a caller hangs on a sandbox.
func CheckMetadata(m map[string]string) error {
	if len(m) > MaxMetadata {
		return Errorf(KindInvalid, "metadata has %d entries, at most %d are allowed", len(m), MaxMetadata)
	}
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if k == "" {
			return Errorf(KindInvalid, "metadata has an empty key")
		}
		if len(k) > MaxMetadataSize || len(m[k]) > MaxMetadataSize {
			return Errorf(KindInvalid, "metadata %s is longer than %d bytes", quote(k), MaxMetadataSize)
		}
	}
	return nil
}

// quote shows s in a message, cut to a length that fits in one.
func quote(s string) string {
	const most = 80
	if len(s) > most {
		return fmt.Sprintf("%s… (%d bytes)", strconv.Quote(s[:most]), len(s))
	}
	return strconv.Quote(s)
}
