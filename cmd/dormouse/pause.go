package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
)

// changeAtOnce is how many pauses or resumes are under way.
const changeAtOnce = 4

func newPauseCommand() *cobra.Command {
	var verbose bool
	cmd := &cobra.Command{
		Use:   "pause ID…",
		Short: "Stop sandboxes and keep them on disk",
		Long: `Stop sandboxes, keep their memory and disk, and print their IDs once that is
durable. They use no memory and no processor then. Their processes go on after a
resume; commands and connections that are under way are cut off.

A paused sandbox has no deadline. A call into it, such as exec, resumes it, unless
it was created with --no-auto-resume.`,
		Example:           "  dormouse pause -v 7kq2",
		Args:              args(cobra.MinimumNArgs(1)),
		ValidArgsFunction: completeStates(1<<10, "running", "resuming"),
		RunE: verb(func(cmd *cobra.Command, c *client.Client, given []string) error {
			return changeEach(cmd, c, given, "pausing", verbose, c.Pause)
		}),
	}
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "show what each step took, and what was written")
	return cmd
}

func newResumeCommand() *cobra.Command {
	var (
		verbose bool
		timeout spanFlag
		env     []string
	)
	cmd := &cobra.Command{
		Use:   "resume ID…",
		Short: "Run paused sandboxes again",
		Long: `Run paused sandboxes again and print their IDs once their guests answer. Each has
the time to live that it was created with, or --timeout. One that runs is left as
it is.`,
		Example:           "  dormouse resume 7kq2 --timeout 1h",
		Args:              args(cobra.MinimumNArgs(1)),
		ValidArgsFunction: completeStates(1<<10, "paused", "pausing"),
		RunE: verb(func(cmd *cobra.Command, c *client.Client, given []string) error {
			req := api.Resume{TimeoutSeconds: timeout.seconds()}
			var err error
			if req.Env, err = pairs("env", env, true); err != nil {
				return err
			}
			return changeEach(cmd, c, given, "resuming", verbose, func(ctx context.Context, id string) (api.Sandbox, error) {
				return c.Resume(ctx, id, req)
			})
		}),
	}
	f := cmd.Flags()
	f.BoolVarP(&verbose, "verbose", "v", false, "show what each step took")
	f.Var(&timeout, "timeout", "destroy them after this long (default: what they were created with)")
	f.StringArrayVarP(&env, "env", "e", nil, "NAME=VALUE for what is started in them from now on; NAME alone passes ours on")
	return cmd
}

// changeEach pauses or resumes all of them, a few at a time, and joins the errors.
// All are found before any is changed.
func changeEach(cmd *cobra.Command, c *client.Client, given []string, doing string, verbose bool, change func(context.Context, string) (api.Sandbox, error)) error {
	ids := make([]string, len(given))
	for i, g := range given {
		var err error
		if ids[i], err = findID(cmd.Context(), c, g); err != nil {
			return err
		}
	}
	stop := waiting(cmd, doing)
	results, errs := make([]api.Sandbox, len(ids)), make([]error, len(ids))
	var group errgroup.Group
	group.SetLimit(changeAtOnce)
	for i, id := range ids {
		group.Go(func() error {
			results[i], errs[i] = change(cmd.Context(), id)
			return nil
		})
	}
	_ = group.Wait() // each error is in errs
	stop()
	changed := []api.Sandbox{}
	for i, s := range results {
		if errs[i] != nil {
			errs[i] = fmt.Errorf("%s %s: %w", doing, ids[i], errs[i])
			continue
		}
		changed = append(changed, s)
	}
	return errors.Join(append(errs, printChanged(cmd, changed, verbose))...)
}

func printChanged(cmd *cobra.Command, changed []api.Sandbox, verbose bool) error {
	if asJSON(cmd) {
		return printJSON(cmd, api.SandboxList{Sandboxes: changed})
	}
	for _, s := range changed {
		if _, err := fmt.Fprintln(cmd.OutOrStdout(), s.ID); err != nil {
			return err
		}
		if verbose {
			if err := printCost(cmd.ErrOrStderr(), s.Phases, s.Report, s.Saved); err != nil {
				return err
			}
		}
	}
	return nil
}

// printCost shows what each step of a verb took, and what was written.
func printCost(w io.Writer, phases []api.Phase, report *api.SaveReport, saved *api.Saved) error {
	var rows [][]string
	for _, p := range phases {
		rows = append(rows, []string{"  " + p.Name, fmt.Sprintf("%.1f ms", p.Millis)})
	}
	if report != nil {
		if report.StoppedMillis > 0 {
			rows = append(rows, []string{"  stood still", fmt.Sprintf("%.1f ms", report.StoppedMillis)})
		}
		rows = append(rows,
			[]string{"  pages", fmt.Sprintf("%d changed of %d that may have", report.ChangedPages, report.DirtyPages)},
			[]string{"  blocks", fmt.Sprintf("%d changed of %d that may have", report.ChangedBlocks, report.DirtyBlocks)},
			[]string{"  written", bytesText(report.BytesWritten)})
	}
	if report != nil && saved != nil {
		rows = append(rows, []string{"  kept", savedText(saved)})
	}
	return table(w, nil, rows)
}

func bytesText(n int64) string { return size(uint64(max(n, 0))) }

// savedText says in a line what is kept.
func savedText(s *api.Saved) string {
	return fmt.Sprintf("generation %d, %s of memory and %s of disk, %s of that its own, durable: %s",
		s.Generation, bytesText(s.MemoryBytes), bytesText(s.DiskBytes), bytesText(s.OwnBytes), s.Durability)
}
