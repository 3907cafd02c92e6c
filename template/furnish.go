package template

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template/oci"
)

// maxAccounts bounds the account files of an image, in bytes.
const maxAccounts = 1 << 20

// furnish gives a foreign tree what a sandbox needs of its image, and writes into
// the record who and where commands are. What works but not as somebody could
// expect is a note; what cannot work is an error that says why.
//
// An image needs little: places to mount the kernel's file systems on, and an
// account for its user. No shell, no C library of a certain kind, and no tools.
func furnish(root string, c oci.Config, t *Template, note func(string)) (err error) {
	tree, err := oci.OpenTree(root)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, tree.Close()) }()
	f := furnisher{tree: tree, note: note}
	if err := f.places(); err != nil {
		return err
	}
	if err := f.files(); err != nil {
		return err
	}
	user, err := f.user(c.User)
	if err != nil {
		return err
	}
	t.DefaultUser = user.name
	if t.DefaultWorkdir, err = f.workdir(c.WorkingDir); err != nil {
		return err
	}
	f.look(user, t.DefaultWorkdir)
	return nil
}

type furnisher struct {
	tree *oci.Tree
	note func(string)
}

func invalidImage(format string, args ...any) error {
	return sandbox.Errorf(sandbox.KindInvalid, "the image cannot be a sandbox's: "+format, args...)
}

// places makes what is mounted on. The first three are moved there before the
// guest has left its initramfs: a link there would lead into that.
func (f furnisher) places() error {
	for _, p := range []struct {
		name   string
		perm   fs.FileMode
		noLink bool
	}{
		{"dev", 0o755, true},
		{"proc", 0o555, true},
		{"sys", 0o555, true},
		{"run", 0o755, false},
		{"tmp", 0o777 | fs.ModeSticky, false},
		{"etc", 0o755, false},
	} {
		info, err := f.tree.Lstat(p.name)
		if err == nil && p.noLink && !info.IsDir() {
			return invalidImage("/%s is not a directory, but a sandbox has its own there", p.name)
		}
		if err := f.tree.MkdirAll(p.name, p.perm); err != nil {
			return fmt.Errorf("make /%s: %w", p.name, err)
		}
	}
	return nil
}

// files writes what is missing. The guest writes its name and its resolver at
// every start.
func (f furnisher) files() error {
	for _, file := range []struct {
		name, text string
		perm       fs.FileMode
	}{
		{"etc/passwd", "root:x:0:0:root:/root:/bin/sh\n", 0o644},
		{"etc/group", "root:x:0:\n", 0o644},
		{"etc/hosts", "127.0.0.1 localhost\n::1 localhost\n", 0o644},
	} {
		if data, err := f.tree.ReadFile(file.name, maxAccounts); err == nil && len(data) > 0 {
			continue
		} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("read /%s: %w", file.name, err)
		}
		if err := f.tree.WriteFile(file.name, []byte(file.text), file.perm); err != nil {
			return fmt.Errorf("write /%s: %w", file.name, err)
		}
	}
	// One that came with the image would be the same in every sandbox.
	if _, err := f.tree.Stat("etc/machine-id"); err == nil {
		if err := f.tree.WriteFile("etc/machine-id", nil, 0o444); err != nil {
			return fmt.Errorf("empty /etc/machine-id: %w", err)
		}
	}
	return nil
}

// account is one line of /etc/passwd.
type account struct {
	name     string
	uid, gid uint32
	home     string
}

// user finds the account for what an image says: a name or a number, with or
// without a group. A number without an account gets one, for commands are run by
// name.
func (f furnisher) user(wanted string) (account, error) {
	who, group, hasGroup := strings.Cut(wanted, ":")
	if who == "" {
		who = "0"
	}
	accounts, err := f.accounts()
	if err != nil {
		return account{}, err
	}
	uid, number := parseID(who)
	i := slices.IndexFunc(accounts, func(a account) bool { return a.name == who })
	if i < 0 && number {
		i = slices.IndexFunc(accounts, func(a account) bool { return a.uid == uid })
	}
	if i < 0 && !number {
		return account{}, invalidImage("it is to run as the user %.100q, who is not in its /etc/passwd", who)
	}
	gid, err := f.group(group)
	if err != nil {
		return account{}, err
	}
	if i < 0 {
		return f.addUser(accounts, uid, gid)
	}
	if hasGroup && group != "" && gid != accounts[i].gid {
		f.note(fmt.Sprintf("the group %s of the image's user is not kept: commands have the groups that /etc/passwd and /etc/group give %s", group, accounts[i].name))
	}
	return accounts[i], nil
}

func (f furnisher) accounts() ([]account, error) {
	lines, err := f.lines("etc/passwd", 7)
	var out []account
	for _, l := range lines {
		uid, ok1 := parseID(l[2])
		gid, ok2 := parseID(l[3])
		if ok1 && ok2 {
			out = append(out, account{name: l[0], uid: uid, gid: gid, home: l[5]})
		}
	}
	return out, err
}

// group finds a group's number; without one it is root's.
func (f furnisher) group(name string) (uint32, error) {
	if gid, ok := parseID(name); ok || name == "" {
		return gid, nil
	}
	lines, err := f.lines("etc/group", 4)
	if err != nil {
		return 0, err
	}
	for _, l := range lines {
		if gid, ok := parseID(l[2]); ok && l[0] == name {
			return gid, nil
		}
	}
	return 0, invalidImage("it is to run with the group %.100q, which is not in its /etc/group", name)
}

// lines splits an account file as the guest does: lines of another shape count
// for nothing.
func (f furnisher) lines(name string, fields int) ([][]string, error) {
	data, err := f.tree.ReadFile(name, maxAccounts)
	if err != nil {
		return nil, fmt.Errorf("read /%s: %w", name, err)
	}
	var out [][]string
	for line := range strings.Lines(string(data)) {
		if l := strings.Split(strings.TrimRight(line, "\n"), ":"); len(l) == fields && l[0] != "" {
			out = append(out, l)
		}
	}
	return out, nil
}

func (f furnisher) addUser(accounts []account, uid, gid uint32) (account, error) {
	a := account{name: fmt.Sprintf("user%d", uid), uid: uid, gid: gid, home: "/"}
	if uid == 0 {
		a.name, a.home = "root", "/root"
	}
	if slices.ContainsFunc(accounts, func(b account) bool { return b.name == a.name }) {
		return account{}, invalidImage("it is to run as the number %d, which has no account, and the name %s is taken", uid, a.name)
	}
	data, err := f.tree.ReadFile("etc/passwd", maxAccounts)
	if err != nil {
		return account{}, err
	}
	text := string(data)
	if text != "" && !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	text += fmt.Sprintf("%s:x:%d:%d::%s:/bin/sh\n", a.name, uid, gid, a.home)
	if err := f.tree.WriteFile("etc/passwd", []byte(text), 0o644); err != nil {
		return account{}, fmt.Errorf("write /etc/passwd: %w", err)
	}
	f.note(fmt.Sprintf("the image's user %d has no account: it is now called %s", uid, a.name))
	return a, nil
}

// workdir makes the image's directory; none means the user's home.
func (f furnisher) workdir(dir string) (string, error) {
	if dir == "" {
		return "", nil
	}
	dir = path.Clean("/" + dir)
	if strings.ContainsRune(dir, 0) {
		return "", invalidImage("its working directory has a NUL byte in it")
	}
	if err := f.tree.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("make the working directory: %w", err)
	}
	return dir, nil
}

// look says what will be different from what people are used to.
func (f furnisher) look(user account, workdir string) {
	if info, err := f.tree.Stat("bin/sh"); err != nil || info.Mode()&0o111 == 0 {
		f.note("the image has no /bin/sh: programs can be run, lines for a shell cannot")
	}
	if info, err := f.tree.Stat(user.home); workdir == "" && (err != nil || !info.IsDir()) {
		f.note(fmt.Sprintf("%s, the home of %s, is not there: commands begin in /", user.home, user.name))
	}
}

// parseID reads a user's or a group's number.
func parseID(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil && n < 1<<32-1
}
