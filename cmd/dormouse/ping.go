package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/client"
)

func newPingCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "ping ID",
		Short:             "Ask a sandbox's guest agent for a sign of life",
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeIDs(1, false),
		RunE: idVerb(func(cmd *cobra.Command, c *client.Client, id string, _ []string) error {
			p, err := c.Ping(cmd.Context(), id)
			if err != nil {
				return explain(cmd.Context(), c, id, err)
			}
			if asJSON(cmd) {
				return printJSON(cmd, p)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s answered in %.1f ms\n", id, p.Millis)
			return err
		}),
	}
}
