package host

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strconv"
	"strings"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// lockDir keeps a second agent off the same state. The lock goes with the
// process, however it ends.
func lockDir(dir string) (*os.File, error) {
	f, err := osfs.LockDir(dir)
	if errors.Is(err, osfs.ErrLocked) {
		return nil, sandbox.Errorf(sandbox.KindConflict, "another host agent runs on %s", dir)
	}
	return f, err
}

// loadKey reads the host's signing key, and makes it at the first start.
func loadKey(path string) (ed25519.PrivateKey, error) {
	seed, err := osfs.ReadFileLimit(path, ed25519.SeedSize)
	if errors.Is(err, fs.ErrNotExist) {
		seed = randomBytes(ed25519.SeedSize)
		err = osfs.WriteFile("host-key", path, seed, 0o600)
	}
	if err != nil {
		return nil, err
	}
	if len(seed) != ed25519.SeedSize {
		return nil, fmt.Errorf("%s has %d bytes, not %d", path, len(seed), ed25519.SeedSize)
	}
	return ed25519.NewKeyFromSeed(seed), nil
}

// randomBytes never fails: crypto/rand ends the process when the kernel does.
func randomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // documented to return no error
	return b
}

// newToken makes the secret that opens one guest agent.
func newToken() string { return hex.EncodeToString(randomBytes(32)) }

func cpus() int { return runtime.NumCPU() }

func memTotalMiB() int     { return memInfoMiB("MemTotal") }
func memAvailableMiB() int { return memInfoMiB("MemAvailable") }

// memInfoMiB reads one line of /proc/meminfo; 0 when there is none.
func memInfoMiB(field string) int { return kbField("/proc/meminfo", field) >> 10 }

// rssOf is the resident memory of a process; 0 when it is gone.
func rssOf(pid int) uint64 {
	return uint64(kbField(fmt.Sprintf("/proc/%d/status", pid), "VmRSS")) << 10
}

// kbField reads "Name:   123 kB" out of a file of /proc.
func kbField(path, field string) int {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(data)) {
		name, rest, ok := strings.Cut(line, ":")
		if !ok || name != field {
			continue
		}
		n, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(rest), " kB"))
		if err != nil {
			return 0
		}
		return n
	}
	return 0
}

// freeMiB is how much disk the host has left; 0 when that cannot be found out.
func (a *Agent) freeMiB() int {
	free, err := a.cfg.FreeBytes(a.cfg.Dir)
	if err != nil {
		return 0
	}
	return int(free >> 20)
}
