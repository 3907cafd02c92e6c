package sandbox_test

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func TestNewIDsParseAndDiffer(t *testing.T) {
	seen := map[sandbox.ID]bool{}
	for range 1000 {
		id := sandbox.NewID()
		if seen[id] {
			t.Fatalf("%s came twice", id)
		}
		seen[id] = true
		if got, err := sandbox.ParseID(string(id)); err != nil || got != id {
			t.Fatalf("ParseID(%q) = %q, %v", id, got, err)
		}
	}
}

func TestNewIDFromUsesEveryRandomBit(t *testing.T) {
	zero := make([]byte, 15)
	base, err := sandbox.NewIDFrom(bytes.NewReader(zero))
	if err != nil {
		t.Fatal(err)
	}
	for bit := range 8 * len(zero) {
		b := bytes.Clone(zero)
		b[bit/8] ^= 1 << (bit % 8)
		id, err := sandbox.NewIDFrom(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		if id == base {
			t.Errorf("bit %d of the random bytes changes nothing", bit)
		}
	}
}

func TestNewIDFromReportsAShortSource(t *testing.T) {
	if id, err := sandbox.NewIDFrom(strings.NewReader("short")); !errors.Is(err, io.ErrUnexpectedEOF) || id != "" {
		t.Fatalf("got %q, %v; want no ID and an unexpected end", id, err)
	}
}

func TestParseIDRefuses(t *testing.T) {
	good := string(sandbox.NewID())
	for name, s := range map[string]string{
		"nothing":            "",
		"one too few":        good[1:],
		"one too many":       good + "a",
		"upper case":         strings.ToUpper(good),
		"a dash":             "-" + good[1:],
		"a slash":            "/" + good[1:],
		"a parent directory": "../" + good[3:],
		"a newline behind":   good[1:] + "\n",
		"a newline after it": good + "\n",
		"a NUL":              good[1:] + "\x00",
		"another alphabet":   strings.Repeat("é", 12),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := sandbox.ParseID(s); !sandbox.Is(err, sandbox.KindInvalid) {
				t.Fatalf("ParseID(%q): %v, want an error of kind invalid", s, err)
			}
		})
	}
}

func TestSafeName(t *testing.T) {
	for _, s := range []string{"base", "a", "A.b_c-d", "0", strings.Repeat("x", 64)} {
		if err := sandbox.SafeName("template", s); err != nil {
			t.Errorf("SafeName(%q): %v", s, err)
		}
	}
	for _, s := range []string{
		"", ".", "..", "../images", "a/b", `a\b`, "-rf", "_x", ".hidden", "a b", "a\n", "a\x00", "ä", strings.Repeat("x", 65),
	} {
		err := sandbox.SafeName("template", s)
		if !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("SafeName(%q): %v, want an error of kind invalid", s, err)
		} else if !strings.Contains(err.Error(), "template name") {
			t.Errorf("SafeName(%q) does not say which name: %v", s, err)
		}
	}
}

func TestMessagesCutLongInput(t *testing.T) {
	err := sandbox.SafeName("template", strings.Repeat("x", 1<<20))
	if err == nil || len(err.Error()) > 300 {
		t.Fatalf("a megabyte of name made a message of %d bytes", len(err.Error()))
	}
	if !strings.Contains(err.Error(), "1048576 bytes") {
		t.Errorf("the message hides how long the name was: %v", err)
	}
}

func TestCheckUser(t *testing.T) {
	for _, s := range []string{"root", "user", "_apt", "www-data", "1000"} {
		if err := sandbox.CheckUser(s); err != nil {
			t.Errorf("CheckUser(%q): %v", s, err)
		}
	}
	for _, s := range []string{"", "-x", "a:b", "a b", "../x", strings.Repeat("u", 33)} {
		if err := sandbox.CheckUser(s); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("CheckUser(%q): %v, want an error of kind invalid", s, err)
		}
	}
}
