package main

import (
	"context"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// connect makes a client from the config file and the environment.
func connect() (*client.Client, error) {
	c, err := loadConfig()
	if err != nil {
		return nil, err
	}
	return client.New(client.Config{BaseURL: c.URL, Key: c.Key, UserAgent: "dormouse-cli/" + version})
}

// verb is a command that talks to the server.
func verb(run func(cmd *cobra.Command, c *client.Client, given []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, given []string) error {
		c, err := connect()
		if err != nil {
			return err
		}
		defer c.CloseIdle()
		return run(cmd, c, given)
	}
}

// idVerb is a command about one sandbox, its first argument.
func idVerb(run func(cmd *cobra.Command, c *client.Client, id string, rest []string) error) func(*cobra.Command, []string) error {
	return verb(func(cmd *cobra.Command, c *client.Client, given []string) error {
		id, err := findID(cmd.Context(), c, given[0])
		if err != nil {
			return err
		}
		return run(cmd, c, id, given[1:])
	})
}

// minPrefix keeps a slip of the finger from naming a sandbox.
const minPrefix = 4

var prefixPattern = regexp.MustCompile(`^[a-z0-9]{4,24}$`)

// findID turns a unique beginning of an ID into the ID. Those that live come
// before those that ended.
func findID(ctx context.Context, c *client.Client, given string) (string, error) {
	if _, err := sandbox.ParseID(given); err == nil {
		return given, nil
	}
	if !prefixPattern.MatchString(given) {
		return "", sandbox.Errorf(sandbox.KindInvalid,
			"%q is not a sandbox ID, nor the beginning of one (at least %d characters of a-z and 0-9)", given, minPrefix)
	}
	for _, all := range []bool{false, true} {
		var found []string
		for s, err := range c.Sandboxes(ctx, client.ListOptions{All: all, Limit: 1000}) {
			if err != nil {
				return "", err
			}
			if strings.HasPrefix(s.ID, given) {
				found = append(found, s.ID)
			}
		}
		switch {
		case len(found) == 1:
			return found[0], nil
		case len(found) > 1:
			return "", sandbox.Errorf(sandbox.KindInvalid, "%q begins the IDs of %d sandboxes: %s", given, len(found), strings.Join(found, ", "))
		}
	}
	return "", sandbox.Errorf(sandbox.KindNotFound, "no sandbox has an ID that begins with %q; dormouse ls -a lists them", given)
}

// completionLimit bounds how long a press of Tab may wait for the server.
const completionLimit = 2 * time.Second

type completion = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective)

// completeIDs offers the IDs of living sandboxes, for as many arguments as most
// says; after those the shell's own file names, if files says so.
func completeIDs(most int, files bool) completion {
	return func(_ *cobra.Command, given []string, typed string) ([]string, cobra.ShellCompDirective) {
		rest := cobra.ShellCompDirectiveNoFileComp
		if files {
			rest = cobra.ShellCompDirectiveDefault
		}
		if len(given) >= most {
			return nil, rest
		}
		c, err := connect()
		if err != nil {
			return nil, rest
		}
		ctx, cancel := context.WithTimeout(context.Background(), completionLimit)
		defer cancel()
		page, err := c.List(ctx, client.ListOptions{Limit: 1000})
		if err != nil {
			return nil, rest
		}
		var out []string
		for _, s := range page.Sandboxes {
			if strings.HasPrefix(s.ID, typed) {
				out = append(out, s.ID+"\t"+s.Template+" "+s.State)
			}
		}
		return out, rest
	}
}

// completeStates offers the IDs of sandboxes in some states, but none twice.
func completeStates(most int, states ...string) completion {
	all := completeIDs(most, false)
	return func(cmd *cobra.Command, given []string, typed string) ([]string, cobra.ShellCompDirective) {
		offered, rest := all(cmd, given, typed)
		return slices.DeleteFunc(offered, func(line string) bool {
			id, about, _ := strings.Cut(line, "\t")
			return slices.Contains(given, id) || !slices.ContainsFunc(states, func(state string) bool { return strings.HasSuffix(about, " "+state) })
		}), rest
	}
}

// completeSnapshots offers the names of snapshots for as many arguments as most
// says.
func completeSnapshots(most int) completion {
	return func(_ *cobra.Command, given []string, typed string) ([]string, cobra.ShellCompDirective) {
		const rest = cobra.ShellCompDirectiveNoFileComp
		c, err := connect()
		if err != nil || len(given) >= most {
			return nil, rest
		}
		ctx, cancel := context.WithTimeout(context.Background(), completionLimit)
		defer cancel()
		list, err := c.Snapshots(ctx)
		if err != nil {
			return nil, rest
		}
		var out []string
		for _, s := range list {
			if strings.HasPrefix(s.Name, typed) && !slices.Contains(given, s.Name) {
				out = append(out, s.Name+"\tof "+s.SandboxID)
			}
		}
		return out, rest
	}
}

// completeSources offers what a sandbox can be made from as the first argument.
func completeSources(cmd *cobra.Command, given []string, typed string) ([]string, cobra.ShellCompDirective) {
	images, rest := completeTemplates(cmd, given, typed)
	snapshots, _ := completeSnapshots(1)(cmd, given, typed)
	return append(images, snapshots...), rest
}

// completeTemplates offers the names of templates as the first argument.
func completeTemplates(_ *cobra.Command, given []string, typed string) ([]string, cobra.ShellCompDirective) {
	const rest = cobra.ShellCompDirectiveNoFileComp
	c, err := connect()
	if err != nil || len(given) > 0 {
		return nil, rest
	}
	ctx, cancel := context.WithTimeout(context.Background(), completionLimit)
	defer cancel()
	templates, err := c.Templates(ctx)
	if err != nil {
		return nil, rest
	}
	var out []string
	for _, t := range templates {
		if strings.HasPrefix(t.Name, typed) {
			out = append(out, t.Name)
		}
	}
	return out, rest
}
