package boot

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	defaultHostname = "dormouse"
	// ours marks the line of /etc/hosts that we wrote.
	ours = "# dormouse"
)

// writeNames sets the hostname and the files that turn names into addresses. An
// /etc that cannot be written is a warning.
func (s *System) writeNames() error {
	name := s.Boot.Hostname
	if name == "" {
		name = defaultHostname
	}
	if s.Boot.Gateway.IsValid() {
		s.warn("write /etc/resolv.conf", rewrite("/etc/resolv.conf", "nameserver "+s.Boot.Gateway.String()+"\n"))
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		return err
	}
	s.warn("write the hostname", writeHostname("/etc", name))
	return nil
}

// writeHostname makes the name known inside: sudo and others look it up.
func writeHostname(etc, name string) error {
	hosts, err := readFile(etc + "/hosts")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return errors.Join(
		rewrite(etc+"/hostname", name+"\n"),
		rewrite(etc+"/hosts", hostsFile(hosts, name)),
	)
}

// hostsFile replaces our line and leaves what the image or the user wrote.
func hostsFile(old, name string) string {
	var b strings.Builder
	localhost := false
	for line := range strings.Lines(old) {
		line = strings.TrimRight(line, "\n")
		if strings.HasSuffix(line, ours) {
			continue
		}
		fields := strings.Fields(line)
		localhost = localhost || len(fields) > 1 && fields[0] == "127.0.0.1"
		b.WriteString(line + "\n")
	}
	if !localhost {
		b.WriteString("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n")
	}
	b.WriteString("127.0.1.1 " + name + " " + ours + "\n")
	return b.String()
}

// rewrite replaces a file unless it has this content already. A link, such as
// the one of systemd-resolved to a place that does not exist here, is replaced,
// not followed; so is a pipe, which would be waited for.
func rewrite(path, content string) error {
	if info, err := os.Lstat(path); err == nil && !info.Mode().IsRegular() {
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	if have, err := readFile(path); err == nil && have == content {
		return nil // also where it could not be written
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|unix.O_NONBLOCK, 0o644) // a pipe is not waited for
	if err != nil {
		return err
	}
	return errors.Join(overwrite(f, content), f.Close())
}

// overwrite gives a file this content. It does not empty it first: ext4 would write
// it to the disk as soon as it is closed, and whoever closes it would wait for that.
func overwrite(f *os.File, content string) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if _, err := f.WriteAt([]byte(content), 0); err != nil {
		return err
	}
	if info.Size() <= int64(len(content)) {
		return nil
	}
	return f.Truncate(int64(len(content)))
}

// maxNames bounds a file of names, in bytes.
const maxNames = 4 << 20

// readFile reads a file that the root of the guest may have put anything in the
// place of. Nothing of that makes it wait or takes much memory.
func readFile(path string) (string, error) {
	f, err := openRegular(path, os.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }() // read only
	data, err := io.ReadAll(io.LimitReader(f, maxNames+1))
	if err == nil && len(data) > maxNames {
		err = fmt.Errorf("%s is larger than %d bytes", path, maxNames)
	}
	return string(data), err
}

// openRegular opens a file, or what a link to one leads to.
func openRegular(path string, flag int) (*os.File, error) {
	f, err := os.OpenFile(path, flag|unix.O_NONBLOCK, 0) // a pipe is not waited for
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
