package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/cmd/dormouse/doctor"
)

func newDoctorCommand() *cobra.Command {
	o := doctor.Options{}
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Say what this machine has and lacks, with the cure for each thing",
		Long: `Look at this machine: everything that the server needs, what was found, why it
matters and what to do about it. It changes nothing. Run it with sudo to see
more. The exit status is 1 when something that is needed is missing.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			facts := doctor.Look(cmd.Context(), o)
			report := doctor.Check(facts)
			if asJSON(cmd) {
				if err := printJSON(cmd, report); err != nil {
					return err
				}
			} else if err := printReport(cmd, report, doctor.Install(facts)); err != nil {
				return err
			}
			if !report.Ready {
				return &exitError{code: 1}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&o.Listen, "listen", defaultListen, "address the server would listen on")
	cmd.Flags().StringVar(&o.DataDir, "data", defaultDataDir, "where the server would keep its data")
	return cmd
}

func printReport(cmd *cobra.Command, r doctor.Report, install string) error {
	var b strings.Builder
	width := 0
	for _, f := range r.Findings {
		width = max(width, len(label(f.Name)))
	}
	for _, f := range r.Findings {
		fmt.Fprintf(&b, "%-8s %-*s  %s\n", f.Status, width, label(f.Name), printable(f.Found))
		for _, line := range []struct{ what, text string }{{"why", f.Why}, {"cure", f.Cure}} {
			if line.text != "" {
				fmt.Fprintf(&b, "%*s%s: %s\n", 8+1+width+2, "", line.what, line.text)
			}
		}
	}
	switch {
	case r.Ready:
		b.WriteString("\nNothing that is needed is missing. make up starts the server.\n")
	case install != "":
		fmt.Fprintf(&b, "\nSomething that is needed is missing. All packages at once: %s\n", install)
	default:
		b.WriteString("\nSomething that is needed is missing.\n")
	}
	_, err := fmt.Fprint(cmd.OutOrStdout(), b.String())
	return err
}

// label cuts the path of a file to its name.
func label(name string) string {
	return name[strings.LastIndexByte(name, '/')+1:]
}
