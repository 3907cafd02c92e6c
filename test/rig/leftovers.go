package rig

import (
	"crypto/sha256"
	"encoding/base32"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// instanceOf is the name that a data directory gives everything on the host.
func instanceOf(data string) string {
	sum := sha256.Sum256([]byte(data))
	return strings.ToLower(base32.StdEncoding.EncodeToString(sum[:])[:5])
}

// Leftovers lists what of this server is on the machine outside its data
// directory, and what of sandboxes is in it: after `down` there is nothing.
func (s *Server) Leftovers() []string {
	s.t.Helper()
	name := instanceOf(s.Data)
	var left []string
	left = append(left, s.processes()...)
	left = append(left, matches("/run/netns", "dm"+name)...)
	left = append(left, matches("/run", "dormouse-"+name)...)
	left = append(left, matches("/sys/fs/cgroup", "dormouse-"+name)...)
	left = append(left, matches("/dev", "dormouse-"+name)...)
	left = append(left, files("device", "dm"+name, "/sys/block/dm-*/dm/name")...)
	left = append(left, matches(filepath.Join(s.Data, "host", "sandboxes"), "")...)
	left = append(left, lines("link", name, s.in("ip", "-o", "link")...)...)
	left = append(left, lines("nft", name, s.in("nft", "list", "tables")...)...)
	left = append(left, lines("mount", name, "cat", "/proc/self/mounts")...)
	left = append(left, lines("mount", s.Data, "cat", "/proc/self/mounts")...)
	left = append(left, files("loop", s.Data, "/sys/block/loop*/loop/backing_file")...)
	return left
}

// in is a command as it sees the server's network namespace.
func (s *Server) in(argv ...string) []string {
	if s.opts.NetNS == "" {
		return argv
	}
	return append([]string{"ip", "netns", "exec", s.opts.NetNS}, argv...)
}

// VMs lists the processes of this server's VMs.
func (s *Server) VMs() []int {
	var pids []int
	for pid, cmdline := range s.related() {
		if strings.Contains(cmdline, "qemu-system") {
			pids = append(pids, pid)
		}
	}
	return pids
}

// Namespaces lists this server's network namespaces, the prepared ones too.
func (s *Server) Namespaces() []string { return matches("/run/netns", "dm"+s.Instance+"-") }

// Groups lists the control groups of this server's VMs, which have the names of
// their sandboxes.
func (s *Server) Groups() []string {
	found, _ := filepath.Glob("/sys/fs/cgroup/dormouse-" + s.Instance + "/*/cgroup.procs") // the pattern is right
	names := []string{}
	for _, file := range found {
		names = append(names, filepath.Base(filepath.Dir(file)))
	}
	return names
}

// Overlays lists the sandboxes whose disks are device-mapper's: their names are
// in those of the devices.
func (s *Server) Overlays() []string {
	names := []string{}
	for _, found := range files("", "dm"+s.Instance+"-o-", "/sys/block/dm-*/dm/name") {
		_, name, _ := strings.Cut(found, "-o-")
		id, _, _ := strings.Cut(name, "-")
		names = append(names, id)
	}
	slices.Sort(names)
	return names
}

func (s *Server) processes() []string {
	var out []string
	for pid, cmdline := range s.related() {
		out = append(out, "process "+strconv.Itoa(pid)+": "+cmdline)
	}
	return out
}

// related finds processes whose command line names this server's folders.
func (s *Server) related() map[int]string {
	out := map[int]string{}
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		s.t.Fatal(err)
	}
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		data, err := os.ReadFile(filepath.Join("/proc", d.Name(), "cmdline"))
		if err != nil {
			continue // it ended meanwhile
		}
		cmdline := strings.ReplaceAll(string(data), "\x00", " ")
		if strings.Contains(cmdline, s.Data) || strings.Contains(cmdline, "/run/dormouse-"+instanceOf(s.Data)) {
			out[pid] = cmdline
		}
	}
	return out
}

func matches(dir, part string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil // a folder that is not there holds nothing
	}
	var out []string
	for _, e := range entries {
		if strings.Contains(e.Name(), part) {
			out = append(out, filepath.Join(dir, e.Name()))
		}
	}
	return out
}

// files lists the files, by pattern, whose content has a text in it.
func files(what, part, pattern string) []string {
	paths, err := filepath.Glob(pattern)
	if err != nil {
		return []string{what + ": " + err.Error()}
	}
	var found []string
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(data), part) { // else it is gone
			found = append(found, what+": "+path+": "+strings.TrimSpace(string(data)))
		}
	}
	return found
}

func lines(what, part string, argv ...string) []string {
	out, err := exec.Command(argv[0], argv[1:]...).Output()
	if err != nil {
		return nil // the tool is not here, or the namespace is gone and all in it
	}
	var found []string
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, part) {
			found = append(found, what+": "+strings.TrimSpace(line))
		}
	}
	return found
}
