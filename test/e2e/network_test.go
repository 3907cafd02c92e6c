package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netns"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/test/rig"
)

// surroundings are three namespaces that stand for the machine that the server
// runs on, the internet, and the LAN beside the machine. Nothing leaves them.
type surroundings struct {
	t                   *testing.T
	host, internet, lan string
}

const surroundingsSetup = `
ip netns add $host; ip netns add $internet; ip netns add $lan
ip -n $host link set lo up; ip -n $internet link set lo up; ip -n $lan link set lo up
ip -n $host link add uplink0 type veth peer name u0 netns $internet
ip -n $host addr add 198.51.100.2/24 dev uplink0; ip -n $host addr add 2001:db8:1::2/64 dev uplink0 nodad
ip -n $host link set uplink0 up
ip -n $internet addr add 198.51.100.1/24 dev u0; ip -n $internet addr add 2001:db8:1::1/64 dev u0 nodad
ip -n $internet link set u0 up
for a in 203.0.113.10 203.0.113.53 169.254.169.254; do ip -n $internet addr add $a/32 dev lo; done
ip -n $host route add default via 198.51.100.1; ip -n $host -6 route add default via 2001:db8:1::1
ip -n $host link add lan0 type veth peer name l0 netns $lan
ip -n $host addr add 192.168.77.1/24 dev lan0; ip -n $host link set lan0 up
ip -n $lan addr add 192.168.77.10/24 dev l0; ip -n $lan link set l0 up
ip -n $lan route add default via 192.168.77.1
`

func newSurroundings(t *testing.T) *surroundings {
	t.Helper()
	testkit.Root(t)
	testkit.Tool(t, "ip")
	pid := os.Getpid()
	w := &surroundings{t, fmt.Sprint("e2e-host-", pid), fmt.Sprint("e2e-inet-", pid), fmt.Sprint("e2e-lan-", pid)}
	config := filepath.Join("/etc/netns", w.host) // ip netns exec shows its files as those of /etc
	t.Cleanup(func() {
		for _, ns := range []string{w.host, w.internet, w.lan} {
			if out, err := exec.Command("ip", "netns", "del", ns).CombinedOutput(); err != nil {
				t.Errorf("ip netns del %s: %v\n%s", ns, err, out)
			}
		}
		if err := os.RemoveAll(config); err != nil {
			t.Error(err)
		}
		_ = os.Remove(filepath.Dir(config)) // if it is empty, it was not there before
	})
	cmd := exec.Command("sh", "-ec", surroundingsSetup)
	cmd.Env = append(os.Environ(), "host="+w.host, "internet="+w.internet, "lan="+w.lan)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.MkdirAll(config, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(config, "resolv.conf"), []byte("nameserver 203.0.113.53\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	w.web(w.internet, "203.0.113.10:80", "the internet")
	w.web(w.internet, "[2001:db8:1::1]:80", "the internet of IPv6")
	w.web(w.internet, "169.254.169.254:80", "credentials")
	w.web(w.lan, "192.168.77.10:80", "the LAN")
	w.names(w.internet, "203.0.113.53:53")
	return w
}

// listen opens sockets in a namespace.
func (w *surroundings) listen(ns, address string) (l net.Listener, p net.PacketConn) {
	w.t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		handle, err := netns.GetFromName(ns)
		if err == nil {
			err = netns.Set(handle)
			_ = handle.Close() // only a handle
		}
		if err == nil {
			l, err = net.Listen("tcp", address)
		}
		if err == nil {
			p, err = net.ListenPacket("udp", address)
		}
		done <- err
	}()
	if err := <-done; err != nil {
		w.t.Fatalf("listen on %s in %s: %v", address, ns, err)
	}
	w.t.Cleanup(func() { _ = l.Close(); _ = p.Close() }) // a server may have closed them
	return l, p
}

func (w *surroundings) web(ns, address, says string) {
	w.t.Helper()
	l, _ := w.listen(ns, address)
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprintln(rw, says)
	})}
	w.t.Cleanup(func() { _ = server.Close() })
	go func() { _ = server.Serve(l) }() // ends with Close
}

// names answers that site.example is 203.0.113.10, and nothing else.
func (w *surroundings) names(ns, address string) {
	w.t.Helper()
	l, p := w.listen(ns, address)
	handler := dns.HandlerFunc(func(rw dns.ResponseWriter, q *dns.Msg) {
		reply := new(dns.Msg).SetReply(q)
		switch q := q.Question[0]; {
		case q.Name != "site.example.":
			reply.Rcode = dns.RcodeNameError
		case q.Qtype == dns.TypeA:
			reply.Answer = []dns.RR{&dns.A{
				Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.IPv4(203, 0, 113, 10),
			}}
		}
		_ = rw.WriteMsg(reply) // whoever asked asks again
	})
	for _, server := range []*dns.Server{{Listener: l, Handler: handler}, {PacketConn: p, Handler: handler}} {
		go func() { _ = server.ActivateAndServe() }() // ends with its socket
	}
}

// reach is a connection that a guest tries.
type reach struct {
	Name string `json:"name"`
	Host string `json:"host"`
	Port int    `json:"port"`
}

// attempts makes all connections at once and says what came of each. It waits longer
// for those that should be open.
const attempts = `
import json, socket, sys, threading
out = {}
def attempt(r, connect, answer):
    try:
        with socket.create_connection((r['host'], r['port']), timeout=connect) as s:
            s.settimeout(answer)
            out[r['name']] = 'open'
            s.sendall(b'GET / HTTP/1.0\r\n\r\n')
            out[r['name']] += ': ' + s.recv(300).decode(errors='replace').strip().split('\n')[-1]
    except OSError as e:
        out.setdefault(r['name'], 'closed: ' + str(e))
open, closed = json.load(sys.stdin)
threads = [threading.Thread(target=attempt, args=(r, 30, 30)) for r in open or []]
threads += [threading.Thread(target=attempt, args=(r, 6, 3)) for r in closed or []]
for t in threads: t.start()
for t in threads: t.join()
print(json.dumps(out))
`

// try tries those that should be open and those that should be closed.
func (w world) try(id string, open, closed []reach) map[string]string {
	w.t.Helper()
	in, err := json.Marshal([][]reach{open, closed})
	if err != nil {
		w.t.Fatal(err)
	}
	r := w.exec(id, api.Exec{Command: []string{"python3", "-c", attempts}, Stdin: string(in), User: "root"})
	out := map[string]string{}
	if err := json.Unmarshal([]byte(r.Stdout), &out); err != nil || len(out) != len(open)+len(closed) {
		w.t.Fatalf("%d attempts of %d: %v\n%s%s", len(out), len(open)+len(closed), err, r.Stdout, r.Stderr)
	}
	return out
}

// TestGuestNetwork: from inside a guest the internet is reached by address and
// by name; the host's API, other guests, the metadata service and the LAN are
// not, by IPv4 or IPv6.
func TestGuestNetwork(t *testing.T) {
	around := newSurroundings(t)
	w := world{rig.Start(t, rig.Options{NetNS: around.host, Args: []string{"--listen", "0.0.0.0:7070"}}), t}
	guest, other := w.create(small()).ID, w.create(small()).ID
	shut := small()
	shut.Network = &api.Network{}
	alone := w.create(shut).ID
	serveInside(w, other)

	forbidden := around.forbidden()
	for _, r := range forbidden { // what is not there would prove nothing
		if slices.Contains([]string{"the gateway of every guest", "this host's loopback"}, r.Name) || strings.HasPrefix(r.Name, "port ") {
			continue
		}
		around.mustReach(r)
	}
	internet := []reach{{"the internet by address", "203.0.113.10", 80}, {"the internet by name", "site.example", 80}}

	got := w.try(guest, internet, forbidden)
	for _, r := range internet {
		if got[r.Name] != "open: the internet" {
			t.Errorf("%s: %s", r.Name, got[r.Name])
		}
		t.Logf("reached: %s (%s:%d): %s", r.Name, r.Host, r.Port, got[r.Name])
	}
	for _, r := range forbidden {
		if !strings.HasPrefix(got[r.Name], "closed") {
			t.Errorf("%s (%s:%d) is reached: %s", r.Name, r.Host, r.Port, got[r.Name])
		}
		t.Logf("not reached: %s (%s:%d): %s", r.Name, r.Host, r.Port, got[r.Name])
	}
	if r := w.exec(guest, api.Exec{Shell: "curl -sS -m 20 http://site.example/"}); r.Stdout != "the internet\n" {
		t.Errorf("curl: %q, %q", r.Stdout, r.Stderr)
	}
	if got := w.sh(guest, "grep -v ' lo$' /proc/net/if_inet6 | grep -v '^fe80' ||:"); got != "" {
		t.Errorf("the guest has IPv6 addresses: %s", got)
	}
	for name, result := range w.try(alone, nil, append(internet, forbidden...)) {
		if !strings.HasPrefix(result, "closed") {
			t.Errorf("without internet, %s is reached: %s", name, result)
		}
	}
	t.Logf("with network.internet false: none of %d is reached", len(internet)+len(forbidden))
}

// serveInside makes the other guest listen as well as its agent does.
func serveInside(w world, id string) {
	w.t.Helper()
	w.sh(id, "cd /tmp && mkdir www && cd www && (setsid python3 -m http.server 8000 >/dev/null 2>&1 &)")
	testkit.Eventually(w.t, time.Minute, "listening in the other guest", func() bool {
		return w.exec(id, api.Exec{Shell: "curl -sf -m 5 http://127.0.0.1:8000/"}).ExitCode == 0
	})
}

// forbidden lists everything around a guest that it must not reach.
func (w *surroundings) forbidden() []reach {
	w.t.Helper()
	list := []reach{
		{"the metadata service", "169.254.169.254", 80},
		{"the LAN", "192.168.77.10", 80},
		{"the internet of IPv6", "2001:db8:1::1", 80},
		{"the gateway of every guest", "100.127.255.1", 7070},
	}
	out, err := exec.Command("ip", "-n", w.host, "-j", "addr").Output()
	if err != nil {
		w.t.Fatal(err)
	}
	var links []struct {
		Name  string `json:"ifname"`
		Addrs []struct {
			Local string `json:"local"`
			Scope string `json:"scope"`
		} `json:"addr_info"`
	}
	if err := json.Unmarshal(out, &links); err != nil {
		w.t.Fatal(err)
	}
	veths := 0
	for _, l := range links {
		for _, a := range l.Addrs {
			if l.Name == "lo" || a.Scope != "global" {
				continue
			}
			list = append(list, reach{"the API at " + l.Name + " " + a.Local, a.Local, 7070})
			addr, err := netip.ParseAddr(a.Local)
			if err != nil {
				w.t.Fatal(err)
			}
			if !strings.HasPrefix(l.Name, "dm") || !addr.Is4() {
				continue
			}
			veths++
			peer := addr.Next().String() // a /31: the guest's end is the odd address
			list = append(list, reach{"port " + fmt.Sprint(guestapi.Port) + " of the guest behind " + l.Name, peer, guestapi.Port},
				reach{"port 8000 of the guest behind " + l.Name, peer, 8000})
		}
	}
	if veths < 3 {
		w.t.Fatalf("%d veths of three guests were found in\n%s", veths, out)
	}
	return list
}

// mustReach connects from the host, where everything can be reached.
func (w *surroundings) mustReach(r reach) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn, err := rig.DialIn(ctx, w.host, "tcp", net.JoinHostPort(r.Host, fmt.Sprint(r.Port)))
	if err != nil {
		w.t.Errorf("%s cannot be reached from the host itself: %v", r.Name, err)
		return
	}
	_ = conn.Close() // it was reached
}
