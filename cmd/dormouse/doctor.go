package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/cmd/dormouse/doctor"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
	"github.com/dormouse-sandbox/dormouse/vmm/qemu"
)

func newDoctorCommand() *cobra.Command {
	o := doctor.Options{}
	var data, cache string
	var probe bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Say what this machine has and lacks, with the cure for each thing",
		Long: `Look at this machine: everything that the server needs, what was found, why it
matters and what to do about it. Run it with sudo to see more. It changes
nothing, but --probe fetches the guest kernel if need be and boots it.

The exit status is 1 when something that is needed is missing.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			inst, err := newInstance(data)
			if err != nil {
				return err
			}
			o.DataDir, o.KVMCache = inst.data, inst.probePath()
			if probe {
				if err := probeKVM(cmd, inst, cache); err != nil {
					return err
				}
			}
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
	cmd.Flags().StringVar(&data, "data", defaultDataDir, "where the server would keep its data")
	cmd.Flags().StringVar(&cache, "cache", defaultCache, "where builds are kept")
	cmd.Flags().BoolVar(&probe, "probe", false, "boot the guest kernel under KVM, and say whether it works")
	return cmd
}

// probeKVM boots the guest kernel under KVM. What it finds is kept where Look
// reads it, and where up does.
func probeKVM(cmd *cobra.Command, inst instance, cache string) error {
	if os.Geteuid() != 0 {
		return sandbox.Errorf(sandbox.KindInvalid, "--probe needs root: sudo dormouse doctor --probe")
	}
	if err := inst.makeData(); err != nil {
		return err
	}
	stop := waiting(cmd, "booting the guest kernel")
	defer stop()
	templates, err := template.Open(template.Config{Dir: inst.templatesDir(), Cache: cache})
	if err != nil {
		return fmt.Errorf("open templates: %w", err)
	}
	kernel, err := templates.Kernel(cmd.Context(), template.KernelConfig{}, nil)
	if err != nil {
		return fmt.Errorf("guest kernel: %w", err)
	}
	elf, err := templates.ELF(cmd.Context(), kernel)
	if err != nil {
		return err
	}
	_, err = qemu.Probe(cmd.Context(), inst.probe(elf))
	return err
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
