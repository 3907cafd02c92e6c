// Command dormouse-guest is the agent inside a virtual machine: /init of its
// initramfs, and PID 1 of the guest. As any other process it serves the same
// contract on the machine it runs on, for tests and for development.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/guest/account"
	"github.com/dormouse-sandbox/dormouse/guest/agent"
	"github.com/dormouse-sandbox/dormouse/guest/boot"
	"github.com/dormouse-sandbox/dormouse/guest/exec"
	"github.com/dormouse-sandbox/dormouse/guest/files"
	"github.com/dormouse-sandbox/dormouse/guest/freezer"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/guest/hooks"
	"github.com/dormouse-sandbox/dormouse/guest/identity"
	"github.com/dormouse-sandbox/dormouse/guest/reap"
)

// memoryGoal is where the collector starts to work harder, in bytes. An idle
// agent is far below it.
const memoryGoal = 24 << 20

func main() {
	began := time.Now()
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(40)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryGoal)
	}
	if os.Getpid() == 1 {
		runInit(began)
	}
	if err := runPlain(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "dormouse-guest: %v\n", err)
		os.Exit(1)
	}
}

// runInit is the life of PID 1. It ends with the machine.
func runInit(began time.Time) {
	err := serveGuest(began)
	if err != nil {
		fmt.Fprintf(os.Stderr, "dormouse-guest: %s\n", strings.ReplaceAll(err.Error(), "\n", "; ")) // one line for the host
	}
	err = boot.PowerOff("")
	fmt.Fprintf(os.Stderr, "dormouse-guest: power off: %v\n", err)
	select {} // PID 1 must not end: the kernel would panic and hide what it said
}

func serveGuest(began time.Time) error {
	ctx, stop := signal.NotifyContext(context.Background(),
		unix.SIGTERM, unix.SIGINT, unix.SIGPWR, unix.SIGUSR2) // what shutdown tools send to PID 1
	defer stop()
	if err := os.Setenv("PATH", boot.Path); err != nil {
		return fmt.Errorf("environment: %w", err)
	}
	system, err := boot.Up()
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", ":"+strconv.Itoa(guestapi.Port))
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	cfg, reaper := configure(account.Dir("/etc"), defaultUser("/etc"), "", system.UserCgroup, guestapi.Records)
	restorable(&cfg, reaper, system)
	cfg.PowerOff = stop
	if len(system.Boot.HostKey) > 0 {
		cfg.Verifier = guestapi.NewVerifier(system.Boot.HostKey)
		cfg.Identity.BootedAs(system.Boot.SandboxID)
	}
	for _, warning := range system.Warnings {
		fmt.Fprintf(os.Stderr, "dormouse-guest: warning: %s\n", warning)
	}
	fmt.Fprintf(os.Stderr, "dormouse-guest: ready in %d ms\n", time.Since(began).Milliseconds())
	time.AfterFunc(2*time.Second, debug.FreeOSMemory) // what only the start needed
	err = agent.New(cfg).Serve(ctx, listener)
	if err == nil {
		fmt.Fprintln(os.Stderr, "dormouse-guest: powering off")
	}
	if err := boot.PowerOff(system.UserCgroup); err != nil {
		return fmt.Errorf("power off: %w", err)
	}
	return err
}

// configure builds the parts. PID 1 reaps strangers as well.
func configure(accounts account.Dir, user, workdir, cgroup, records string) (agent.Config, *reap.Reaper) {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	current := identity.New(accounts, user, workdir)
	reaper := &reap.Reaper{}
	if os.Getpid() == 1 {
		go reaper.Run(context.Background()) // as long as the machine
	}
	return agent.Config{
		Identity: current,
		Exec:     exec.New(exec.Config{Identity: current, Reaper: reaper, Cgroup: cgroup, Records: records, Log: log}),
		Files:    files.New(current, log),
		Log:      log,
	}, reaper
}

// restorable adds what only a machine has: it can be frozen, saved, and told that
// it is a copy.
func restorable(cfg *agent.Config, reaper *reap.Reaper, system *boot.System) {
	cfg.Machine = system
	runner := &hooks.Runner{
		Dir: hooks.Dir, Reaper: reaper, Path: boot.Path, Limit: guestapi.HookLimit, Total: guestapi.HooksLimit,
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil)), // what they say is for the console
	}
	if system.UserCgroup != "" {
		cfg.Freezer = freezer.New(filepath.Dir(system.UserCgroup), boot.AgentCgroup, boot.HookCgroup)
		runner.Cgroup = system.HookCgroup
		runner.Leftovers = filepath.Join(system.UserCgroup, "hooks")
	}
	cfg.Hooks = runner.Run
}

// defaultUser is who runs commands until the host says otherwise.
func defaultUser(etc account.Dir) string {
	if u, err := etc.User("user"); err == nil {
		return u.Name
	}
	return "root"
}

func runPlain(args []string) error {
	me, err := account.Dir("/etc").ByUID(uint32(os.Geteuid()))
	if err != nil {
		return err
	}
	flags := flag.NewFlagSet("dormouse-guest", flag.ContinueOnError)
	listen := flags.String("listen", "127.0.0.1:"+strconv.Itoa(guestapi.Port), "address to serve on; port 0 picks one")
	user := flags.String("user", me.Name, "default user of commands and files")
	workdir := flags.String("workdir", "", "default working directory (the user's home)")
	if err := flags.Parse(args); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	fmt.Println("listening on", listener.Addr())
	cfg, _ := configure("/etc", *user, *workdir, "", "")
	return errors.Join(agent.New(cfg).Serve(ctx, listener), cfg.Files.Close())
}
