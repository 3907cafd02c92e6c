package agent_test

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/guest/identity"
)

// machine records what control calls change of it, in their order: it is the
// machine, its freezer and its hooks. The step that fail names fails.
type machine struct {
	mu       sync.Mutex
	clock    time.Time
	hostname string
	entropy  []byte
	life     string
	steps    []string
	frozen   bool
	idle     bool
	hooked   identity.Identity
	fail     map[string]error
	onFreeze func() // called with mu held
}

// step notes a step and says what is to become of it.
func (m *machine) step(name string) error {
	m.steps = append(m.steps, name)
	return m.fail[name]
}

func (m *machine) SetClock(at time.Time) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.clock = at
	return m.step("clock")
}

func (m *machine) SetHostname(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hostname = name
	return m.step("hostname")
}

func (m *machine) AddEntropy(data []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.entropy = data
	return m.step("entropy")
}

func (m *machine) NewMachineID() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.step("machine ID")
}

func (m *machine) EndPast() (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return 3, m.step("past")
}

func (m *machine) Life() (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.life, m.fail["life"]
}

func (m *machine) Freeze(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	err := m.step("freeze")
	m.frozen = err == nil
	if m.onFreeze != nil {
		m.onFreeze()
	}
	return err
}

func (m *machine) Thaw() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	err := m.step("thaw")
	m.frozen = m.frozen && err != nil
	return err
}

func (m *machine) Idle() (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.idle, m.fail["idle"]
}

func (m *machine) hooks(_ context.Context, id identity.Identity) []guestapi.Hook {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hooked = id
	if err := m.step("hooks"); err != nil {
		return []guestapi.Hook{{Name: "10-keys", Error: err.Error()}}
	}
	return []guestapi.Hook{{Name: "10-keys", Output: "done\n"}}
}

func (m *machine) set(do func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	do()
}

func (m *machine) isFrozen() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.frozen
}

// taken gives the steps since it was asked last.
func (m *machine) taken() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	taken := slices.Clone(m.steps)
	m.steps = nil
	return taken
}
