package boot

import (
	"errors"
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
	hosts, err := os.ReadFile(etc + "/hosts")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return errors.Join(
		rewrite(etc+"/hostname", name+"\n"),
		rewrite(etc+"/hosts", hostsFile(string(hosts), name)),
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
// not followed.
func rewrite(path, content string) error {
	if info, err := os.Lstat(path); err == nil && info.Mode()&fs.ModeSymlink != 0 {
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	if have, err := os.ReadFile(path); err == nil && string(have) == content {
		return nil
	}
	return os.WriteFile(path, []byte(content), 0o644)
}
