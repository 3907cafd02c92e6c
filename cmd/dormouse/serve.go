package main

import (
	"context"
	"errors"
	"fmt"
	stdlog "log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/dormouse-sandbox/dormouse/control/auth"
	"github.com/dormouse-sandbox/dormouse/control/server"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostserver "github.com/dormouse-sandbox/dormouse/host/server"
	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/netns"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
	"github.com/dormouse-sandbox/dormouse/vmm/qemu"
)

// preparedSlots is how many networks are kept ready ahead.
const preparedSlots = 4

// prepared is what sandboxes are started with.
type prepared struct {
	templates *template.Store
	kernel    string
	initrd    string
	vmm       *qemu.Driver
}

// prepare builds what is missing and finds out how VMs run here. Done once, it
// costs little.
func prepare(ctx context.Context, o upOptions, log *slog.Logger, progress template.Progress) (prepared, error) {
	var p prepared
	var err error
	p.templates, err = template.Open(template.Config{Dir: o.inst.templatesDir(), Cache: o.cache, Log: log})
	if err != nil {
		return p, fmt.Errorf("open templates: %w", err)
	}
	guest, err := guestBinary()
	if err != nil {
		return p, err
	}
	k, err := p.templates.Kernel(ctx, template.KernelConfig{Image: o.kernel, ModulesDir: o.modules, Mirror: o.mirror}, progress)
	if err != nil {
		return p, fmt.Errorf("guest kernel: %w", err)
	}
	if p.kernel, err = p.templates.ELF(ctx, k); err != nil {
		return p, fmt.Errorf("guest kernel: %w", err)
	}
	if p.initrd, err = p.templates.Initramfs(ctx, k, guest); err != nil {
		return p, fmt.Errorf("initramfs: %w", err)
	}
	recipe := template.BaseRecipe()
	recipe.Mirror = o.mirror
	base, err := p.templates.Build(ctx, recipe, progress)
	if err != nil {
		return p, fmt.Errorf("template %s: %w", recipe.Name, err)
	}
	if err := takeInBase(ctx, o, base, log, progress); err != nil {
		return p, fmt.Errorf("template %s: %w", recipe.Name, err)
	}
	p.vmm, err = openVMM(ctx, o, p, log)
	return p, err
}

// guestBinary is the agent that goes into the initramfs: it lies beside us.
func guestBinary() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	path := filepath.Join(filepath.Dir(self), "dormouse-guest")
	if _, err := os.Stat(path); err != nil {
		return "", sandbox.Errorf(sandbox.KindNotFound, "guest agent: %s is missing; make build makes it", path)
	}
	return path, nil
}

func openVMM(ctx context.Context, o upOptions, p prepared, log *slog.Logger) (*qemu.Driver, error) {
	cfg := qemu.Config{Accelerator: o.accel, Reason: "asked for with --accel", Log: log}
	if o.accel == "auto" {
		found, err := qemu.Probe(ctx, o.inst.probe(p.kernel))
		if err != nil {
			return nil, fmt.Errorf("probe KVM: %w", err)
		}
		cfg.Accelerator, cfg.Reason = found.Accelerator, found.Reason
	}
	return qemu.New(cfg)
}

// openHost takes over this machine's sandboxes.
func openHost(ctx context.Context, o upOptions, p prepared, log *slog.Logger, u *undo.Stack) (*host.Agent, error) {
	networks, err := netns.Open(ctx, netns.Config{Instance: o.inst.name, Prepare: preparedSlots, DenyExtra: o.deny, Log: log})
	if err != nil {
		return nil, fmt.Errorf("open networks: %w", err)
	}
	u.PushClose("networks", networks.Close)
	groups, noGroups, closeGroups, err := openGroups(o.inst.name)
	if err != nil {
		return nil, err
	}
	u.PushClose("control groups", closeGroups)
	if noGroups != "" {
		log.Warn("VMs get no control groups", "why", noGroups)
	}
	disks, err := openDisks(o.disk, o.inst, log)
	if err != nil {
		return nil, err
	}
	u.PushClose("disks", disks.close)
	kept, err := openSnapshots(ctx, o.inst, disks, log, u)
	if err != nil {
		return nil, err
	}
	agent, err := host.Open(ctx, host.Config{
		Snapshots: kept.store, Images: kept.hostImages(), Warm: true,
		Dir: o.inst.hostDir(), RunDir: o.inst.runDir(), Instance: o.inst.name, Version: version,
		VMM: p.vmm, Disks: disks.drivers, DiskReason: disks.reason, Groups: groups, GroupsReason: noGroups,
		Networks: host.Slots{Network: networks}, Templates: p.templates, Kitchen: p.templates,
		Kernel: p.kernel, Initrd: p.initrd, UIDBase: o.inst.uidBase(), MaxMemMiB: o.maxMem, BootTimeout: o.boot, Log: log,
	})
	if err != nil {
		return nil, fmt.Errorf("open host agent: %w", err)
	}
	u.PushClose("host agent", agent.Close)
	return agent, nil
}

// serve runs control and host in this process until ctx ends. The sandboxes run
// on afterwards.
func serve(ctx context.Context, o upOptions, log *slog.Logger) (err error) {
	var u undo.Stack
	defer func() { err = errors.Join(err, u.Run(ctx)) }()
	// What net/http says of broken connections, guests can make it say at will.
	stdlog.SetOutput(slog.NewLogLogger(log.Handler(), slog.LevelDebug).Writer())
	state, err := thisServer()
	if err != nil {
		return err
	}
	lock, err := o.inst.lock(state)
	if err != nil {
		return err
	}
	u.PushClose("lock", lock.Close)
	listener, err := listen(o.listen)
	if err != nil {
		return err
	}
	u.PushClose("listener", func() error { return ignoreClosed(listener.Close()) })

	p, err := prepare(ctx, o, log, nil)
	if err != nil {
		return err
	}
	debug.FreeOSMemory() // unpacking a kernel takes much, and only at the first start
	agent, err := openHost(ctx, o, p, log, &u)
	if err != nil {
		return err
	}
	local := hostapi.NewLocal(handlerOf(agent))
	u.PushClose("host api", local.Close)
	db, err := store.OpenSQLite(ctx, o.inst.databasePath())
	if err != nil {
		return fmt.Errorf("open database: %w", err)
	}
	u.PushClose("database", db.Close)
	control, err := server.New(server.Config{
		Host: hostapi.NewClient(local.Client(), local.BaseURL()), Store: db, Keys: auth.New(db, nil),
		Log: log, Version: version, Domain: o.domain,
	})
	if err != nil {
		return err
	}
	u.PushClose("control", control.Close)
	if err := control.Start(ctx); err != nil {
		return fmt.Errorf("start control: %w", err)
	}
	state.URL = "http://" + listener.Addr().String()
	return serveHTTP(ctx, o, state, control, listener, log)
}

func handlerOf(agent *host.Agent) http.Handler {
	path, handler := hostserver.New(agent)
	mux := http.NewServeMux()
	mux.Handle(path, handler)
	return mux
}

// listen takes the port before anything else is done: when it is taken nothing
// has to be undone.
func listen(address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, sandbox.Errorf(sandbox.KindConflict, "%s is taken by another program; dormouse doctor says which, and --listen chooses another address", address)
	}
	return l, err
}

// serveHTTP answers until ctx ends.
func serveHTTP(ctx context.Context, o upOptions, state serverState, control *server.Server, l net.Listener, log *slog.Logger) error {
	if err := o.inst.writeState(state); err != nil {
		return fmt.Errorf("write server state: %w", err)
	}
	web := control.HTTPServer()
	failed := make(chan error, 1)
	go func() { failed <- web.Serve(l) }()
	log.Info("server is up", "url", state.URL, "version", version, "instance", o.inst.name)
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	log.Info("server stops; sandboxes run on", "why", context.Cause(ctx))
	// Short calls may finish; streams are ended by control.Close.
	brief, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if web.Shutdown(brief) != nil {
		return ignoreClosed(web.Close())
	}
	return nil
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
