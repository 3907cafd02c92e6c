package guestapi_test

import (
	"crypto/ed25519"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
)

func keys(t testing.TB) (ed25519.PublicKey, ed25519.PrivateKey) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return public, private
}

func TestCmdlineRoundTrip(t *testing.T) {
	public, _ := keys(t)
	for name, want := range map[string]guestapi.Boot{
		"only a disk": {RootDevice: "/dev/vda"},
		"everything": {
			RootDevice: "/dev/vdb", Address: netip.MustParsePrefix("100.127.255.2/30"),
			Gateway: netip.MustParseAddr("100.127.255.1"), HostKey: public, Hostname: "box", SandboxID: "abc",
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := guestapi.ParseCmdline("console=ttyS0 quiet " + want.Cmdline() + " panic=-1\n")
			if err != nil {
				t.Fatal(err)
			}
			equal := cmp.Comparer(func(a, b guestapi.Boot) bool { return a.Cmdline() == b.Cmdline() })
			if diff := cmp.Diff(want, got, equal); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestCmdlineThatIsWrongSaysWhichParameter(t *testing.T) {
	for cmdline, want := range map[string]string{
		"quiet": "dormouse.root",
		"dormouse.root=/dev/vda dormouse.address=10.0.0.1":    "dormouse.address",
		"dormouse.root=/dev/vda dormouse.gateway=nowhere":     "dormouse.gateway",
		"dormouse.root=/dev/vda dormouse.hostkey=AAAA":        "dormouse.hostkey",
		"dormouse.root=/dev/vda dormouse.hostkey=not+base64=": "dormouse.hostkey",
	} {
		if _, err := guestapi.ParseCmdline(cmdline); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v does not name %s", cmdline, err, want)
		}
	}
}

func FuzzParseCmdline(f *testing.F) {
	f.Add("dormouse.root=/dev/vda dormouse.address=10.0.0.2/30 dormouse.gateway=10.0.0.1 dormouse.hostname=a")
	f.Add("dormouse.root= dormouse.hostkey=")
	f.Fuzz(func(t *testing.T, cmdline string) {
		b, err := guestapi.ParseCmdline(cmdline)
		if err != nil {
			return
		}
		if b.Address.IsValid() != b.Gateway.IsValid() {
			return // Cmdline writes both or none
		}
		again, err := guestapi.ParseCmdline(b.Cmdline())
		if err != nil || again.Cmdline() != b.Cmdline() {
			t.Errorf("%q became %q (%v)", b.Cmdline(), again.Cmdline(), err)
		}
	})
}

func TestVerifierAcceptsWhatTheHostSignedOnce(t *testing.T) {
	public, private := keys(t)
	v := guestapi.NewVerifier(public)
	now := time.Now()
	body := []byte(`{"a":1}`)
	header := guestapi.Sign(private, "me", "POST", "/init", now, body)
	if err := v.Verify(header, "me", "POST", "/init", body); err != nil {
		t.Fatal(err)
	}
	if err := v.Verify(header, "me", "POST", "/init", body); !errors.Is(err, guestapi.ErrSignature) {
		t.Errorf("a repetition: %v", err)
	}
	older := guestapi.Sign(private, "me", "POST", "/init", now.Add(-time.Second), body)
	if err := v.Verify(older, "me", "POST", "/init", body); !errors.Is(err, guestapi.ErrSignature) {
		t.Errorf("an older one: %v", err)
	}
	newer := guestapi.Sign(private, "me", "POST", "/init", now.Add(time.Nanosecond), body)
	if err := v.Verify(newer, "me", "POST", "/init", body); err != nil {
		t.Errorf("a newer one: %v", err)
	}
}

func TestVerifierRefusesWhatTheHostDidNotSign(t *testing.T) {
	public, private := keys(t)
	_, stranger := keys(t)
	now, body := time.Now(), []byte("body")
	good := guestapi.Sign(private, "me", "POST", "/init", now, body)
	stamp, sig, _ := strings.Cut(good, ".")
	for name, try := range map[string][3]string{
		"another key":    {guestapi.Sign(stranger, "me", "POST", "/init", now, body), "POST", "body"},
		"another guest":  {guestapi.Sign(private, "you", "POST", "/init", now, body), "POST", "body"},
		"another method": {good, "PUT", "body"},
		"another body":   {good, "POST", "Body"},
		"another time":   {stamp + "0." + sig, "POST", "body"},
		"no signature":   {"", "POST", "body"},
		"only a time":    {stamp, "POST", "body"},
		"cut":            {good[:len(good)-2], "POST", "body"},
	} {
		v := guestapi.NewVerifier(public)
		if err := v.Verify(try[0], "me", try[1], "/init", []byte(try[2])); !errors.Is(err, guestapi.ErrSignature) {
			t.Errorf("%s: %v", name, err)
		}
		if err := v.Verify(good, "me", "POST", "/init", body); err != nil {
			t.Errorf("%s: the true one is refused afterwards: %v", name, err)
		}
	}
}

func FuzzVerify(f *testing.F) {
	public, private := keys(f)
	f.Add(guestapi.Sign(private, "me", "POST", "/init", time.Now(), []byte("x")))
	f.Add("1.")
	f.Add(".")
	f.Fuzz(func(t *testing.T, header string) {
		v := guestapi.NewVerifier(public)
		if v.Verify(header, "me", "POST", "/init", []byte("y")) == nil {
			t.Errorf("accepted %q", header)
		}
	})
}

func TestFileSignature(t *testing.T) {
	at := int64(1700000000)
	sig := guestapi.FileSignature{Path: "/home/user/a", Operation: guestapi.FileRead, User: "user"}
	// printf %s /home/user/a:read:user:secret | openssl dgst -sha256 -binary | base64
	const golden = "v1_3QZxKxfGTX6Oh47x+4O8zfKJgTO/S55QJ69RSJqc/K8"
	if got := sig.Sign("secret"); got != golden {
		t.Errorf("got %s, want %s", got, golden)
	}
	sig.Expires = &at
	const goldenExpiring = "v1_B8nK/bIPhlfHuOFoBdDuVMh1qe/OXCG6pt+7GTQ3i4U" // the same, with :1700000000
	if got := sig.Sign("secret"); got != goldenExpiring {
		t.Errorf("with an expiry: got %s, want %s", got, goldenExpiring)
	}
	for name, other := range map[string]guestapi.FileSignature{
		"another path":      {Path: "/home/user/b", Operation: guestapi.FileRead, User: "user", Expires: &at},
		"another operation": {Path: "/home/user/a", Operation: guestapi.FileWrite, User: "user", Expires: &at},
		"another user":      {Path: "/home/user/a", Operation: guestapi.FileRead, Expires: &at},
		"no expiry":         {Path: "/home/user/a", Operation: guestapi.FileRead, User: "user"},
	} {
		if other.Valid("secret", goldenExpiring) {
			t.Errorf("valid for %s", name)
		}
	}
	if !sig.Valid("secret", goldenExpiring) || sig.Valid("Secret", goldenExpiring) {
		t.Error("the token does not decide")
	}
}
