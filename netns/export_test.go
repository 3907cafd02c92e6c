package netns

import "net/netip"

// MemoText is what an instance writes down.
func MemoText(pool netip.Prefix, forwarding string) string {
	return memo{pool: pool, forwarding: forwarding}.String()
}

// ParseMemo reads it.
func ParseMemo(text string) (pool netip.Prefix, forwarding string, ok bool) {
	m, ok := parseMemo(text)
	return m.pool, m.forwarding, ok
}

// MakeDir prepares a folder for namespaces.
var MakeDir = makeDir
