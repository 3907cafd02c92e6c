package main

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
)

func newTemplatesCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "templates",
		Aliases: []string{"template"},
		Short:   "List what sandboxes can be made from",
		Args:    args(cobra.NoArgs),
		RunE: verb(func(cmd *cobra.Command, c *client.Client, _ []string) error {
			list, err := c.Templates(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON(cmd) {
				return printJSON(cmd, api.TemplateList{Templates: append([]api.Template{}, list...)})
			}
			var rows [][]string
			for _, t := range list {
				rows = append(rows, []string{t.Name, size(t.SizeBytes), mib(t.MinDiskMiB), t.DefaultUser, span(time.Since(t.BuiltAt)) + " ago", t.Digest})
			}
			return table(cmd.OutOrStdout(), []string{"NAME", "SIZE", "MIN DISK", "USER", "BUILT", "DIGEST"}, rows)
		}),
	}
}
