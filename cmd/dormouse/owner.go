package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"strconv"

	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/control/auth"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// owner is the user who typed the command, also through sudo.
type owner struct {
	name     string
	uid, gid int
	config   string // path of the client's config file
}

func invokingUser() (owner, error) {
	id := os.Getenv("SUDO_UID")
	viaSudo := id != "" && os.Geteuid() == 0
	if !viaSudo {
		id = strconv.Itoa(os.Getuid())
	}
	u, err := user.LookupId(id)
	if err != nil {
		return owner{}, fmt.Errorf("find the user who typed this: %w", err)
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return owner{}, err
	}
	gid, err := strconv.Atoi(u.Gid)
	if err != nil {
		return owner{}, err
	}
	path := configPathIn(u.HomeDir)
	if !viaSudo {
		if path, err = configPath(); err != nil {
			return owner{}, err
		}
	}
	return owner{name: u.Username, uid: uid, gid: gid, config: path}, nil
}

// readConfig and writeConfig reach no further than the owner does.
func (o owner) readConfig() (c config, err error) {
	err = kernel.AsUser(o.uid, o.gid, nil, func() (err error) { c, err = readConfig(o.config); return err })
	return c, err
}

func (o owner) writeConfig(path string, c config) error {
	return kernel.AsUser(o.uid, o.gid, nil, func() error { return writeConfig(path, c, o.uid, o.gid) })
}

// ensureKey makes sure that the owner's config file leads to the server, and
// returns a client made from it. A config that leads elsewhere is kept beside.
func ensureKey(ctx context.Context, inst instance, url string, o owner) (*client.Client, error) {
	have, err := o.readConfig()
	if err != nil && !sandbox.Is(err, sandbox.KindInvalid) {
		return nil, err
	}
	if have.URL == url && have.Key != "" {
		c, err := client.New(client.Config{BaseURL: url, Key: have.Key})
		if err != nil {
			return nil, err
		}
		if _, err := c.Host(ctx); !sandbox.Is(err, sandbox.KindUnauthorized) {
			return c, err
		}
	}
	secret, err := newKey(ctx, inst, "cli-"+o.name)
	if err != nil {
		return nil, err
	}
	if have.Key != "" && have.URL != url {
		if err := o.writeConfig(o.config+".old", have); err != nil {
			return nil, err
		}
	}
	if err := o.writeConfig(o.config, config{URL: url, Key: secret}); err != nil {
		return nil, err
	}
	return client.New(client.Config{BaseURL: url, Key: secret})
}

// newKey makes an API key as whoever may write the database.
func newKey(ctx context.Context, inst instance, name string) (_ string, err error) {
	db, err := store.OpenSQLite(ctx, inst.databasePath())
	if err != nil {
		return "", fmt.Errorf("open database: %w", err)
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	return auth.New(db, nil).EnsureKey(ctx, name)
}

// printBanner says what runs, and what it is not.
func printBanner(ctx context.Context, w io.Writer, c *client.Client, url string) error {
	h, err := c.Host(ctx)
	if err != nil {
		return err
	}
	if err := say(w, "dormouse %s on %s\n  VMs run on %s with %s: %s\n  disks are made by %s: %s\n",
		h.Version, url, h.VMM, h.Accelerator, h.AcceleratorReason, h.DiskDriver, h.DiskReason); err != nil {
		return err
	}
	if h.Accelerator == "tcg" {
		return say(w, "  NOTE: software emulation is for development and tests. It is not a security boundary.\n")
	}
	return nil
}

// printNext says what to type next, so that it works as it stands.
func printNext(w io.Writer, o owner) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return say(w, `
Next, as %s (the key is in %s):
  %[3]s run base -- python3 -c 'print("hello")'
  %[3]s create            # prints an ID
  %[3]s ls
  make down                    # stops the server and all sandboxes
`, o.name, o.config, shorten(self))
}

// shorten names a program as it can be typed from here.
func shorten(path string) string {
	wd, err := os.Getwd()
	if err == nil && len(path) > len(wd) && path[:len(wd)+1] == wd+"/" {
		return path[len(wd)+1:]
	}
	return path
}
