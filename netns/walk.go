package netns

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
)

// anyVeth stands for any instance's veth in a packet of packet.
const anyVeth = linkPrefix + "*"

// packet is a forwarded packet, as far as walk understands one.
type packet struct {
	in, out string
	state   uint32 // conntrack states that it may have
}

// tableWalk holds another tool's table to follow a packet through it.
type tableWalk struct {
	rules map[string][]*nftables.Rule
}

func readTable(t *nftables.Table) (*tableWalk, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	chains, err := c.ListChainsOfTableFamily(t.Family)
	if err != nil {
		return nil, err
	}
	w := &tableWalk{rules: map[string][]*nftables.Rule{}}
	for _, chain := range chains {
		if chain.Table.Name != t.Name {
			continue
		}
		if w.rules[chain.Name], err = c.GetRules(t, chain); err != nil {
			return nil, fmt.Errorf("read chain %s: %w", chain.Name, err)
		}
	}
	return w, nil
}

// passes says whether a base chain lets a packet through.
func (w *tableWalk) passes(base *nftables.Chain, p packet) bool {
	switch w.walk(base.Name, p, 0) {
	case passed:
		return true
	case stopped:
		return false
	}
	return base.Policy == nil || *base.Policy == nftables.ChainPolicyAccept
}

type outcome int

const (
	undecided outcome = iota
	passed
	stopped
)

// maxDepth is the kernel's own limit of jumps (NFT_JUMP_STACK_SIZE).
const maxDepth = 16

// walk follows the rules that certainly match. A rule with a condition that is
// not understood is passed over: Check accuses only what it has understood.
func (w *tableWalk) walk(chain string, p packet, depth int) outcome {
	if depth > maxDepth {
		return undecided
	}
	for _, r := range w.rules[chain] {
		v := p.apply(r)
		if v == nil {
			continue
		}
		switch v.Kind {
		case expr.VerdictAccept:
			return passed
		case expr.VerdictDrop:
			return stopped
		case expr.VerdictReturn:
			return undecided
		case expr.VerdictJump, expr.VerdictGoto:
			got := w.walk(v.Chain, p, depth+1)
			if got != undecided || v.Kind == expr.VerdictGoto {
				return got
			}
		}
	}
	return undecided
}

// apply returns the verdict of a rule for a packet, or nil when it does not
// certainly match or has none.
func (p packet) apply(r *nftables.Rule) *expr.Verdict {
	var loaded any // what is in the register: a name, or states
	for _, e := range r.Exprs {
		switch e := e.(type) {
		case *expr.Meta:
			loaded = p.load(e)
		case *expr.Ct:
			loaded = nil
			if e.Key == expr.CtKeySTATE && !e.SourceRegister {
				loaded = p.state
			}
		case *expr.Bitwise:
			if states, ok := loaded.(uint32); ok && len(e.Mask) == 4 {
				loaded = states & binary.NativeEndian.Uint32(e.Mask)
			}
		case *expr.Cmp:
			if !compare(e, loaded) {
				return nil
			}
		case *expr.Match:
			if !p.hasState(e) {
				return nil
			}
		case *expr.Counter, *expr.Log:
		case *expr.Verdict:
			return e
		case *expr.Reject:
			return &expr.Verdict{Kind: expr.VerdictDrop}
		default:
			return nil
		}
	}
	return nil
}

// hasState understands iptables' "-m conntrack --ctstate" and nothing else of
// xtables. Its state bits are those of nftables.
func (p packet) hasState(m *expr.Match) bool {
	info, ok := m.Info.(*xt.ConntrackMtinfo3)
	return ok && info.MatchFlags&^uint16(xt.ConntrackStateAlias) == uint16(xt.ConntrackState) && info.InvertFlags == 0 && uint32(info.StateMask)&p.state != 0
}

func (p packet) load(m *expr.Meta) any {
	switch m.Key {
	case expr.MetaKeyIIFNAME:
		return p.in
	case expr.MetaKeyOIFNAME:
		return p.out
	}
	return nil
}

// compare holds a loaded value against a rule's; false also means unknown.
func compare(c *expr.Cmp, loaded any) bool {
	var same bool
	switch v := loaded.(type) {
	case string:
		same = sameInterface(c.Data, v)
	case uint32:
		same = len(c.Data) == 4 && binary.NativeEndian.Uint32(c.Data) == v
	default:
		return false
	}
	return same == (c.Op == expr.CmpOpEq)
}

// sameInterface compares a name, or the start of one when it is not padded
// with zeros, with an interface. Any rule for "dm…" is taken as meant for us.
func sameInterface(data []byte, name string) bool {
	text, padded := string(bytes.TrimRight(data, "\x00")), bytes.HasSuffix(data, []byte{0})
	switch {
	case name == anyVeth:
		return strings.HasPrefix(text, linkPrefix)
	case padded:
		return text == name
	}
	return strings.HasPrefix(name, text)
}

// cure is what lets guests through a chain: our own table still denies them
// what it denies, and lets in answers only.
func (w *tableWalk) cure(base *nftables.Chain) string {
	chain := base.Name
	if _, docker := w.rules["DOCKER-USER"]; docker {
		chain = "DOCKER-USER"
	}
	if base.Table.Family == nftables.TableFamilyIPv4 && base.Table.Name == "filter" {
		return fmt.Sprintf("iptables -I %[1]s -i %[2]s+ -j ACCEPT && iptables -I %[1]s -o %[2]s+ -j ACCEPT", chain, linkPrefix)
	}
	family := "inet"
	if base.Table.Family == nftables.TableFamilyIPv4 {
		family = "ip"
	}
	return fmt.Sprintf("nft insert rule %[1]s %[2]s %[3]s iifname '\"%[4]s*\"' accept && nft insert rule %[1]s %[2]s %[3]s oifname '\"%[4]s*\"' accept",
		family, base.Table.Name, chain, linkPrefix)
}
