package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// defaultCache is where builds are kept by their content; it may be deleted.
const defaultCache = "/var/cache/dormouse"

// upOptions is how a server is run.
type upOptions struct {
	inst    instance
	listen  string
	domain  string
	cache   string
	accel   string
	disk    string
	kernel  string
	modules string
	mirror  string
	maxMem  int
	boot    time.Duration // 0 is the host's default
	deny    []netip.Prefix
	detach  bool
	demo    bool
	args    []string // the same, for the detached process
}

func newUpCommand() *cobra.Command {
	var o upOptions
	var data string
	var deny []string
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Run the server: control and host in one process",
		Long: `Run the server: control and host in one process.

It needs root. The first start builds the default template and prepares a guest
kernel. Sandboxes outlive the server: stop it, start it again, and they are
there. "dormouse down" ends them.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if o.inst, err = newInstance(data); err != nil {
				return err
			}
			for _, d := range deny {
				p, err := netip.ParsePrefix(d)
				if err != nil {
					return usage(cmd, "--deny %q is not a network like 10.1.0.0/16", d)
				}
				o.deny = append(o.deny, p)
			}
			if err := o.check(cmd); err != nil {
				return err
			}
			o.args = []string{
				"up", "--demo=false", "--data", o.inst.data, "--listen", o.listen, "--domain", o.domain, "--cache", o.cache, "--accel", o.accel, "--disk", o.disk,
				"--kernel", o.kernel, "--modules", o.modules, "--mirror", o.mirror, fmt.Sprint("--max-mem=", o.maxMem),
				"--boot-timeout", o.boot.String(),
			}
			for _, d := range deny {
				o.args = append(o.args, "--deny", d)
			}
			return up(cmd.Context(), cmd, o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&data, "data", defaultDataDir, "where everything that lasts is kept")
	f.StringVar(&o.listen, "listen", defaultListen, "address of the API; it is plain HTTP")
	f.StringVar(&o.domain, "domain", "localhost", "ports of sandboxes are at PORT-ID.DOMAIN for browsers; empty: nowhere")
	f.StringVar(&o.cache, "cache", defaultCache, "where builds are kept; may be deleted at any time")
	f.StringVar(&o.accel, "accel", "auto", "how VMs run: kvm, tcg (software emulation), or auto, which tries KVM")
	f.StringVar(&o.disk, "disk", diskAuto, "how disks of sandboxes are made: dm (device-mapper), qcow (QEMU's overlays), or auto: dm where the kernel has it")
	f.StringVar(&o.kernel, "kernel", "", "a guest kernel of your own (vmlinuz or vmlinux); default: Debian's cloud kernel")
	f.StringVar(&o.modules, "modules", "", "the /lib/modules/RELEASE of --kernel")
	f.StringVar(&o.mirror, "mirror", "", "URL of the Debian archive to build from; default: what mmdebstrap chooses")
	f.IntVar(&o.maxMem, "max-mem", 0, "MiB that all sandboxes together may be promised; default: what the machine has, less 512")
	f.DurationVar(&o.boot, "boot-timeout", 0, "how long a sandbox may take to boot; default: 1m; more where VMs are slow, as with nested virtualisation")
	f.StringArrayVar(&deny, "deny", nil, "a further network that no sandbox reaches, such as 10.1.0.0/16 (repeat for more)")
	f.BoolVar(&o.detach, "detach", false, "return when the server is up, and leave it running")
	f.BoolVar(&o.demo, "demo", true, "with --detach: run something in a sandbox at the end, as proof")
	return cmd
}

// domainPattern is a DNS name, without a dot at its end.
var domainPattern = regexp.MustCompile(`^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

func (o upOptions) check(cmd *cobra.Command) error {
	switch {
	case runtime.GOOS != "linux" || runtime.GOARCH != "amd64":
		return sandbox.Errorf(sandbox.KindUnsupported, "dormouse runs on Linux on x86-64, this is %s on %s", runtime.GOOS, runtime.GOARCH)
	case os.Geteuid() != 0:
		return sandbox.Errorf(sandbox.KindInvalid, "up needs root for namespaces and VM users: run make up, or sudo dormouse up")
	case o.accel != "auto" && o.accel != "kvm" && o.accel != "tcg":
		return usage(cmd, "--accel is %q, must be auto, kvm or tcg", o.accel)
	case o.disk != diskAuto && o.disk != diskDM && o.disk != diskQcow:
		return usage(cmd, "--disk is %q, must be auto, dm or qcow", o.disk)
	case o.boot < 0:
		return usage(cmd, "--boot-timeout is %v, must not be negative", o.boot)
	case len(o.domain) > 200 || o.domain != "" && !domainPattern.MatchString(o.domain):
		return usage(cmd, "--domain is %q, must be a name such as boxes.example.org, in lower case", o.domain)
	case o.maxMem < 0:
		return usage(cmd, "--max-mem is %d, must not be negative", o.maxMem)
	}
	return nil
}

func up(ctx context.Context, cmd *cobra.Command, o upOptions) error {
	if err := o.inst.makeData(); err != nil {
		return err
	}
	if !o.detach {
		return serve(ctx, o, slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil)))
	}
	out := cmd.OutOrStdout()
	state, err := ensureServer(ctx, cmd, o)
	if err != nil {
		return err
	}
	owner, err := invokingUser()
	if err != nil {
		return err
	}
	c, err := ensureKey(ctx, o.inst, state.URL, owner)
	if err != nil {
		return err
	}
	defer c.CloseIdle()
	if err := printBanner(ctx, out, c, state.URL); err != nil {
		return err
	}
	if !o.demo {
		return nil
	}
	if err := demo(ctx, cmd, c); err != nil {
		return err
	}
	return printNext(out, owner)
}

// ensureServer finds the server of this instance up and of our version, or
// starts it.
func ensureServer(ctx context.Context, cmd *cobra.Command, o upOptions) (serverState, error) {
	out := cmd.OutOrStdout()
	state, alive, err := o.inst.awaitStart(ctx)
	if err != nil {
		return state, err
	}
	if alive && state.Version == version && healthy(ctx, state.URL) {
		return state, say(out, "server is up already: %s\n", state.URL)
	}
	painter := newPainter(cmd)
	_, err = prepare(ctx, o, slog.New(slog.DiscardHandler), painter.event)
	painter.done()
	if err != nil {
		return state, err
	}
	if alive {
		if err := say(out, "restarting the server (%s, now %s); its sandboxes run on\n", state.Version, version); err != nil {
			return state, err
		}
		if _, err := o.inst.stop(ctx); err != nil {
			return state, err
		}
	}
	return startDetached(ctx, o)
}

// startDetached starts the server as a process of its own and waits until it
// answers. When it does not come up, the end of its log is in the error.
func startDetached(ctx context.Context, o upOptions) (serverState, error) {
	logFile, offset, err := openLog(o.inst.logPath())
	if err != nil {
		return serverState{}, err
	}
	defer func() { _ = logFile.Close() }() // the server has its own
	self, err := os.Executable()
	if err != nil {
		return serverState{}, err
	}
	child := exec.Command(self, o.args...)
	child.Stdout, child.Stderr, child.Dir = logFile, logFile, "/"
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // it outlives this terminal
	if err := child.Start(); err != nil {
		return serverState{}, fmt.Errorf("start server: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- child.Wait() }()
	const limit = 2 * time.Minute
	deadline := time.After(limit)
	for {
		state, alive, err := o.inst.running()
		if err == nil && alive && state.URL != "" && state.PID == child.Process.Pid && healthy(ctx, state.URL) {
			return state, nil
		}
		select {
		case err := <-ended:
			// Another "up" may have been a moment faster.
			if other, alive, otherErr := o.inst.awaitStart(ctx); otherErr == nil && alive && other.Version == version && healthy(ctx, other.URL) {
				return other, nil
			}
			return serverState{}, fmt.Errorf("the server ended (%w): %s", errors.Join(err, io.EOF), tailOf(o.inst.logPath(), offset))
		case <-deadline:
			return serverState{}, sandbox.Errorf(sandbox.KindTimeout, "the server does not answer within %v: %s", limit, tailOf(o.inst.logPath(), offset))
		case <-ctx.Done():
			return serverState{}, context.Cause(ctx)
		case <-time.After(30 * time.Millisecond):
		}
	}
}

// openLog opens the server's log for more. One that has grown large is put
// aside first, in place of the one before.
func openLog(path string) (f *os.File, offset int64, err error) {
	const most = 16 << 20
	if info, err := os.Stat(path); err == nil && info.Size() > most {
		if err := os.Rename(path, path+".old"); err != nil {
			return nil, 0, err
		}
	}
	f, err = os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, 0, fmt.Errorf("open server log: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, info.Size(), nil
}

// tailOf is the end of what was written to a log since offset.
func tailOf(path string, offset int64) string {
	const most = 2000
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	data = bytes.TrimSpace(data[min(int(offset), len(data)):])
	if len(data) > most {
		data = data[len(data)-most:]
	}
	return filepath.Base(path) + " says: " + string(data)
}

func say(w io.Writer, format string, a ...any) error {
	_, err := fmt.Fprintf(w, format, a...)
	return err
}
