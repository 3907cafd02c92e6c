package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// destroyLimit bounds how long run waits for its sandbox to go.
const destroyLimit = time.Minute

// runResult is what run prints with --json.
type runResult struct {
	Sandbox api.Sandbox    `json:"sandbox"`
	Result  api.ExecResult `json:"result"`
}

func newRunCommand() *cobra.Command {
	var (
		what  shape
		flags execFlags
		keep  bool
	)
	cmd := &cobra.Command{
		Use:   "run TEMPLATE -- COMMAND…",
		Short: "Create a sandbox, run a command in it, destroy it",
		Long: `Create a sandbox, run a command in it with its output as it comes, destroy it,
and exit with the command's status. The sandbox is destroyed too when the
command fails or Ctrl-C is pressed, unless --keep is given.

The status is 125 when the command could not be run. For -i and -t see dormouse exec.`,
		Example:           "  dormouse run -it base\n  dormouse run base -- python3 -c 'print(6*7)'\n  dormouse run base --mem 1GiB -- python3 < script.py",
		Args:              commandArgs,
		ValidArgsFunction: completeSources,
		RunE: func(cmd *cobra.Command, given []string) error {
			if err := flags.check(cmd); err != nil {
				return notRun(err)
			}
			req, err := what.request(cmd, given[0])
			if err != nil {
				return notRun(err)
			}
			exec := api.Exec{Command: given[1:], User: flags.user, Cwd: flags.cwd}
			return notRun(verb(func(cmd *cobra.Command, c *client.Client, _ []string) error {
				return run(cmd, c, req, exec, flags, keep)
			})(cmd, given))
		},
	}
	what.register(cmd)
	flags.register(cmd)
	cmd.Flags().BoolVar(&keep, "keep", false, "leave the sandbox running and print its ID to standard error")
	cmd.SetFlagErrorFunc(commandFlagError)
	return cmd
}

func run(cmd *cobra.Command, c *client.Client, req api.CreateSandbox, exec api.Exec, flags execFlags, keep bool) (err error) {
	s, err := createUninterrupted(cmd, c, req)
	if err != nil {
		return err
	}
	if keep {
		cmd.PrintErrln("sandbox", s.ID)
	} else {
		defer func() {
			left := destroy(cmd, c, s.ID)
			if left != nil && err != nil { // the command's status is the answer; this must be heard all the same
				complain(cmd.ErrOrStderr(), context.WithoutCancel(cmd.Context()), left)
				return
			}
			err = errors.Join(err, left)
		}()
	}
	if err := cmd.Context().Err(); err != nil {
		return err
	}
	if !asJSON(cmd) {
		return execIn(cmd, c, s.ID, exec, flags)
	}
	result, err := execWhole(cmd, c, s.ID, exec, flags)
	if err != nil {
		return err
	}
	if err := printJSON(cmd, runResult{s, result}); err != nil {
		return err
	}
	return exitOf(result.ExitCode, result.Status, result.TimedOut)
}

// createUninterrupted waits for a create to end even when the caller is
// interrupted: only who knows the ID can destroy what was made.
func createUninterrupted(cmd *cobra.Command, c *client.Client, req api.CreateSandbox) (api.Sandbox, error) {
	ctx := cmd.Context()
	stop := context.AfterFunc(ctx, func() {
		cmd.PrintErrln("dormouse: interrupted; the sandbox is destroyed as soon as it is made (again: leave at once)")
	})
	defer stop()
	done := waiting(cmd, "creating a sandbox")
	defer done()
	return createSandbox(context.WithoutCancel(ctx), c, req)
}

// destroy removes a sandbox whether or not its user is still waiting.
func destroy(cmd *cobra.Command, c *client.Client, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(cmd.Context()), destroyLimit)
	defer cancel()
	if _, err := c.Delete(ctx, id); err != nil && !sandbox.Is(err, sandbox.KindNotFound) {
		return &exitError{exitNotRun, fmt.Errorf("destroy sandbox %s: %w", id, err)}
	}
	return nil
}
