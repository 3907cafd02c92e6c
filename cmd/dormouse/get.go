package main

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
)

func newGetCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "get ID",
		Aliases:           []string{"inspect"},
		Short:             "Show one sandbox, also one that has ended",
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeIDs(1, false),
		RunE: idVerb(func(cmd *cobra.Command, c *client.Client, id string, _ []string) error {
			s, err := c.Get(cmd.Context(), id)
			if err != nil {
				return err
			}
			if asJSON(cmd) {
				return printJSON(cmd, s)
			}
			return table(cmd.OutOrStdout(), nil, describe(s, time.Now()))
		}),
	}
}

func describe(s api.Sandbox, now time.Time) [][]string {
	internet := "no"
	if s.Network.Internet {
		internet = "yes"
	}
	rows := [][]string{
		{"id", s.ID},
		{"state", s.State},
		{"template", s.Template},
		{"vcpus", strconv.Itoa(s.VCPUs)},
		{"memory", mib(s.MemMiB)},
		{"disk", mib(s.DiskMiB)},
		{"internet", internet},
		{"created", stamp(s.CreatedAt) + ", " + span(now.Sub(s.CreatedAt)) + " ago"},
	}
	if s.Deadline != nil && s.EndedAt == nil {
		rows = append(rows, []string{"expires", stamp(*s.Deadline) + ", in " + span(s.Deadline.Sub(now))})
	}
	rows = append(rows, describePause(s, now)...)
	if s.Frozen != "" {
		rows = append(rows, []string{"frozen", s.Frozen})
	}
	if s.EndedAt != nil {
		rows = append(rows, []string{"ended", stamp(*s.EndedAt)})
	}
	if s.Cause != "" {
		rows = append(rows, []string{"cause", causeOf(s)})
	}
	for _, k := range slices.Sorted(maps.Keys(s.Metadata)) {
		rows = append(rows, []string{"metadata", k + "=" + s.Metadata[k]})
	}
	for _, p := range s.Phases {
		rows = append(rows, []string{"phase", fmt.Sprintf("%s %.1f ms", p.Name, p.Millis)})
	}
	return rows
}

// describePause is what there is to say about pausing.
func describePause(s api.Sandbox, now time.Time) (rows [][]string) {
	if s.PausedAt != nil {
		rows = append(rows, []string{"paused", stamp(*s.PausedAt) + ", " + span(now.Sub(*s.PausedAt)) + " ago, by " + pausedBy(s)})
	}
	if s.Saved != nil {
		rows = append(rows, []string{"pause point", savedText(s.Saved)})
	}
	if s.AutoPauseSeconds > 0 {
		rows = append(rows, []string{"pauses by itself", "after " + span(time.Duration(s.AutoPauseSeconds*float64(time.Second))) + " without activity"})
	}
	if s.AutoPauseError != "" {
		rows = append(rows, []string{"could not pause", s.AutoPauseError})
	}
	if s.PausedAt != nil && !s.AutoResume {
		rows = append(rows, []string{"resumes", "only when asked to: dormouse resume " + s.ID})
	}
	if s.StartedBy != "" && s.StartedBy != "boot" {
		rows = append(rows, []string{"started by", s.StartedBy})
	}
	if s.ForkedFrom != "" {
		rows = append(rows, []string{"copy of", s.ForkedFrom})
	}
	return rows
}

func pausedBy(s api.Sandbox) string {
	if s.PauseReason == "idle" {
		return "its host: it was idle"
	}
	return s.PauseReason
}
