// Package guestapi is the contract between the host and the agent inside a
// VM: where it listens, how it is configured at boot, and how the host signs
// what only the host may ask for.
//
// The process and filesystem services are in proto/ and gen/. See
// docs/guest-api.md for the HTTP half.
package guestapi

import (
	"crypto/ed25519"
	"encoding/base64"
	"fmt"
	"net/netip"
	"strings"
)

// Port is where the agent listens inside the guest.
const Port = 49983

// Version is the version of the public in-sandbox protocol the agent speaks.
// It rises to the next feature level only when all of that level holds.
const Version = "0.6.4"

// Header names.
const (
	HeaderToken     = "X-Access-Token"
	HeaderSignature = "X-Dormouse-Signature"    // see Sign
	HeaderKeepalive = "Keepalive-Ping-Interval" // seconds
	HeaderRecord    = "X-Dormouse-Record"       // of a start: the name under which its output is kept
)

// PathTree is where directories are read and written as tar streams, of TreeType.
const (
	PathTree = "/files/tree"
	TreeType = "application/x-tar"
)

// Records is the guest's directory for the output of processes that were started
// with HeaderRecord: NAME.log, and NAME.log.1 before it, of bounded size.
const Records = "/run/dormouse"

// Boot is what the agent learns from the kernel's command line, as PID 1.
type Boot struct {
	RootDevice string            // "/dev/vda"
	Address    netip.Prefix      // the guest's own, e.g. 100.127.255.2/30
	Gateway    netip.Addr        // also its resolver
	HostKey    ed25519.PublicKey // verifies what the host signs
	Hostname   string
	SandboxID  string // until the first /init
}

// Parameter names on the command line. The kernel hands unknown ones with a dot
// in them to nobody else.
const (
	paramRoot     = "dormouse.root"
	paramAddress  = "dormouse.address"
	paramGateway  = "dormouse.gateway"
	paramHostKey  = "dormouse.hostkey"
	paramHostname = "dormouse.hostname"
	paramSandbox  = "dormouse.sandbox"
)

// Cmdline writes b as kernel parameters.
func (b Boot) Cmdline() string {
	params := []string{paramRoot + "=" + b.RootDevice}
	if b.Address.IsValid() {
		params = append(params, paramAddress+"="+b.Address.String(), paramGateway+"="+b.Gateway.String())
	}
	if len(b.HostKey) > 0 {
		params = append(params, paramHostKey+"="+base64.RawURLEncoding.EncodeToString(b.HostKey))
	}
	if b.Hostname != "" {
		params = append(params, paramHostname+"="+b.Hostname)
	}
	if b.SandboxID != "" {
		params = append(params, paramSandbox+"="+b.SandboxID)
	}
	return strings.Join(params, " ")
}

// ParseCmdline reads what Cmdline wrote out of a whole kernel command line.
func ParseCmdline(cmdline string) (Boot, error) {
	var b Boot
	for field := range strings.FieldsSeq(cmdline) {
		key, value, ok := strings.Cut(field, "=")
		if !ok {
			continue
		}
		var err error
		switch key {
		case paramRoot:
			b.RootDevice = value
		case paramAddress:
			b.Address, err = netip.ParsePrefix(value)
		case paramGateway:
			b.Gateway, err = netip.ParseAddr(value)
		case paramHostname:
			b.Hostname = value
		case paramSandbox:
			b.SandboxID = value
		case paramHostKey:
			var key []byte
			key, err = base64.RawURLEncoding.DecodeString(value)
			if err == nil && len(key) != ed25519.PublicKeySize {
				err = fmt.Errorf("a key has %d bytes, not %d", ed25519.PublicKeySize, len(key))
			}
			b.HostKey = key
		}
		if err != nil {
			return Boot{}, fmt.Errorf("kernel parameter %s: %w", key, err)
		}
	}
	if b.RootDevice == "" {
		return Boot{}, fmt.Errorf("no kernel parameter %s", paramRoot)
	}
	return b, nil
}

// Init is the body of POST /init: who this sandbox is. Fields that are absent
// leave what was set before.
type Init struct {
	EnvVars        map[string]string `json:"envVars,omitempty"`
	AccessToken    string            `json:"accessToken,omitempty"`
	Timestamp      string            `json:"timestamp,omitempty"` // RFC 3339; the clock is stepped to it
	DefaultUser    string            `json:"defaultUser,omitempty"`
	DefaultWorkdir string            `json:"defaultWorkdir,omitempty"`

	// The fields below are ours and are honoured only in a signed request.
	SandboxID string `json:"sandboxID,omitempty"`
	Hostname  string `json:"hostname,omitempty"`
	Entropy   []byte `json:"entropy,omitempty"` // mixed into the kernel's random pool

	// Restored says that this machine is a copy of one that was saved, or has slept:
	// all of this call is done while user processes stand still, connections and
	// streams of the past are ended, the image's hooks run, and then user
	// processes go on. The answer is 200 with an Identified.
	//
	// When something of it fails, they still stand still, and the guest is still
	// who it was before: the call can be made again.
	Restored bool `json:"restored,omitempty"`
	// Rehearsal says with Restored that this machine was only booted, and will be kept
	// to be copied: all of the call is done but for the image's hooks and the end of
	// calls, so that a copy finds in memory what it needs for its own.
	Rehearsal bool `json:"rehearsal,omitempty"`
	// Unused says with Restored that nobody has had this machine before: if nothing
	// runs in it either, nothing is frozen, and no connection leads to a past.
	Unused bool `json:"unused,omitempty"`
	// NewMachineID replaces /etc/machine-id, where the image has that file. A copy
	// wants it; a sandbox that has only slept does not.
	NewMachineID bool `json:"newMachineID,omitempty"`
}

// Metrics is the body of GET /metrics.
type Metrics struct {
	Timestamp  int64   `json:"ts"` // Unix seconds
	CPUCount   int     `json:"cpu_count"`
	CPUUsedPct float64 `json:"cpu_used_pct"` // since the previous call, of all CPUs: 0 to 100
	MemTotal   uint64  `json:"mem_total"`    // bytes
	MemUsed    uint64  `json:"mem_used"`
	MemCache   uint64  `json:"mem_cache"`
	DiskUsed   uint64  `json:"disk_used"`
	DiskTotal  uint64  `json:"disk_total"`
}

// WrittenFile is one element of the answer to POST /files.
type WrittenFile struct {
	Name     string            `json:"name"`
	Type     string            `json:"type"` // "file"
	Path     string            `json:"path"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

// Error is the body of an HTTP error of the agent.
type Error struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}
