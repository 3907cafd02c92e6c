package netns

import (
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

const (
	// nsDir is where iproute2 keeps named namespaces, so that `ip netns` shows ours.
	nsDir = "/run/netns"
	// tablePrefix starts the name of every instance's table on the host.
	tablePrefix = "dormouse_"
	// linkPrefix starts the name of every instance's veth on the host.
	linkPrefix = "dm"
)

var instanceForm = regexp.MustCompile(`^[a-z0-9]{5}$`)

// instance is the part that every name of one server on the host carries.
type instance string

func (i instance) table() string { return tablePrefix + string(i) }

// prefix starts the name of every namespace and veth: dm<instance>-.
func (i instance) prefix() string { return linkPrefix + string(i) + "-" }

// name is a slot's name, of its namespace and of its veth on the host. An
// interface name has at most 15 characters: 8 of prefix leave 7 digits.
func (i instance) name(index int) string { return i.prefix() + strconv.Itoa(index) }

func (i instance) path(index int) string { return filepath.Join(nsDir, i.name(index)) }

// index reads a name that name made; ok is false for anything else.
func (i instance) index(name string) (index int, ok bool) {
	digits, ok := strings.CutPrefix(name, i.prefix())
	if !ok {
		return 0, false
	}
	index, err := strconv.Atoi(digits)
	return index, err == nil && index >= 0 && i.name(index) == name
}
