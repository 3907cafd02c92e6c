package agent

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
)

// meter remembers the CPU counters of the previous call.
type meter struct {
	mu         sync.Mutex
	busy, idle uint64 // clock ticks since boot
}

func (a *Agent) serveMetrics(w http.ResponseWriter, _ *http.Request) {
	m, err := a.metrics.read("/")
	if err != nil {
		guestapi.WriteError(w, http.StatusInternalServerError, err.Error())
		return
	}
	writeJSON(w, m)
}

func (a *Agent) serveEnvs(w http.ResponseWriter, _ *http.Request) {
	env := a.cfg.Identity.Get().Env
	if env == nil {
		env = map[string]string{}
	}
	writeJSON(w, env)
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the caller is gone
}

func (m *meter) read(root string) (guestapi.Metrics, error) {
	out := guestapi.Metrics{Timestamp: time.Now().Unix(), CPUCount: runtime.NumCPU()}
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return out, fmt.Errorf("read the CPU counters: %w", err)
	}
	out.CPUUsedPct = m.used(cpuTicks(string(stat)))

	meminfo, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return out, fmt.Errorf("read the memory counters: %w", err)
	}
	mem := memory(string(meminfo))
	out.MemTotal = mem["MemTotal"]
	out.MemUsed = mem["MemTotal"] - min(mem["MemTotal"], mem["MemAvailable"])
	out.MemCache = mem["Cached"] + mem["Buffers"]

	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return out, fmt.Errorf("statfs %s: %w", root, err)
	}
	block := uint64(st.Bsize)
	out.DiskTotal = st.Blocks * block
	out.DiskUsed = (st.Blocks - st.Bfree) * block
	return out, nil
}

// used is the share of busy time since the previous call, 0 to 100.
func (m *meter) used(busy, idle uint64) float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, i := busy-min(busy, m.busy), idle-min(idle, m.idle)
	m.busy, m.idle = busy, idle
	if b+i == 0 {
		return 0
	}
	return 100 * float64(b) / float64(b+i)
}

// cpuTicks sums the first line of /proc/stat: user nice system idle iowait irq
// softirq steal. The guest times behind them are in user and nice already.
func cpuTicks(stat string) (busy, idle uint64) {
	line, _, _ := strings.Cut(stat, "\n")
	for i, field := range strings.Fields(line) {
		n, err := strconv.ParseUint(field, 10, 64)
		switch {
		case err != nil, i > 8:
		case i == 4, i == 5:
			idle += n
		default:
			busy += n
		}
	}
	return busy, idle
}

// memory reads /proc/meminfo into bytes.
func memory(meminfo string) map[string]uint64 {
	out := map[string]uint64{}
	for line := range strings.Lines(meminfo) {
		name, rest, ok := strings.Cut(line, ":")
		fields := strings.Fields(rest)
		if !ok || len(fields) == 0 {
			continue
		}
		if kib, err := strconv.ParseUint(fields[0], 10, 64); err == nil {
			out[name] = kib << 10
		}
	}
	return out
}
