package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/client"
)

func newTimeoutCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "timeout ID DURATION",
		Short:             "Let a sandbox live for so long from now on",
		Example:           "  dormouse timeout 7kq2 2h",
		Args:              args(cobra.ExactArgs(2)),
		ValidArgsFunction: completeIDs(1, false),
		RunE: func(cmd *cobra.Command, given []string) error {
			d, err := parseSpan(given[1])
			if err != nil {
				return usage(cmd, "%w", err)
			}
			return idVerb(func(cmd *cobra.Command, c *client.Client, id string, _ []string) error {
				s, err := c.SetTimeout(cmd.Context(), id, d)
				if err != nil {
					return err
				}
				if asJSON(cmd) {
					return printJSON(cmd, s)
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s expires in %s\n", id, expires(s, time.Now()))
				return err
			})(cmd, given)
		},
	}
}
