package main

import (
	"context"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/client"
)

func newAttachCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "attach ID PID",
		Short: "Go on with a command in a terminal that was started with exec -it --keep",
		Long: `Join our terminal with that of a command in a sandbox, which exec -it --keep has
started. PID is what exec said, or what ps says in the sandbox. What was shown
before is not shown again; most programs draw their screen anew at Ctrl-L.

The command goes on when this ends (by SIGHUP, a lost connection, …). Several may
be attached to one command.`,
		Args:              args(cobra.ExactArgs(2)),
		ValidArgsFunction: completeIDs(1, false),
		RunE: func(cmd *cobra.Command, given []string) error {
			pid, err := strconv.ParseUint(given[1], 10, 32)
			if err != nil || pid == 0 {
				return notRun(usage(cmd, "%q is not a process ID", given[1]))
			}
			flags := execFlags{interactive: true, tty: true, keep: true}
			if err := flags.check(cmd); err != nil {
				return notRun(err)
			}
			return notRun(idVerb(func(cmd *cobra.Command, c *client.Client, id string, _ []string) error {
				open := func(ctx context.Context, opts client.TerminalOptions) (*client.Terminal, error) {
					return c.ConnectTerminal(ctx, id, uint32(pid), opts)
				}
				exit, err := runSession(cmd, c, id, flags, open)
				if err != nil {
					return err
				}
				return exitOf(exit.Code, exit.Status, exit.TimedOut)
			})(cmd, given))
		},
	}
}
