package netns

import (
	"context"
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
)

// memos reads what every instance on this host remembers, by its table's name.
func memos(ctx context.Context) (map[string]memo, error) {
	found := map[string]memo{}
	err := do(ctx, "table-list", "list nftables tables", func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
		if err != nil {
			return err
		}
		for _, t := range tables {
			if !strings.HasPrefix(t.Name, tablePrefix) {
				continue
			}
			m, err := readMemo(c, t)
			if err != nil {
				return fmt.Errorf("read the memo of %s: %w", t.Name, err)
			}
			found[t.Name] = m
		}
		return nil
	})
	return found, err
}

// readMemo returns the zero memo for a table that has none.
func readMemo(c *nftables.Conn, t *nftables.Table) (memo, error) {
	rules, err := c.GetRules(t, &nftables.Chain{Name: memoChain, Table: t})
	if isAbsent(err) {
		return memo{}, nil
	}
	for _, r := range rules {
		text, _ := userdata.GetString(r.UserData, userdata.TypeComment)
		if m, ok := parseMemo(text); ok {
			return m, err
		}
	}
	return memo{}, err
}

// removeTable deletes the instance's table; a missing one is success.
func (i instance) removeTable(ctx context.Context) error {
	err := i.change(ctx, "table-delete", "delete table "+i.table(), func(c *nftables.Conn, t *nftables.Table) error {
		c.DelTable(t)
		return nil
	})
	if isAbsent(err) {
		return nil
	}
	return err
}

// forwardingBefore is what ip_forward was before any instance changed it: an
// instance that comes second inherits what the first one found.
func forwardingBefore(ctx context.Context, others map[string]memo) (string, error) {
	for _, m := range others {
		if m.forwarding == "0" {
			return "0", nil
		}
	}
	var value string
	err := do(ctx, "forwarding-read", "read "+forwardingSysctl, func() (err error) {
		value, err = readSysctl(forwardingSysctl)
		return err
	})
	return value, err
}

func enableForwarding(ctx context.Context) error {
	return do(ctx, "forwarding-set", "set "+forwardingSysctl, func() error {
		if now, err := readSysctl(forwardingSysctl); err == nil && now == "1" {
			return nil
		}
		return writeSysctl(forwardingSysctl, "1")
	})
}

// restoreForwarding undoes enableForwarding when we changed it and no other
// instance still needs it; the last one to go restores.
func restoreForwarding(ctx context.Context, own memo, others int) error {
	if own.forwarding != "0" || others > 0 {
		return nil
	}
	return do(ctx, "forwarding-restore", "restore "+forwardingSysctl, func() error {
		return writeSysctl(forwardingSysctl, "0")
	})
}
