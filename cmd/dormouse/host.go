package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
)

func newHostCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "host",
		Short: "Show the machine that runs the sandboxes",
		Args:  args(cobra.NoArgs),
		RunE: verb(func(cmd *cobra.Command, c *client.Client, _ []string) error {
			h, err := c.Host(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON(cmd) {
				return printJSON(cmd, h)
			}
			rows := [][]string{
				{"name", h.Name},
				{"version", h.Version},
				{"vmm", h.VMM},
				{"accelerator", h.Accelerator + ": " + h.AcceleratorReason},
				{"disks", h.DiskDriver + ": " + h.DiskReason},
				{"cgroups", groupsText(h)},
				{"cpus", fmt.Sprint(h.CPUs)},
				{"memory", fmt.Sprintf("%s available of %s, %s promised to sandboxes", mib(h.MemAvailableMiB), mib(h.MemTotalMiB), mib(h.MemCommittedMiB))},
				{"disk", mib(h.DiskFreeMiB) + " free"},
				{"sandboxes", fmt.Sprintf("%d of at most %d", h.Sandboxes, h.MaxSandboxes)},
				{"instance", h.Instance},
			}
			for _, d := range h.Damage {
				rows = append(rows, []string{"DAMAGE", d})
			}
			return table(cmd.OutOrStdout(), nil, rows)
		}),
	}
}

func groupsText(h api.Host) string {
	if h.Cgroup {
		return "one for each VM"
	}
	return "none: " + h.CgroupReason
}
