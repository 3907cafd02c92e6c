// Package account reads the users and groups of the guest's own root from
// /etc/passwd and /etc/group, in pure Go: the agent is a static binary and
// cannot ask the image's C library. Nothing is cached, because a sandbox may add
// users at any time.
//
// It also holds the rule by which a path in a request becomes an absolute one,
// which depends on the user's home.
package account

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// ErrUnknown is in the chain of the error for a user that does not exist.
var ErrUnknown = errors.New("no such user")

// User is one line of passwd, with the groups that name it.
type User struct {
	Name   string
	UID    uint32
	GID    uint32
	Groups []uint32 // supplementary ones, without GID
	Home   string
	Shell  string
}

// Dir is a directory with a passwd and a group file: "/etc", but for tests.
type Dir string

// User finds a user by name.
func (d Dir) User(name string) (User, error) {
	return d.find(fmt.Sprintf("%q", name), func(u User) bool { return u.Name == name })
}

// ByUID finds a user by number.
func (d Dir) ByUID(uid uint32) (User, error) {
	return d.find(fmt.Sprintf("uid %d", uid), func(u User) bool { return u.UID == uid })
}

func (d Dir) find(what string, match func(User) bool) (User, error) {
	users, err := d.users()
	if err != nil {
		return User{}, err
	}
	i := slices.IndexFunc(users, match)
	if i < 0 {
		return User{}, fmt.Errorf("%w: %s", ErrUnknown, what)
	}
	u := users[i]
	groups, err := d.groups()
	if err != nil {
		return User{}, err
	}
	for _, g := range groups {
		if g.gid != u.GID && slices.Contains(g.members, u.Name) {
			u.Groups = append(u.Groups, g.gid)
		}
	}
	return u, nil
}

// Names maps numbers to names, for listings: read once, used for many entries.
type Names struct {
	users, groups map[uint32]string
}

// Names reads both files. What cannot be read has no names.
func (d Dir) Names() Names {
	n := Names{users: map[uint32]string{}, groups: map[uint32]string{}}
	users, _ := d.users() // an image without passwd has numbers only
	for _, u := range slices.Backward(users) {
		n.users[u.UID] = u.Name
	}
	groups, _ := d.groups() // likewise
	for _, g := range slices.Backward(groups) {
		n.groups[g.gid] = g.name
	}
	return n
}

// User is the name of a uid, or the number itself.
func (n Names) User(uid uint32) string { return nameOr(n.users, uid) }

// Group is the name of a gid, or the number itself.
func (n Names) Group(gid uint32) string { return nameOr(n.groups, gid) }

func nameOr(names map[uint32]string, id uint32) string {
	if name, ok := names[id]; ok {
		return name
	}
	return strconv.FormatUint(uint64(id), 10)
}

type group struct {
	name    string
	gid     uint32
	members []string
}

func (d Dir) users() ([]User, error) {
	records, err := d.records("passwd", 7)
	if err != nil {
		return nil, err
	}
	var users []User
	for _, f := range records {
		uid, err1 := parseID(f[2])
		gid, err2 := parseID(f[3])
		if err1 != nil || err2 != nil {
			continue // as the C library does
		}
		users = append(users, User{Name: f[0], UID: uid, GID: gid, Home: f[5], Shell: f[6]})
	}
	return users, nil
}

func (d Dir) groups() ([]group, error) {
	records, err := d.records("group", 4)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var groups []group
	for _, f := range records {
		gid, err := parseID(f[2])
		if err != nil {
			continue
		}
		groups = append(groups, group{name: f[0], gid: gid, members: strings.Split(f[3], ",")})
	}
	return groups, nil
}

// records splits a file into lines of exactly fields colon-separated fields,
// and leaves out all others.
func (d Dir) records(file string, fields int) ([][]string, error) {
	data, err := os.ReadFile(filepath.Join(string(d), file))
	if err != nil {
		return nil, fmt.Errorf("read users: %w", err)
	}
	var out [][]string
	for line := range strings.Lines(string(data)) {
		line = strings.TrimRight(line, "\n")
		if f := strings.Split(line, ":"); len(f) == fields && f[0] != "" {
			out = append(out, f)
		}
	}
	return out, nil
}

func parseID(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err
}

// Resolve makes an absolute, clean path of the one in a request: "~" is the
// home, and what is relative starts at the working directory or, without one,
// at the home. It does not look at the file system.
func (u User) Resolve(path, workdir string) (string, error) {
	if strings.ContainsRune(path, 0) {
		return "", errors.New("a path cannot contain a NUL byte")
	}
	home := u.Home
	if !filepath.IsAbs(home) {
		home = "/"
	}
	base := home
	if workdir != "" {
		base = join(home, home, workdir)
	}
	return join(base, home, path), nil
}

func join(base, home, path string) string {
	if rest, ok := strings.CutPrefix(path, "~"); ok && (rest == "" || rest[0] == '/') {
		return filepath.Join(home, rest)
	}
	if filepath.IsAbs(path) {
		return filepath.Clean(path)
	}
	return filepath.Join(base, path)
}
