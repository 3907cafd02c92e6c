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

func newDemoCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "demo",
		Short: "Prove that the server works: run Python in a new sandbox",
		Args:  args(cobra.NoArgs),
		RunE: verb(func(cmd *cobra.Command, c *client.Client, _ []string) error {
			return demo(cmd.Context(), cmd, c)
		}),
	}
}

// demoProgram has one right answer.
var demoProgram = []string{"python3", "-c", "print(6*7)"}

const demoAnswer = "42\n"

// demo creates a sandbox, runs a program in it, checks its answer, and checks
// that the sandbox is gone after its destroy.
func demo(ctx context.Context, cmd *cobra.Command, c *client.Client) (err error) {
	stop := waiting(cmd, "creating a sandbox")
	defer stop()
	start := time.Now()
	seconds := 120.0
	s, err := c.CreateSandbox(ctx, api.CreateSandbox{TimeoutSeconds: &seconds, Metadata: map[string]string{"made-by": "demo"}}, "")
	if err != nil {
		return fmt.Errorf("demo: create: %w", err)
	}
	gone := false
	defer func() {
		if !gone {
			_, undo := c.Delete(context.WithoutCancel(ctx), s.ID)
			err = errors.Join(err, undo)
		}
	}()
	created := time.Since(start)
	res, err := c.Exec(ctx, s.ID, api.Exec{Command: demoProgram})
	if err != nil {
		return fmt.Errorf("demo: exec: %w", err)
	}
	answered := time.Since(start)
	stop()
	if res.Stdout != demoAnswer || res.ExitCode != 0 {
		return sandbox.Errorf(sandbox.KindInternal, "demo: python3 answered %q with exit status %d (stderr %q), want %q and 0",
			res.Stdout, res.ExitCode, res.Stderr, demoAnswer)
	}
	if _, err := c.Delete(ctx, s.ID); err != nil {
		return fmt.Errorf("demo: destroy: %w", err)
	}
	gone = true
	after, err := c.Get(ctx, s.ID)
	if err != nil {
		return fmt.Errorf("demo: look at the destroyed sandbox: %w", err)
	}
	if after.State != string(sandbox.Gone) || after.Cause != string(sandbox.CauseUser) {
		return sandbox.Errorf(sandbox.KindInternal, "demo: the destroyed sandbox is %s (%s), want gone (user)", after.State, after.Cause)
	}
	return say(cmd.OutOrStdout(), `proof: in sandbox %s
  $ python3 -c 'print(6*7)'
  %s  create to answer: %v (sandbox ready after %v)
`, s.ID, res.Stdout, answered.Round(time.Millisecond), created.Round(time.Millisecond))
}
