package main

import (
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func newLsCommand() *cobra.Command {
	var (
		opts     client.ListOptions
		metadata []string
		quiet    bool
	)
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list", "ps"},
		Short:   "List sandboxes",
		Args:    args(cobra.NoArgs),
		RunE: verb(func(cmd *cobra.Command, c *client.Client, _ []string) (err error) {
			if opts.Metadata, err = pairs("metadata", metadata, false); err != nil {
				return err
			}
			list, err := listAll(cmd, c, opts)
			if err != nil {
				return err
			}
			if asJSON(cmd) {
				return printJSON(cmd, api.SandboxList{Sandboxes: list})
			}
			header, rows := listRows(list, opts.All || len(opts.States) > 0, time.Now())
			if quiet {
				header = nil
				for i := range rows {
					rows[i] = rows[i][:1]
				}
			}
			return table(cmd.OutOrStdout(), header, rows)
		}),
	}
	f := cmd.Flags()
	f.BoolVarP(&opts.All, "all", "a", false, "also those that have ended, with their cause")
	f.StringSliceVar(&opts.States, "state", nil, "only those in these states")
	f.StringVar(&opts.Template, "template", "", "only those made from this template")
	f.StringArrayVar(&metadata, "metadata", nil, "only those with NAME=VALUE")
	f.BoolVarP(&quiet, "quiet", "q", false, "IDs only")
	return cmd
}

func listAll(cmd *cobra.Command, c *client.Client, opts client.ListOptions) ([]api.Sandbox, error) {
	list := []api.Sandbox{} // an empty list is [] in JSON, not null
	for s, err := range c.Sandboxes(cmd.Context(), opts) {
		if err != nil {
			return nil, err
		}
		list = append(list, s)
	}
	return list, nil
}

func listRows(list []api.Sandbox, causes bool, now time.Time) (header []string, rows [][]string) {
	header = []string{"ID", "STATE", "TEMPLATE", "VCPUS", "MEM", "AGE", "EXPIRES IN"}
	saved := slices.ContainsFunc(list, func(s api.Sandbox) bool { return s.Saved != nil })
	if saved {
		header = append(header, "GEN", "ON DISK", "OWN")
	}
	if causes {
		header = append(header, "CAUSE")
	}
	for _, s := range list {
		row := []string{s.ID, stateText(s), s.Template, strconv.Itoa(s.VCPUs), mib(s.MemMiB), span(now.Sub(s.CreatedAt)), expires(s, now)}
		if saved {
			row = append(row, savedCells(s.Saved)...)
		}
		if causes {
			row = append(row, s.Cause)
		}
		rows = append(rows, row)
	}
	return header, rows
}

// savedCells are the generation of a pause point, its allocated bytes, and those of
// them that are its own.
func savedCells(s *api.Saved) []string {
	if s == nil {
		return []string{"-", "-", "-"}
	}
	return []string{strconv.Itoa(s.Generation), bytesText(s.MemoryBytes + s.DiskBytes), bytesText(s.OwnBytes)}
}

func stateText(s api.Sandbox) string {
	switch {
	case s.Frozen != "":
		return s.State + ", frozen (" + s.Frozen + ")"
	case s.PauseReason == string(sandbox.PauseIdle):
		return s.State + " (idle)"
	case s.AutoPauseError != "":
		return s.State + ", not paused: " + s.AutoPauseError
	}
	return s.State
}

func expires(s api.Sandbox, now time.Time) string {
	if s.EndedAt != nil || s.Deadline == nil {
		return "-"
	}
	return span(s.Deadline.Sub(now))
}
