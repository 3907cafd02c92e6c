package oci

import (
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Config is what an image says about how it wants to be run.
type Config struct {
	Env          map[string]string
	User         string // "name", "uid", "name:group" or "uid:gid"; empty means root
	WorkingDir   string
	Entrypoint   []string
	Cmd          []string // arguments of the entrypoint, or a command of its own
	Healthcheck  *Healthcheck
	ExposedPorts []string // "8080/tcp", sorted
	Labels       map[string]string
	StopSignal   string
	Shell        []string
}

// Healthcheck is how to ask whether what the image starts works.
type Healthcheck struct {
	// Test is empty, ["NONE"], ["CMD", program, …] or ["CMD-SHELL", line].
	Test                           []string      `json:"test,omitempty"`
	Interval, Timeout, StartPeriod time.Duration `json:",omitzero"`
	Retries                        int           `json:"retries,omitempty"`
}

func configOf(c v1.Config) (Config, error) {
	out := Config{
		Env: map[string]string{}, User: c.User, WorkingDir: c.WorkingDir, Entrypoint: c.Entrypoint, Cmd: c.Cmd,
		Labels: c.Labels, StopSignal: c.StopSignal, Shell: c.Shell,
	}
	for _, line := range c.Env {
		name, value, ok := strings.Cut(line, "=")
		if !ok || name == "" {
			return Config{}, invalid("the image sets a variable without a name: %.100q", line)
		}
		out.Env[name] = value
	}
	for port := range c.ExposedPorts {
		out.ExposedPorts = append(out.ExposedPorts, port)
	}
	slices.Sort(out.ExposedPorts)
	if h := c.Healthcheck; h != nil {
		out.Healthcheck = &Healthcheck{Test: h.Test, Interval: h.Interval, Timeout: h.Timeout, StartPeriod: h.StartPeriod, Retries: h.Retries}
	}
	return out, nil
}
