package past

import (
	"bufio"
	"os"
	"strconv"
	"strings"
)

// The kernel's own tables of TCP sockets, as text: one line each, below a title. Those
// of a thread, because only it may be in the network that is asked about.
var tables = []string{"/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"}

// noneLeads says that no socket can be one end of a connection to another address: it
// is quick to say, also where all of it is done for the first time. What it does not
// understand may be one.
func noneLeads(spare uint16) bool {
	for _, path := range tables {
		if !noneLeadsIn(path, spare) {
			return false
		}
	}
	return true
}

func noneLeadsIn(path string, spare uint16) bool {
	f, err := os.Open(path)
	if err != nil {
		return os.IsNotExist(err) && path == tables[1] // a kernel without IPv6 has none
	}
	defer func() { _ = f.Close() }() // read only
	lines := bufio.NewScanner(f)
	lines.Scan() // the title
	for lines.Scan() {
		if lineLeads(lines.Text(), spare) {
			return false
		}
	}
	return lines.Err() == nil
}

// lineLeads reads "0: 0100007F:1F90 00000000:0000 0A …": a number, the address of
// either end, and the state, in hexadecimal.
func lineLeads(line string, spare uint16) bool {
	fields := strings.Fields(line)
	if len(fields) < 4 {
		return true
	}
	_, port, ok := strings.Cut(fields[1], ":")
	to, _, ok2 := strings.Cut(fields[2], ":")
	if !ok || !ok2 {
		return true
	}
	local, err := strconv.ParseUint(port, 16, 16)
	state, err2 := strconv.ParseUint(fields[3], 16, 8)
	if err != nil || err2 != nil {
		return true
	}
	if over(uint8(state)) || uint16(local) == spare {
		return false
	}
	return strings.Trim(to, "0") != "" // the rest is netlink's to say
}
