package main

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func newSnapshotCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "snapshot",
		Aliases: []string{"snapshots"},
		Short:   "Keep the state of sandboxes under names, to make others from",
		Args:    args(cobra.NoArgs),
		RunE:    verb(listSnapshots),
	}
	cmd.AddCommand(
		newSnapshotCreateCommand(),
		&cobra.Command{Use: "ls", Short: "List snapshots", Args: args(cobra.NoArgs), RunE: verb(listSnapshots)},
		&cobra.Command{
			Use: "rm NAME…", Short: "Delete snapshots that nothing depends on", Args: args(cobra.MinimumNArgs(1)),
			ValidArgsFunction: completeSnapshots(1 << 10), RunE: verb(deleteSnapshots),
		},
		&cobra.Command{
			Use: "tree NAME", Short: "Show what a snapshot descends from and what descends from it", Args: args(cobra.ExactArgs(1)),
			ValidArgsFunction: completeSnapshots(1), RunE: verb(showTree),
		},
		&cobra.Command{
			Use: "verify NAME", Short: "Read all of a snapshot and compare it with its digests", Args: args(cobra.ExactArgs(1)),
			ValidArgsFunction: completeSnapshots(1), RunE: verb(verifySnapshot),
		})
	return cmd
}

func newSnapshotCreateCommand() *cobra.Command {
	var (
		metadata []string
		verbose  bool
	)
	cmd := &cobra.Command{
		Use:   "create ID NAME",
		Short: "Keep the state of a sandbox, which runs on, under a name",
		Long: `Keep the state of a sandbox, its memory, its processes and its disk, under a name,
and print the name once that is durable. The sandbox runs on.

Sandboxes are made from it with "dormouse create NAME": they go on where it was
taken. It has no name of a template.`,
		Example:           "  dormouse snapshot create 7kq2 with-deps\n  dormouse create with-deps",
		Args:              args(cobra.ExactArgs(2)),
		ValidArgsFunction: completeIDs(1, false),
		RunE: idVerb(func(cmd *cobra.Command, c *client.Client, id string, rest []string) error {
			labels, err := pairs("metadata", metadata, false)
			if err != nil {
				return err
			}
			stop := waiting(cmd, "taking a snapshot")
			s, err := c.CreateSnapshot(cmd.Context(), api.CreateSnapshot{Name: rest[0], SandboxID: id, Metadata: labels})
			stop()
			if err != nil {
				return err
			}
			if asJSON(cmd) {
				return printJSON(cmd, s)
			}
			if _, err := fmt.Fprintln(cmd.OutOrStdout(), s.Name); err != nil || !verbose {
				return err
			}
			return printCost(cmd.ErrOrStderr(), s.Phases, s.Report, s.Saved)
		}),
	}
	cmd.Flags().StringArrayVar(&metadata, "metadata", nil, "NAME=VALUE to find it by")
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "show what each step took, and what was written")
	return cmd
}

func listSnapshots(cmd *cobra.Command, c *client.Client, _ []string) error {
	list, err := c.Snapshots(cmd.Context())
	if err != nil {
		return err
	}
	if asJSON(cmd) {
		return printJSON(cmd, api.SnapshotList{Snapshots: append([]api.Snapshot{}, list...)})
	}
	var rows [][]string
	for _, s := range list {
		row := []string{s.Name, s.State, s.Template, orDash(s.Parent), strconv.Itoa(s.VCPUs), mib(s.MemMiB), "-", "-", "-", span(time.Since(s.CreatedAt)) + " ago"}
		if s.Saved != nil {
			row[6], row[7], row[8] = strconv.Itoa(s.Saved.Generation), bytesText(s.Saved.MemoryBytes+s.Saved.DiskBytes), bytesText(s.Saved.OwnBytes)
		}
		rows = append(rows, row)
	}
	return table(cmd.OutOrStdout(), []string{"NAME", "STATE", "TEMPLATE", "PARENT", "VCPUS", "MEM", "GEN", "ON DISK", "OWN", "TAKEN"}, rows)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// deleteSnapshots tries all of them and joins the errors.
func deleteSnapshots(cmd *cobra.Command, c *client.Client, names []string) error {
	var errs []error
	for _, name := range names {
		done, err := c.DeleteSnapshot(cmd.Context(), name)
		if err != nil {
			errs = append(errs, fmt.Errorf("delete snapshot %s: %w", name, err))
			continue
		}
		if asJSON(cmd) {
			continue
		}
		line := name
		if !done {
			line += " (deleting: goes when its host answers again)"
		}
		_, err = fmt.Fprintln(cmd.OutOrStdout(), line)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// verifySnapshot fails when the snapshot is damaged, after saying where.
func verifySnapshot(cmd *cobra.Command, c *client.Client, given []string) error {
	stop := waiting(cmd, "verifying")
	v, err := c.VerifySnapshot(cmd.Context(), given[0])
	stop()
	if err != nil {
		return err
	}
	var damaged error
	if !v.Whole {
		damaged = sandbox.Errorf(sandbox.KindInternal, "snapshot %s is damaged in %d places", given[0], len(v.Damage))
	}
	if asJSON(cmd) {
		return errors.Join(damaged, printJSON(cmd, v))
	}
	return errors.Join(damaged, printVerified(cmd.OutOrStdout(), given[0], v))
}

func printVerified(w io.Writer, name string, v api.Verified) error {
	if v.Whole {
		_, err := fmt.Fprintf(w, "%s is whole: %d files, %s\n", name, v.Files, bytesText(v.Bytes))
		return err
	}
	var rows [][]string
	for _, d := range v.Damage {
		at := "all of it"
		if d.Offset >= 0 {
			at = fmt.Sprintf("byte %d", d.Offset)
		}
		rows = append(rows, []string{d.File, at, d.Message})
	}
	return table(w, []string{"FILE", "AT", "WHAT"}, rows)
}
