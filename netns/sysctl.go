package netns

import (
	"errors"
	"io/fs"
	"os"
	"strings"
)

const forwardingSysctl = "net/ipv4/ip_forward"

// A sysctl under net/ belongs to the namespace of the thread that opens it.
func readSysctl(name string) (string, error) {
	data, err := os.ReadFile("/proc/sys/" + name)
	return strings.TrimSpace(string(data)), err
}

func writeSysctl(name, value string) error {
	return os.WriteFile("/proc/sys/"+name, []byte(value), 0)
}

// disableIPv6 turns IPv6 off for an interface name, "all" or "default". A
// kernel without IPv6 has nothing to turn off.
func disableIPv6(iface string) error {
	err := writeSysctl("net/ipv6/conf/"+iface+"/disable_ipv6", "1")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
