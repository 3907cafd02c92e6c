package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func newForkCommand() *cobra.Command {
	var (
		count         int
		verbose       bool
		timeout       spanFlag
		env, metadata []string
		idle          idleFlags
	)
	cmd := &cobra.Command{
		Use:   "fork ID",
		Short: "Make copies of a sandbox, which runs on",
		Long: `Make copies of a sandbox as it is now, with its memory, its processes and its
disk, and print their IDs once they run. The original runs on. What is not given
the copies have from it.

When some copies fail, those that run are printed and the status says so.`,
		Example:           "  dormouse fork 7kq2 -n 10",
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeIDs(1, false),
		RunE: idVerb(func(cmd *cobra.Command, c *client.Client, id string, _ []string) error {
			if count < 1 || count > sandbox.MaxForks {
				return usage(cmd, "-n is %d, must be from 1 to %d", count, sandbox.MaxForks)
			}
			req := api.Fork{Count: &count, TimeoutSeconds: timeout.seconds(), AutoPauseSeconds: idle.pause.seconds(), AutoResume: idle.resume(cmd)}
			var err error
			if req.Env, err = pairs("env", env, true); err != nil {
				return err
			}
			if req.Metadata, err = pairs("metadata", metadata, false); err != nil {
				return err
			}
			stop := waiting(cmd, "forking")
			f, err := fork(cmd.Context(), c, id, req)
			stop()
			if err != nil {
				return err
			}
			return printForked(cmd, f, verbose)
		}),
	}
	f := cmd.Flags()
	f.IntVarP(&count, "count", "n", 1, fmt.Sprintf("how many copies, at most %d", sandbox.MaxForks))
	f.BoolVarP(&verbose, "verbose", "v", false, "show what each step took, and what was written")
	f.Var(&timeout, "timeout", "destroy them after this long (default: what the original was created with)")
	f.StringArrayVarP(&env, "env", "e", nil, "NAME=VALUE for what is started in them from now on; NAME alone passes ours on")
	f.StringArrayVar(&metadata, "metadata", nil, "NAME=VALUE to find them by (default: that of the original)")
	idle.register(cmd)
	return cmd
}

// fork asks once more, with the same key, when the answer was lost on the way.
func fork(ctx context.Context, c *client.Client, id string, req api.Fork) (api.Forked, error) {
	key := rand.Text()
	f, err := c.Fork(ctx, id, req, key)
	var answered *client.Error
	if sandbox.Is(err, sandbox.KindTransient) && !errors.As(err, &answered) && ctx.Err() == nil {
		f, err = c.Fork(ctx, id, req, key)
	}
	return f, err
}

func printForked(cmd *cobra.Command, f api.Forked, verbose bool) error {
	if asJSON(cmd) {
		return errors.Join(printJSON(cmd, f), forkError(f))
	}
	for _, one := range f.Copies {
		if one.Sandbox == nil {
			continue
		}
		if _, err := fmt.Fprintln(cmd.OutOrStdout(), one.Sandbox.ID); err != nil {
			return err
		}
	}
	if verbose {
		if err := printCost(cmd.ErrOrStderr(), f.Phases, f.Report, nil); err != nil {
			return err
		}
	}
	return forkError(f)
}

// forkError tells of the copies that failed, each reason once.
func forkError(f api.Forked) error {
	var errs []error
	seen := map[string]int{}
	for _, one := range f.Copies {
		if one.Error != nil {
			seen[one.Error.Message]++
		}
	}
	for _, one := range f.Copies {
		if one.Error == nil || seen[one.Error.Message] == 0 {
			continue
		}
		errs = append(errs, sandbox.Errorf(sandbox.Kind(one.Error.Code), "%d of %d copies failed: %s", seen[one.Error.Message], len(f.Copies), one.Error.Message))
		delete(seen, one.Error.Message)
	}
	return errors.Join(errs...)
}
