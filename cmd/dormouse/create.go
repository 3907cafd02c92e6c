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

func newCreateCommand() *cobra.Command {
	var what shape
	cmd := &cobra.Command{
		Use:   "create [TEMPLATE | SNAPSHOT]",
		Short: "Create a sandbox and print its ID",
		Long: "Create a sandbox and print its ID once it runs. Without a template it is made from " + sandbox.DefaultTemplate + `.
One that is made from a snapshot goes on where that was taken, with the vCPUs and
the memory that it was taken with.`,
		Example:           "  id=$(dormouse create base --mem 1GiB --timeout 1h)\n  dormouse create with-deps --auto-pause 10m",
		Args:              args(cobra.MaximumNArgs(1)),
		ValidArgsFunction: completeSources,
		RunE: verb(func(cmd *cobra.Command, c *client.Client, given []string) error {
			template := sandbox.DefaultTemplate
			if len(given) == 1 {
				template = given[0]
			}
			req, err := what.request(cmd, template)
			if err != nil {
				return err
			}
			stop := waiting(cmd, "creating a sandbox")
			s, err := createSandbox(cmd.Context(), c, req)
			stop()
			if err != nil {
				return err
			}
			if asJSON(cmd) {
				return printJSON(cmd, s)
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), s.ID)
			return err
		}),
	}
	what.register(cmd)
	return cmd
}

// createSandbox creates, and asks once more, with the same key, when the answer
// was lost on the way: the server then gives the same sandbox, not a second one.
func createSandbox(ctx context.Context, c *client.Client, req api.CreateSandbox) (api.Sandbox, error) {
	key := rand.Text()
	s, err := c.CreateSandbox(ctx, req, key)
	var answered *client.Error
	if sandbox.Is(err, sandbox.KindTransient) && !errors.As(err, &answered) && ctx.Err() == nil {
		s, err = c.CreateSandbox(ctx, req, key)
	}
	if errors.As(err, &answered) && answered.SandboxID != "" {
		return s, sandbox.WithKind(sandbox.KindOf(err), fmt.Errorf("%w; dormouse get %s says more", err, answered.SandboxID))
	}
	return s, err
}
