package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/netns"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm/qemu"
)

func newDownCommand() *cobra.Command {
	var data string
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Stop the server and every sandbox; the data stays",
		Long: `Stop the server and every sandbox, and leave nothing behind: no process,
namespace, network interface, firewall table or temporary file. Templates, keys
and the records of sandboxes stay in the data directory.

It works as well when the server has died.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			inst, err := newInstance(data)
			if err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return sandbox.Errorf(sandbox.KindInvalid, "down needs root: run make down, or sudo dormouse down")
			}
			return down(cmd.Context(), cmd, inst)
		},
	}
	cmd.Flags().StringVar(&data, "data", defaultDataDir, "the data directory that the server was started with")
	return cmd
}

func down(ctx context.Context, cmd *cobra.Command, inst instance) error {
	out := cmd.OutOrStdout()
	if _, err := os.Stat(inst.data); errors.Is(err, os.ErrNotExist) {
		return say(out, "nothing to stop: %s does not exist\n", inst.data)
	}
	stopped, err := inst.stop(ctx)
	if err != nil {
		return err
	}
	lock, err := inst.lock(serverState{}) // no server starts meanwhile
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }() // it goes with the process in any case
	ended, err := endAll(ctx, inst)
	if err != nil {
		return err
	}
	if err := stopPages(ctx, inst); err != nil {
		return fmt.Errorf("stop the page server: %w", err)
	}
	if err := netns.Remove(ctx, netns.Config{Instance: inst.name}); err != nil {
		return fmt.Errorf("remove networks: %w", err)
	}
	if err := errors.Join(os.RemoveAll(inst.runDir()), os.RemoveAll(inst.nodeDir()), osfs.Remove("server-state", inst.statePath())); err != nil {
		return err
	}
	what := "server was not running"
	if stopped {
		what = "server stopped"
	}
	return say(out, "%s, %d sandboxes ended; data stays in %s\n", what, ended, inst.data)
}

// endAll takes over what the server left running and ends it, as the server's
// own agent would.
func endAll(ctx context.Context, inst instance) (ended int, err error) {
	if _, err := os.Stat(inst.hostDir()); errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	var u undo.Stack
	defer func() { err = errors.Join(err, u.Run(ctx)) }()
	log := slog.New(slog.DiscardHandler)
	// The accelerator matters for starting VMs only.
	driver, err := qemu.New(qemu.Config{Accelerator: qemu.TCG, Reason: "only to end VMs", Log: log})
	if err != nil {
		return 0, err
	}
	networks, err := netns.Open(ctx, netns.Config{Instance: inst.name, Log: log})
	if err != nil {
		return 0, fmt.Errorf("open networks: %w", err)
	}
	u.PushClose("networks", networks.Close)
	groups, noGroups, closeGroups, err := openGroups(inst.name)
	if err != nil {
		return 0, err
	}
	u.PushClose("control groups", closeGroups)
	disks, err := openDisks(diskAuto, inst, log)
	if err != nil {
		return 0, err
	}
	u.PushClose("disks", disks.close)
	kept, err := openStore(inst)
	if err != nil {
		return 0, err
	}
	u.PushClose("snapshots", kept.Close)
	agent, err := host.Open(ctx, host.Config{
		Snapshots: kept,
		Dir:       inst.hostDir(), RunDir: inst.runDir(), Instance: inst.name, VMM: driver,
		Disks: disks.drivers, Groups: groups, GroupsReason: noGroups,
		Networks: host.Slots{Network: networks}, UIDBase: inst.uidBase(), Log: log,
	})
	if err != nil {
		return 0, fmt.Errorf("open host agent: %w", err)
	}
	u.PushClose("host agent", agent.Close)
	return agent.DestroyAll(ctx, sandbox.CauseShutdown)
}
