package doctor

import (
	"errors"
	"fmt"
	"runtime"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// inEmptyNamespace runs fn in a network namespace that goes away with the
// thread it was made on, so that nothing of a probe stays behind.
func inEmptyNamespace(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		ns, err := netns.New()
		if err != nil {
			done <- fmt.Errorf("make a network namespace: %w", err)
			return
		}
		done <- errors.Join(fn(), ns.Close())
	}()
	return <-done
}

func askVeth() Feature {
	err := inEmptyNamespace(func() error {
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "probe0"}, PeerName: "probe1"}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("make a veth pair: %w", err)
		}
		return nil
	})
	return asked(err)
}

func askNFT() Feature {
	err := inEmptyNamespace(func() error {
		c, err := nftables.New()
		if err != nil {
			return fmt.Errorf("open nftables: %w", err)
		}
		c.AddTable(&nftables.Table{Name: "probe", Family: nftables.TableFamilyINet})
		if err := c.Flush(); err != nil {
			return fmt.Errorf("make an nftables table: %w", err)
		}
		return nil
	})
	return asked(err)
}

func asked(err error) Feature {
	f := Feature{Asked: true}
	if err != nil {
		f.Err = err.Error()
	}
	return f
}

// askForward looks for a forward chain whose policy drops: a packet must pass
// every chain of every table, so that another tool's drop counts for us too.
func askForward() Forward {
	f := Forward{Asked: true}
	c, err := nftables.New()
	if err != nil {
		f.Err = "open nftables: " + err.Error()
		return f
	}
	chains, err := c.ListChains()
	if err != nil {
		f.Err = "list nftables chains: " + err.Error()
		return f
	}
	for _, ch := range chains {
		if ch.Hooknum != nil && *ch.Hooknum == *nftables.ChainHookForward && ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop &&
			ch.Type == nftables.ChainTypeFilter && (ch.Table.Family == nftables.TableFamilyIPv4 || ch.Table.Family == nftables.TableFamilyINet) {
			f.Drop = fmt.Sprintf("chain %s of table %s drops what it does not know", ch.Name, ch.Table.Name)
		}
	}
	return f
}
