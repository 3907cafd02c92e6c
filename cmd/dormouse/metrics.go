package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/client"
)

func newMetricsCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "metrics ID",
		Short:             "Show what a sandbox uses",
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeIDs(1, false),
		RunE: idVerb(func(cmd *cobra.Command, c *client.Client, id string, _ []string) error {
			m, err := c.Metrics(cmd.Context(), id)
			if err != nil {
				return explain(cmd.Context(), c, id, err)
			}
			if asJSON(cmd) {
				return printJSON(cmd, m)
			}
			return table(cmd.OutOrStdout(), nil, [][]string{
				{"cpu", fmt.Sprintf("%.1f %% of %d", m.CPUUsedPct, m.CPUCount)},
				{"memory", size(m.MemUsedBytes) + " of " + size(m.MemTotalBytes) + ", and " + size(m.MemCacheBytes) + " of cache"},
				{"disk", size(m.DiskUsedBytes) + " of " + size(m.DiskTotalBytes)},
				{"host memory", size(m.HostRSSBytes) + " resident"},
				{"host disk", size(m.HostOverlayBytes) + " allocated for changes"},
			})
		}),
	}
}
