package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
)

func newTemplateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "template",
		Aliases: []string{"templates"},
		Short:   "List, build, show and delete what sandboxes can be made from",
		Args:    args(cobra.NoArgs),
		RunE:    verb(listTemplates),
	}
	cmd.AddCommand(&cobra.Command{
		Use: "ls", Short: "List templates", Args: args(cobra.NoArgs), RunE: verb(listTemplates),
	}, newTemplateBuildCommand(), &cobra.Command{
		Use: "get NAME", Aliases: []string{"inspect"}, Short: "Show one template: what it was made from, and what it starts",
		Args: args(cobra.ExactArgs(1)), ValidArgsFunction: completeTemplates, RunE: verb(getTemplate),
	}, &cobra.Command{
		Use: "log NAME", Aliases: []string{"logs"}, Short: "Print the log of a template's build",
		Args: args(cobra.ExactArgs(1)), ValidArgsFunction: completeTemplates, RunE: verb(templateLog),
	}, &cobra.Command{
		Use: "rm NAME…", Short: "Delete templates that no sandbox lies on",
		Args: args(cobra.MinimumNArgs(1)), ValidArgsFunction: completeTemplates, RunE: verb(deleteTemplates),
	})
	return cmd
}

func listTemplates(cmd *cobra.Command, c *client.Client, _ []string) error {
	list, err := c.Templates(cmd.Context())
	if err != nil {
		return err
	}
	if asJSON(cmd) {
		return printJSON(cmd, api.TemplateList{Templates: append([]api.Template{}, list...)})
	}
	var rows [][]string
	for _, t := range list {
		rows = append(rows, []string{t.Name, size(t.SizeBytes), mib(t.MinDiskMiB), t.DefaultUser, span(time.Since(t.BuiltAt)) + " ago", t.Digest})
	}
	return table(cmd.OutOrStdout(), []string{"NAME", "SIZE", "MIN DISK", "USER", "BUILT", "DIGEST"}, rows)
}

func getTemplate(cmd *cobra.Command, c *client.Client, given []string) error {
	t, err := c.Template(cmd.Context(), given[0])
	if err != nil {
		return err
	}
	if asJSON(cmd) {
		return printJSON(cmd, t)
	}
	return table(cmd.OutOrStdout(), nil, describeTemplate(t, time.Now()))
}

func describeTemplate(t api.Template, now time.Time) [][]string {
	rows := [][]string{
		{"name", t.Name},
		{"digest", t.Digest},
		{"size", size(t.SizeBytes)},
		{"min disk", mib(t.MinDiskMiB)},
		{"built", stamp(t.BuiltAt) + ", " + span(now.Sub(t.BuiltAt)) + " ago"},
		{"source", t.Source},
		{"user", t.DefaultUser},
		{"directory", t.DefaultWorkdir},
		{"ports", strings.Join(t.ExposedPorts, " ")},
		{"start", words(t.Start)},
	}
	if h := t.Healthcheck; h != nil {
		rows = append(rows, []string{"health check", words(h.Test)})
		for _, s := range []struct {
			name    string
			seconds float64
		}{{"  interval", h.IntervalSeconds}, {"  timeout", h.TimeoutSeconds}, {"  start period", h.StartPeriodSeconds}} {
			if s.seconds > 0 {
				rows = append(rows, []string{s.name, time.Duration(s.seconds * float64(time.Second)).String()})
			}
		}
		if h.Retries > 0 {
			rows = append(rows, []string{"  retries", strconv.Itoa(h.Retries)})
		}
	}
	return slices.DeleteFunc(rows, func(row []string) bool { return row[1] == "" })
}

// words is a command as one line that says where each word ends.
func words(argv []string) string {
	var out []string
	for _, word := range argv {
		if word == "" || strings.ContainsFunc(word, func(r rune) bool { return unicode.IsSpace(r) || strings.ContainsRune(`"'\`, r) }) {
			word = strconv.Quote(word)
		}
		out = append(out, word)
	}
	return strings.Join(out, " ")
}

func templateLog(cmd *cobra.Command, c *client.Client, given []string) error {
	log, err := c.TemplateLog(cmd.Context(), given[0])
	if err != nil {
		return err
	}
	for line := range strings.Lines(log) {
		if _, err := fmt.Fprintln(cmd.OutOrStdout(), printable(strings.TrimSuffix(line, "\n"))); err != nil {
			return err
		}
	}
	return nil
}

// deleteTemplates tries all of them and joins the errors.
func deleteTemplates(cmd *cobra.Command, c *client.Client, names []string) error {
	var errs []error
	for _, name := range names {
		if err := c.DeleteTemplate(cmd.Context(), name); err != nil {
			errs = append(errs, fmt.Errorf("delete template %s: %w", name, err))
			continue
		}
		if !asJSON(cmd) {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), name)
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
