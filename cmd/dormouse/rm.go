package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// destroyAtOnce is how many destroys rm has under way.
const destroyAtOnce = 4

func newRmCommand() *cobra.Command {
	var all, yes bool
	cmd := &cobra.Command{
		Use:               "rm ID…",
		Aliases:           []string{"destroy"},
		Short:             "Destroy sandboxes",
		Example:           "  dormouse rm 7kq2 mp4x\n  dormouse rm --all --yes",
		ValidArgsFunction: completeIDs(1<<10, false),
		Args: func(cmd *cobra.Command, given []string) error {
			if all == (len(given) > 0) {
				return usage(cmd, "give the IDs of the sandboxes to destroy, or --all")
			}
			return nil
		},
		RunE: verb(func(cmd *cobra.Command, c *client.Client, given []string) error {
			ids, err := doomed(cmd, c, given, all, yes)
			if err != nil || len(ids) == 0 && !asJSON(cmd) {
				return err
			}
			gone, err := destroyEach(cmd, c, ids)
			if asJSON(cmd) {
				return errors.Join(err, printJSON(cmd, api.SandboxList{Sandboxes: gone}))
			}
			for _, s := range gone {
				line := s.ID
				if !sandbox.State(s.State).Ended() {
					line += " (" + s.State + ": goes when its host answers again)"
				}
				if _, printErr := fmt.Fprintln(cmd.OutOrStdout(), line); printErr != nil {
					return errors.Join(err, printErr)
				}
			}
			return err
		}),
	}
	cmd.Flags().BoolVar(&all, "all", false, "every sandbox there is")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "with --all: do not ask")
	return cmd
}

// doomed are the IDs to destroy. All of them are found before any is destroyed.
func doomed(cmd *cobra.Command, c *client.Client, given []string, all, yes bool) ([]string, error) {
	var ids []string
	for _, g := range given {
		id, err := findID(cmd.Context(), c, g)
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	if !all {
		return ids, nil
	}
	list, err := listAll(cmd, c, client.ListOptions{})
	if err != nil || len(list) == 0 {
		return nil, err
	}
	for _, s := range list {
		ids = append(ids, s.ID)
	}
	if yes {
		return ids, nil
	}
	cmd.PrintErrf("Destroy all %d sandboxes? [y/N] ", len(ids))
	answer, err := bufio.NewReader(cmd.InOrStdin()).ReadString('\n')
	if reply := strings.ToLower(strings.TrimSpace(answer)); reply != "y" && reply != "yes" {
		if err != nil {
			cmd.PrintErrln()
		}
		return nil, sandbox.Errorf(sandbox.KindInvalid, "nothing was destroyed; --yes does it without asking")
	}
	return ids, nil
}

// destroyEach tries all of them, a few at a time, and joins the errors.
func destroyEach(cmd *cobra.Command, c *client.Client, ids []string) ([]api.Sandbox, error) {
	stop := waiting(cmd, "destroying")
	defer stop()
	results, errs := make([]api.Sandbox, len(ids)), make([]error, len(ids))
	var group errgroup.Group
	group.SetLimit(destroyAtOnce)
	for i, id := range ids {
		group.Go(func() error {
			results[i], errs[i] = destroyOne(cmd.Context(), c, id)
			return nil
		})
	}
	_ = group.Wait() // each error is in errs
	gone := []api.Sandbox{}
	for i, s := range results {
		if errs[i] == nil {
			gone = append(gone, s)
		}
	}
	return gone, errors.Join(errs...)
}

func destroyOne(ctx context.Context, c *client.Client, id string) (api.Sandbox, error) {
	s, err := c.Delete(ctx, id)
	if err != nil {
		return s, fmt.Errorf("destroy %s: %w", id, err)
	}
	return s, nil
}
