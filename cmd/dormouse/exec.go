package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// execFlags is how a command is run; run and exec share most of it.
type execFlags struct {
	interactive bool
	tty         bool
	keep        bool // beyond us; for a terminal only
	user, cwd   string
}

func (f *execFlags) register(cmd *cobra.Command) {
	cmd.Flags().BoolVarP(&f.interactive, "interactive", "i", false, "forward standard input even from a terminal")
	cmd.Flags().BoolVarP(&f.tty, "tty", "t", false, "give the command a terminal, with -i ours; without a command a login shell")
	cmd.Flags().StringVarP(&f.user, "user", "u", "", "user to run as (default: the template's)")
	cmd.Flags().StringVarP(&f.cwd, "workdir", "w", "", "directory to run in (default: the template's)")
}

// check refuses what does not go together, before anything is asked of a server.
func (f *execFlags) check(cmd *cobra.Command) error {
	switch {
	case f.keep && !f.tty:
		return usage(cmd, "--keep is for a command in a terminal, with -t")
	case f.tty && asJSON(cmd):
		return usage(cmd, "a terminal has no --json")
	case f.tty && f.interactive && !isTerminal(cmd.InOrStdin()):
		return sandbox.Errorf(sandbox.KindInvalid,
			"standard input is not a terminal, and -i with -t needs one: leave out -t to pipe input into the command, or -i to type nothing")
	}
	return nil
}

// forwards says whether our standard input becomes the command's: always from a
// pipe or a file, from a terminal only when asked for.
func (f *execFlags) forwards(cmd *cobra.Command) bool {
	return f.interactive || !isTerminal(cmd.InOrStdin())
}

func newExecCommand() *cobra.Command {
	var (
		flags   execFlags
		env     []string
		timeout spanFlag
	)
	cmd := &cobra.Command{
		Use:   "exec ID -- COMMAND…",
		Short: "Run a command in a sandbox",
		Long: `Run a command in a sandbox, with its output as it comes, and exit with its status.

Standard input is forwarded unless it is a terminal; -i forwards it from there too.
The status is 124 when --timeout passed, and 125 when the command could not be run.

With -t the command has a terminal, and with -it it is joined with ours: keys go to
the command as they are typed, Ctrl-C and Ctrl-Z too, and it learns of every change
of our window's size. Our terminal is put back however that ends. Without a command
it is the login shell of the user. With --keep the command goes on when we are
ended or the connection is lost; dormouse attach finds it again.`,
		Example:           "  dormouse exec 7kq2 -- python3 -c 'print(6*7)'\n  dormouse exec -it 7kq2\n  tar cz . | dormouse exec 7kq2 -w /home/user -- tar xz",
		Args:              commandArgs,
		ValidArgsFunction: completeIDs(1, false),
		RunE: func(cmd *cobra.Command, given []string) error {
			if err := flags.check(cmd); err != nil {
				return notRun(err)
			}
			vars, err := pairs("env", env, true)
			if err != nil {
				return notRun(err)
			}
			req := api.Exec{
				Command: given[1:], Env: vars, User: flags.user, Cwd: flags.cwd,
				TimeoutSeconds: timeout.d.Seconds(),
			}
			return notRun(idVerb(func(cmd *cobra.Command, c *client.Client, id string, _ []string) error {
				return execIn(cmd, c, id, req, flags)
			})(cmd, given))
		},
	}
	flags.register(cmd)
	cmd.Flags().StringArrayVarP(&env, "env", "e", nil, "NAME=VALUE for the command; NAME alone passes ours on")
	cmd.Flags().Var(&timeout, "timeout", "kill the command after this long (default: never)")
	cmd.Flags().BoolVar(&flags.keep, "keep", false, "with -t: let the command go on when this ends")
	cmd.SetFlagErrorFunc(commandFlagError)
	return cmd
}

// commandArgs checks "WHAT -- COMMAND…". With a terminal there may be no command.
func commandArgs(cmd *cobra.Command, given []string) error {
	least := 2
	if tty, err := cmd.Flags().GetBool("tty"); err == nil && tty {
		least = 1
	}
	if dash := cmd.ArgsLenAtDash(); len(given) < least || (dash != -1 && dash != 1) {
		return notRun(usage(cmd, "usage: %s", cmd.UseLine()))
	}
	return nil
}

func commandFlagError(cmd *cobra.Command, err error) error {
	return notRun(usage(cmd, "%w; put -- before a command that has flags", err))
}

// notRun gives an error the status that says that it is not the command's own.
func notRun(err error) error {
	var already *exitError
	if err == nil || errors.As(err, &already) {
		return err
	}
	return &exitError{exitNotRun, err}
}

// execIn runs a command and reports its exit status as an exitError.
func execIn(cmd *cobra.Command, c *client.Client, id string, req api.Exec, flags execFlags) error {
	if asJSON(cmd) {
		result, err := execWhole(cmd, c, id, req, flags)
		if err != nil {
			return err
		}
		if err := printJSON(cmd, result); err != nil {
			return err
		}
		return exitOf(result.ExitCode, result.Status, result.TimedOut)
	}
	live := execLive
	if flags.tty {
		live = execTerminal
	}
	exit, err := live(cmd, c, id, req, flags)
	if err != nil {
		return err
	}
	return exitOf(exit.Code, exit.Status, exit.TimedOut)
}

func exitOf(code int, status string, timedOut bool) error {
	switch n := commandStatus(code, status, timedOut); {
	case timedOut:
		return &exitError{n, sandbox.Errorf(sandbox.KindInvalid, "the command was killed: its time was up")}
	case n == exitNotRun && code != exitNotRun:
		return &exitError{n, fmt.Errorf("the command ended strangely: %s", status)}
	case n != 0:
		return &exitError{code: n}
	}
	return nil
}

// execWhole runs a command to its end and collects its output.
func execWhole(cmd *cobra.Command, c *client.Client, id string, req api.Exec, flags execFlags) (api.ExecResult, error) {
	if flags.forwards(cmd) {
		input, err := io.ReadAll(io.LimitReader(cmd.InOrStdin(), api.MaxBodyBytes+1))
		if err != nil {
			return api.ExecResult{}, fmt.Errorf("read standard input: %w", err)
		}
		req.Stdin = string(input)
	}
	result, err := c.Exec(cmd.Context(), id, req)
	return result, explain(cmd.Context(), c, id, err)
}

// execLive runs a command with its output as it comes.
func execLive(cmd *cobra.Command, c *client.Client, id string, req api.Exec, flags execFlags) (client.Exit, error) {
	forward := flags.forwards(cmd)
	stream, err := c.ExecStream(cmd.Context(), id, req, client.StreamOptions{
		Stdin: forward, Stdout: cmd.OutOrStdout(), Stderr: cmd.ErrOrStderr(),
	})
	if err != nil {
		return client.Exit{}, explain(cmd.Context(), c, id, err)
	}
	defer func() { _ = stream.Close() }() // never fails; Wait has the error
	if forward {
		// It ends with the input or with the stream; a read that blocks ends with us.
		go func() {
			if _, err := io.Copy(stream, cmd.InOrStdin()); err == nil {
				_ = stream.CloseStdin() // an error means that the command has ended
			}
		}()
	}
	exit, err := stream.Wait()
	return exit, explain(cmd.Context(), c, id, err)
}

// explain adds why a sandbox ended to the error of a call that lost it.
func explain(ctx context.Context, c *client.Client, id string, err error) error {
	if err == nil || ctx.Err() != nil {
		return err
	}
	switch sandbox.KindOf(err) {
	case sandbox.KindTransient, sandbox.KindConflict, sandbox.KindInternal:
	default:
		return err
	}
	s, getErr := c.Get(ctx, id)
	if getErr != nil || !sandbox.State(s.State).Ended() {
		return err // the first error says more
	}
	return sandbox.Errorf(sandbox.KindConflict, "sandbox %s has ended: %s: %w", id, causeOf(s), err)
}

// causeOf says why a sandbox ended.
func causeOf(s api.Sandbox) string {
	switch {
	case s.Cause == "":
		return ""
	case s.CauseDetail == "":
		return s.Cause
	}
	return s.Cause + " (" + s.CauseDetail + ")"
}
