package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
)

func newKeyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "key",
		Short: "Make, list and revoke API keys",
		Args:  args(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newKeyCreateCommand(), newKeyLsCommand(), newKeyRmCommand())
	return cmd
}

func newKeyCreateCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "create NAME",
		Short: "Make a key and print its secret, this once",
		Args:  args(cobra.ExactArgs(1)),
		RunE: verb(func(cmd *cobra.Command, c *client.Client, given []string) error {
			k, err := c.CreateKey(cmd.Context(), given[0])
			if err != nil {
				return err
			}
			if asJSON(cmd) {
				return printJSON(cmd, k)
			}
			cmd.PrintErrf("key %s (%s); its secret is not shown again:\n", k.ID, k.Name)
			_, err = fmt.Fprintln(cmd.OutOrStdout(), k.Secret)
			return err
		}),
	}
}

func newKeyLsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List keys, without their secrets",
		Args:  args(cobra.NoArgs),
		RunE: verb(func(cmd *cobra.Command, c *client.Client, _ []string) error {
			keys, err := c.Keys(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON(cmd) {
				return printJSON(cmd, api.KeyList{Keys: append([]api.Key{}, keys...)})
			}
			var rows [][]string
			for _, k := range keys {
				used := "never"
				if k.LastUsedAt != nil {
					used = stamp(*k.LastUsedAt)
				}
				rows = append(rows, []string{k.ID, k.Name, k.Prefix + "…", stamp(k.CreatedAt), used})
			}
			return table(cmd.OutOrStdout(), []string{"ID", "NAME", "KEY", "CREATED", "LAST USED"}, rows)
		}),
	}
}

func newKeyRmCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rm ID…",
		Short: "Revoke keys at once",
		Args:  args(cobra.MinimumNArgs(1)),
		RunE: verb(func(cmd *cobra.Command, c *client.Client, given []string) error {
			for _, id := range given {
				if err := c.DeleteKey(cmd.Context(), id); err != nil {
					return fmt.Errorf("revoke key %s: %w", id, err)
				}
			}
			return nil
		}),
	}
}
