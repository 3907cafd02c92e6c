package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// sizeFlag is a flag in MiB: "512", "512MiB", "1.5GiB", "2G".
type sizeFlag struct{ MiB int }

func (s *sizeFlag) String() string {
	if s.MiB == 0 {
		return ""
	}
	return strconv.Itoa(s.MiB) + "MiB"
}
func (s *sizeFlag) Type() string { return "size" }

func (s *sizeFlag) Set(text string) (err error) {
	s.MiB, err = parseMiB(text)
	return err
}

// parseMiB reads a size. A number alone counts MiB; M, G and T are powers of
// 1024 like MiB, GiB and TiB. MB and GB are refused: people mean either.
func parseMiB(text string) (int, error) {
	number := strings.TrimRight(text, "MGTiB ")
	factor, ok := map[string]float64{
		"": 1, "M": 1, "MiB": 1, "G": 1 << 10, "GiB": 1 << 10, "T": 1 << 20, "TiB": 1 << 20,
	}[strings.TrimSpace(text[len(number):])]
	n, err := strconv.ParseFloat(number, 64)
	if err != nil || !ok || n < 0 || n*factor > 1<<40 {
		return 0, fmt.Errorf("%q is not a size such as 512MiB or 2GiB", text)
	}
	whole := int(n * factor)
	if float64(whole) != n*factor {
		return 0, fmt.Errorf("%q is not a whole number of MiB", text)
	}
	return whole, nil
}

// spanFlag is a length of time: "90s", "2h", or a number of seconds.
type spanFlag struct {
	d   time.Duration
	set bool
}

func (s *spanFlag) String() string {
	if !s.set {
		return ""
	}
	return s.d.String()
}
func (s *spanFlag) Type() string { return "duration" }

func (s *spanFlag) Set(text string) (err error) {
	s.d, err = parseSpan(text)
	s.set = err == nil
	return err
}

// seconds is the length for the API; nil if it was not given.
func (s *spanFlag) seconds() *float64 {
	if !s.set {
		return nil
	}
	n := s.d.Seconds()
	return &n
}

// idleFlags say what becomes of a sandbox that nobody uses.
type idleFlags struct {
	pause        spanFlag
	noAutoResume bool
}

func (i *idleFlags) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.Var(&i.pause, "auto-pause", "pause after so long without commands, transfers or connections; 0 for never")
	f.BoolVar(&i.noAutoResume, "no-auto-resume", false, "do not resume for a call; it is refused instead")
}

// resume is what was said about resuming for calls; nil if nothing was.
func (i *idleFlags) resume(cmd *cobra.Command) *bool {
	if !cmd.Flags().Changed("no-auto-resume") {
		return nil
	}
	on := !i.noAutoResume
	return &on
}

func parseSpan(text string) (time.Duration, error) {
	if seconds, err := strconv.ParseFloat(text, 64); err == nil && seconds >= -1e9 && seconds <= 1e9 {
		return time.Duration(seconds * float64(time.Second)), nil
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		return 0, fmt.Errorf("%q is not a length of time such as 90s, 10m or 2h", text)
	}
	return d, nil
}

// pairs reads NAME=VALUE arguments. With fromOurs, a NAME alone takes the value
// that this process has in its environment.
func pairs(what string, list []string, fromOurs bool) (map[string]string, error) {
	if len(list) == 0 {
		return nil, nil
	}
	out := make(map[string]string, len(list))
	for _, item := range list {
		name, value, ok := strings.Cut(item, "=")
		if !ok && fromOurs {
			if value, ok = os.LookupEnv(name); !ok {
				return nil, sandbox.Errorf(sandbox.KindInvalid, "%s %s has no value here; give it as %s=VALUE", what, name, name)
			}
		}
		if !ok || name == "" {
			return nil, sandbox.Errorf(sandbox.KindInvalid, "%s %q is not NAME=VALUE", what, item)
		}
		out[name] = value
	}
	return out, nil
}

// shape is the flags that say what a sandbox is to be.
type shape struct {
	vcpus      int
	mem, disk  sizeFlag
	timeout    spanFlag
	env        []string
	metadata   []string
	noInternet bool
	noStart    bool
	idle       idleFlags
}

func (s *shape) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.IntVar(&s.vcpus, "vcpus", 0, fmt.Sprintf("number of vCPUs (default %d)", sandbox.DefaultVCPUs))
	f.Var(&s.mem, "mem", fmt.Sprintf("memory, such as 512MiB or 2GiB (default %dMiB)", sandbox.DefaultMemMiB))
	f.Var(&s.disk, "disk", fmt.Sprintf("disk (default %dGiB)", sandbox.DefaultDiskMiB>>10))
	f.Var(&s.timeout, "timeout", fmt.Sprintf("destroy the sandbox after this long (default %v, with --auto-pause %d days)", sandbox.DefaultTimeout, sandbox.MaxTimeout/(24*time.Hour)))
	f.StringArrayVarP(&s.env, "env", "e", nil, "NAME=VALUE for every command in it; NAME alone passes ours on")
	f.StringArrayVar(&s.metadata, "metadata", nil, "NAME=VALUE to find it by")
	f.BoolVar(&s.noInternet, "no-internet", false, "no connections to the internet")
	f.BoolVar(&s.noStart, "no-start", false, "leave the template's start command and its health check alone")
	s.idle.register(cmd)
}

// request turns the flags into the body of a create. A flag that was given as
// zero is out of bounds, not a default.
func (s *shape) request(cmd *cobra.Command, template string) (api.CreateSandbox, error) {
	req := api.CreateSandbox{
		Template: template, VCPUs: s.vcpus, MemMiB: s.mem.MiB, DiskMiB: s.disk.MiB,
		Network: &api.Network{Internet: !s.noInternet},
	}
	for name, given := range map[string]int{"vcpus": s.vcpus, "mem": s.mem.MiB, "disk": s.disk.MiB} {
		if cmd.Flags().Changed(name) && given == 0 {
			return req, usage(cmd, "--%s must not be 0", name)
		}
	}
	if start := !s.noStart; s.noStart {
		req.Start = &start
	}
	req.TimeoutSeconds, req.AutoResume = s.timeout.seconds(), s.idle.resume(cmd)
	if s.idle.pause.set {
		req.AutoPauseSeconds = s.idle.pause.d.Seconds()
	}
	var err error
	if req.Env, err = pairs("env", s.env, true); err != nil {
		return req, err
	}
	req.Metadata, err = pairs("metadata", s.metadata, false)
	return req, err
}
