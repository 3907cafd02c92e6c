package netns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// ruleset is the one table that an instance has on the host. It is declared
// whole, in one transaction; afterwards only its two sets change.
type ruleset struct {
	inst     instance
	memo     memo
	denied   []span
	internet []string // the veths that may reach what is not denied
}

// memo is what an instance has to remember. It is kept as the comment of a
// rule, because it must live exactly as long as the table.
type memo struct {
	pool netip.Prefix
	// forwarding is what net.ipv4.ip_forward was before any instance set it.
	forwarding string
}

func (m memo) String() string { return fmt.Sprintf("pool=%v ip_forward=%s", m.pool, m.forwarding) }

func parseMemo(text string) (m memo, ok bool) {
	for field := range strings.FieldsSeq(text) {
		key, value, _ := strings.Cut(field, "=")
		switch key {
		case "pool":
			m.pool, _ = netip.ParsePrefix(value) // not valid: no pool
		case "ip_forward":
			m.forwarding = value
		}
	}
	return m, m.pool.IsValid() && m.forwarding != ""
}

const (
	memoChain   = "memo"
	internetSet = "internet"
	deniedSet   = "denied"
)

func (i instance) hostTable() *nftables.Table {
	return &nftables.Table{Name: i.table(), Family: nftables.TableFamilyINet}
}

func internetOf(t *nftables.Table) *nftables.Set {
	return &nftables.Set{Table: t, Name: internetSet, KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian}
}

func deniedOf(t *nftables.Table) *nftables.Set {
	return &nftables.Set{Table: t, Name: deniedSet, KeyType: nftables.TypeIPAddr, Interval: true}
}

func vethElements(names ...string) []nftables.SetElement {
	var out []nftables.SetElement
	for _, name := range names {
		out = append(out, nftables.SetElement{Key: ifname(name)})
	}
	return out
}

// spanElements writes each span as its first address and the one after its
// last; a span that ends with the address space has no end.
func spanElements(spans []span) []nftables.SetElement {
	var out []nftables.SetElement
	for _, s := range spans {
		out = append(out, nftables.SetElement{Key: fromUint32(s.first).AsSlice()})
		if after := s.last + 1; after != 0 {
			out = append(out, nftables.SetElement{Key: fromUint32(after).AsSlice(), IntervalEnd: true})
		}
	}
	return out
}

// declare replaces the table in one transaction: no packet sees half of it,
// and running connections keep their state, which is not part of a table.
func (r ruleset) declare(ctx context.Context) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	t := r.inst.hostTable()
	c.AddTable(t) // so that there is one to delete
	c.DelTable(t)
	c.AddTable(t)
	internet, denied := internetOf(t), deniedOf(t)
	if err := c.AddSet(internet, vethElements(r.internet...)); err != nil {
		return fmt.Errorf("declare set %s: %w", internetSet, err)
	}
	if err := c.AddSet(denied, spanElements(r.denied)); err != nil {
		return fmt.Errorf("declare set %s: %w", deniedSet, err)
	}
	r.chains(&tableWriter{c, t}, internet, denied)
	return do(ctx, "table-declare", "declare table "+t.Name, c.Flush)
}

// tableWriter adds chains and rules to one table.
type tableWriter struct {
	c *nftables.Conn
	t *nftables.Table
}

func (w *tableWriter) chain(name string, rules ...[]expr.Any) *nftables.Chain {
	return w.add(&nftables.Chain{Name: name}, rules...)
}

func (w *tableWriter) base(
	name string, kind nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority,
	policy nftables.ChainPolicy, rules ...[]expr.Any,
) {
	w.add(&nftables.Chain{Name: name, Type: kind, Hooknum: hook, Priority: prio, Policy: &policy}, rules...)
}

func (w *tableWriter) add(chain *nftables.Chain, rules ...[]expr.Any) *nftables.Chain {
	chain.Table = w.t
	w.c.AddChain(chain)
	for _, r := range rules {
		w.c.AddRule(&nftables.Rule{Table: w.t, Chain: chain, Exprs: r})
	}
	return chain
}

// chains is the host's ruleset. A veth is known by its name, so that the rules
// hold for it from the moment it exists, before any set knows it.
func (r ruleset) chains(w *tableWriter, internet, denied *nftables.Set) {
	from, to := iifPrefix(r.inst.prefix()), oifPrefix(r.inst.prefix())

	note := w.chain(memoChain)
	w.c.AddRule(&nftables.Rule{
		Table: w.t, Chain: note, Exprs: join(verdict(expr.VerdictReturn)),
		UserData: userdata.AppendString(nil, userdata.TypeComment, r.memo.String()),
	})
	w.chain("refuse", // the sender learns of it at once; resets are not rate-limited as ICMP is
		join(l4(unix.IPPROTO_TCP), reset()),
		join(refuse()))
	w.chain("from_guest",
		join(ipv6(), drop()),
		join(ipv4(), sourceWithin(expr.CmpOpNeq, r.memo.pool), drop()), // its namespace translates everything
		join(to, jump("refuse")),
		join(ipv4(), destinationIn(denied), jump("refuse")),
		join(l4(unix.IPPROTO_TCP), tcpFlags(synRst, syn), clampMSS()),
		join(iifIn(internet), accept()),
		join(jump("refuse")),
	)
	w.chain("to_guest",
		join(ipv6(), drop()),
		join(l4(unix.IPPROTO_TCP), tcpFlags(synRst, syn), clampMSS()),
		join(ctState(ctReply), accept()),
		join(drop()),
	)
	// Nothing on the host is for guests: their resolver listens inside their
	// namespace, and the agent connects to them, never they to it.
	w.base("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept,
		join(from, drop()))
	w.base("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept,
		join(from, jump("from_guest")),
		join(to, jump("to_guest")))
	// The source is the veth's address here: the namespace has translated the
	// guest's own, which the host never sees.
	w.base("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nftables.ChainPolicyAccept,
		join(ipv4(), sourceWithin(expr.CmpOpEq, r.memo.pool), match{&expr.Masq{}}))
}

const (
	syn    = 0x02
	rst    = 0x04
	synRst = syn | rst
)

// setDenied replaces the denied ranges in one transaction.
func (i instance) setDenied(ctx context.Context, spans []span) error {
	return i.change(ctx, "denied-set", "set the denied ranges", func(c *nftables.Conn, t *nftables.Table) error {
		s := deniedOf(t)
		c.FlushSet(s)
		return c.SetAddElements(s, spanElements(spans))
	})
}

func (i instance) allowInternet(ctx context.Context, veth string) error {
	return i.change(ctx, "internet-add", "allow "+veth+" the internet", func(c *nftables.Conn, t *nftables.Table) error {
		return c.SetAddElements(internetOf(t), vethElements(veth))
	})
}

// denyInternet is success when the veth was not in the set, or no table is.
func (i instance) denyInternet(ctx context.Context, veth string) error {
	err := i.change(ctx, "internet-delete", "deny "+veth+" the internet", func(c *nftables.Conn, t *nftables.Table) error {
		return c.SetDeleteElements(internetOf(t), vethElements(veth))
	})
	if isAbsent(err) {
		return nil
	}
	return err
}

// isAbsent says whether nftables has no such table, set or element. The reading
// calls of the library keep the text of an errno, and lose the errno.
func isAbsent(err error) bool {
	return err != nil && (errors.Is(err, unix.ENOENT) || strings.HasSuffix(err.Error(), unix.ENOENT.Error()))
}

// change is one transaction on the instance's table.
func (i instance) change(ctx context.Context, name, what string, edit func(*nftables.Conn, *nftables.Table) error) error {
	return do(ctx, name, what, func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		if err := edit(c, i.hostTable()); err != nil {
			return err
		}
		return c.Flush()
	})
}

// allowed lists the veths that may reach the internet.
func (i instance) allowed(ctx context.Context) (names []string, err error) {
	err = i.change(ctx, "internet-list", "list set "+internetSet, func(c *nftables.Conn, t *nftables.Table) error {
		elements, err := c.GetSetElements(internetOf(t))
		for _, e := range elements {
			names = append(names, string(bytes.TrimRight(e.Key, "\x00")))
		}
		return err
	})
	if isAbsent(err) {
		return nil, nil
	}
	return names, err
}
