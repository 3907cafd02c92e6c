// Command dormouse is the server and its command line: up, down, doctor, and
// the verbs that work on sandboxes through the public API.
//
// Each verb is a file. A client verb decodes its arguments, calls package
// client and prints; it promises one sentence on standard error when it fails,
// an exit status that says what kind of failure it was, and on standard output
// nothing but what was asked for.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set by the linker.
var version = "unknown"

// verbs makes every command; each constructor is in the file of its verb.
var verbs = []func() *cobra.Command{
	newRunCommand, newCreateCommand, newLsCommand, newGetCommand, newExecCommand, newAttachCommand, newCpCommand, newLogsCommand,
	newPauseCommand, newResumeCommand, newForkCommand, newSnapshotCommand, newRmCommand, newPingCommand, newTimeoutCommand,
	newMetricsCommand, newTemplateCommand, newHostCommand,
	newPortForwardCommand, newURLCommand, newKeyCommand, newLoginCommand, newDoctorCommand, newVersionCommand,
	newUpCommand, newDownCommand, newDemoCommand, newPagerCommand,
}

func main() {
	// A closed pipe on standard output becomes an error to handle: a sandbox
	// must still be destroyed. Notify, not Ignore, which children would inherit.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM) // before anything is made that a signal has to undo
	go watchSignals(signals, cancel)
	root := newRootCommand()
	err := root.ExecuteContext(ctx)
	code := exitCode(ctx, err)
	complain(os.Stderr, ctx, err)
	cancel(nil)
	restoreTerminal() // it is, unless something went very wrong
	os.Exit(code)
}

// watchSignals ends the context at the first signal, with its name as the
// cause, and the process at the second.
func watchSignals(signals <-chan os.Signal, cancel context.CancelCauseFunc) {
	first := true
	for s := range signals {
		number, ok := s.(syscall.Signal)
		if !ok {
			continue
		}
		if !first {
			restoreTerminal()
			os.Exit(128 + int(number))
		}
		first = false
		cancel(interrupted{number})
	}
}

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "dormouse",
		Short: "Run untrusted code in microVM sandboxes",
		Long: `Dormouse runs code in microVM sandboxes.

The server is found through the config file that "make up" writes, or through
DORMOUSE_URL and DORMOUSE_API_KEY. A sandbox ID may be cut to any unique
beginning of at least four characters.`,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetVersionTemplate("dormouse {{.Version}}\n")
	root.PersistentFlags().Bool("json", false, "print JSON instead of a table")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usage(cmd, "%w", err) })
	for _, verb := range verbs {
		root.AddCommand(verb())
	}
	return root
}

func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if asJSON(cmd) {
				return printJSON(cmd, map[string]string{"version": version})
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "dormouse", version)
			return err
		},
	}
}
