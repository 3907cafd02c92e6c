package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// followEvery is how often logs -f asks for more.
const followEvery = 300 * time.Millisecond

func newLogsCommand() *cobra.Command {
	var (
		follow bool
		tail   uint64
	)
	cmd := &cobra.Command{
		Use:               "logs ID",
		Short:             "Show the console of a sandbox's VM, also after its end",
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeIDs(1, false),
		RunE: idVerb(func(cmd *cobra.Command, c *client.Client, id string, _ []string) error {
			if follow && asJSON(cmd) {
				return usage(cmd, "--follow prints text only, without --json")
			}
			data, next, err := c.Logs(cmd.Context(), id, client.LogOptions{TailBytes: tail})
			if err != nil {
				return err
			}
			if asJSON(cmd) {
				return printJSON(cmd, map[string]any{"data": string(data), "next_offset": next})
			}
			if _, err := cmd.OutOrStdout().Write(data); err != nil || !follow {
				return err
			}
			return followLogs(cmd, c, id, next)
		}),
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until the sandbox ends")
	cmd.Flags().Uint64Var(&tail, "tail", 0, "only so many bytes from the end")
	return cmd
}

// followLogs prints what the console gets, and once more what it has after the
// sandbox has ended.
func followLogs(cmd *cobra.Command, c *client.Client, id string, next uint64) error {
	ctx := cmd.Context()
	for {
		s, err := c.Get(ctx, id)
		if err != nil {
			return err
		}
		data, after, err := c.Logs(ctx, id, client.LogOptions{Offset: next})
		if err != nil {
			return err
		}
		next = after
		if _, err := cmd.OutOrStdout().Write(data); err != nil {
			return err
		}
		if sandbox.State(s.State).Ended() {
			return nil
		}
		if len(data) == 0 {
			if err := pause(ctx, followEvery); err != nil {
				return err
			}
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
