package main

import (
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
)

func newURLCommand() *cobra.Command {
	var timeout spanFlag
	cmd := &cobra.Command{
		Use:   "url ID PORT",
		Short: "Print a link to a port of a sandbox, for a browser",
		Long: `Print a link to a port of a sandbox, for a browser.

The link is good for five minutes. Whoever follows it gets a cookie for that port
and is sent on to its address, which has no secret in it. The cookie is good for
--timeout, at most as long as the sandbox and the API key. --json has a token for
programs, too.`,
		Example:           "  xdg-open $(dormouse url 7kq2 8000)",
		Args:              args(cobra.ExactArgs(2)),
		ValidArgsFunction: completeIDs(1, false),
		RunE: func(cmd *cobra.Command, given []string) error {
			port, err := strconv.Atoi(given[1])
			if err != nil || port < 1 || port > api.MaxPort {
				return usage(cmd, "%q is not a port from 1 to %d", given[1], api.MaxPort)
			}
			req := api.OpenPort{Port: port}
			if timeout.set {
				seconds := timeout.d.Seconds()
				req.TimeoutSeconds = &seconds
			}
			return idVerb(func(cmd *cobra.Command, c *client.Client, id string, _ []string) error {
				out, err := c.OpenPort(cmd.Context(), id, req)
				if err != nil {
					return err
				}
				if asJSON(cmd) {
					return printJSON(cmd, out)
				}
				if out.Link == "" {
					out.Link = out.URL // without a domain: for programs, with a key
				}
				_, err = fmt.Fprintln(cmd.OutOrStdout(), printable(out.Link))
				return err
			})(cmd, given)
		},
	}
	cmd.Flags().Var(&timeout, "timeout", "how long the cookie is good (default 24h)")
	return cmd
}
