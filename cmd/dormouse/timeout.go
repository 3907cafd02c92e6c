package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
)

func newTimeoutCommand() *cobra.Command {
	var (
		idle       spanFlag
		autoResume bool
	)
	cmd := &cobra.Command{
		Use:   "timeout ID [DURATION]",
		Short: "Let a sandbox live for so long from now on, or pause by itself",
		Long: `Let a sandbox live for so long from now on. While it is paused it has no deadline:
then it is how long it lives from its next resume on.

--auto-pause and --auto-resume say anew what becomes of it when nobody uses it.`,
		Example:           "  dormouse timeout 7kq2 2h\n  dormouse timeout 7kq2 --auto-pause 10m",
		Args:              args(cobra.RangeArgs(1, 2)),
		ValidArgsFunction: completeIDs(1, false),
		RunE: func(cmd *cobra.Command, given []string) error {
			var limits api.Timeout
			if len(given) == 2 {
				d, err := parseSpan(given[1])
				if err == nil && d == 0 {
					err = errors.New("the duration must not be 0")
				}
				if err != nil {
					return usage(cmd, "%w", err)
				}
				limits.TimeoutSeconds = d.Seconds()
			}
			limits.AutoPauseSeconds = idle.seconds()
			if cmd.Flags().Changed("auto-resume") {
				limits.AutoResume = &autoResume
			}
			if limits == (api.Timeout{}) {
				return usage(cmd, "give a duration, --auto-pause or --auto-resume")
			}
			return idVerb(func(cmd *cobra.Command, c *client.Client, id string, _ []string) error {
				s, err := c.SetLimits(cmd.Context(), id, limits)
				if err != nil {
					return err
				}
				if asJSON(cmd) {
					return printJSON(cmd, s)
				}
				_, err = fmt.Fprintln(cmd.OutOrStdout(), limitsText(s, time.Now()))
				return err
			})(cmd, given)
		},
	}
	cmd.Flags().Var(&idle, "auto-pause", "pause after so long without commands, transfers or connections; 0 for never")
	cmd.Flags().BoolVar(&autoResume, "auto-resume", true, "resume for a call; =false refuses it instead")
	return cmd
}

// limitsText says how long a sandbox lives.
func limitsText(s api.Sandbox, now time.Time) string {
	text := s.ID + " expires in " + expires(s, now)
	if s.Deadline == nil && s.EndedAt == nil {
		text = s.ID + " is " + s.State + "; it expires " + span(time.Duration(s.TimeoutSeconds*float64(time.Second))) + " after its resume"
	}
	if s.AutoPauseSeconds > 0 {
		text += ", pauses after " + span(time.Duration(s.AutoPauseSeconds*float64(time.Second))) + " without activity"
	}
	return text
}
