package main

import (
	"bufio"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func newLoginCommand() *cobra.Command {
	var url string
	cmd := &cobra.Command{
		Use:   "login",
		Short: "Write the config file: which server, which key",
		Long: `Read an API key from standard input, try it, and write it with the server's
address into the config file. "make up" does that for the server it starts.`,
		Example: "  dormouse login --url http://10.0.0.5:7070 < key.txt",
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			key, err := readKey(cmd)
			if err != nil {
				return err
			}
			c, err := client.New(client.Config{BaseURL: url, Key: key, UserAgent: "dormouse-cli/" + version})
			if err != nil {
				return err
			}
			host, err := c.Host(cmd.Context())
			if err != nil {
				return fmt.Errorf("try the key: %w", err)
			}
			path, err := configPath()
			if err != nil {
				return err
			}
			if err := writeConfig(path, config{URL: url, Key: key}, -1, -1); err != nil {
				return err
			}
			cmd.PrintErrf("%s answered; wrote %s\n", host.Name, path)
			return nil
		},
	}
	cmd.Flags().StringVar(&url, "url", defaultURL, "address of the server")
	return cmd
}

// readKey takes the key from standard input, so that it is in no history and
// no process list; a terminal does not show it.
func readKey(cmd *cobra.Command) (string, error) {
	var line string
	var err error
	if in, ok := cmd.InOrStdin().(*os.File); ok && isTerminal(in) {
		cmd.PrintErr("API key: ")
		var b []byte
		b, err = term.ReadPassword(int(in.Fd()))
		cmd.PrintErrln()
		line = string(b)
	} else {
		line, err = bufio.NewReader(cmd.InOrStdin()).ReadString('\n')
	}
	if key := strings.TrimSpace(line); key != "" {
		return key, nil
	}
	if err != nil {
		err = fmt.Errorf("read the key: %w", err)
	} else {
		err = sandbox.Errorf(sandbox.KindInvalid, "the key is empty")
	}
	return "", sandbox.WithKind(sandbox.KindInvalid, err)
}
