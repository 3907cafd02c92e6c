package sandbox_test

import (
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func TestPackagesAndSuites(t *testing.T) {
	for _, s := range []string{"git", "g++", "libc6.1", "python3-venv", "0ad", "a2"} {
		if err := sandbox.CheckPackages([]string{"git", s}); err != nil {
			t.Errorf("package %q: %v", s, err)
		}
	}
	for _, s := range []string{"", "x", "-y", "git-", "a,b", "a b", "./x.deb", "/x", "git/sid", "git=1", "Git", "~n", "?x", "a\n", strings.Repeat("x", 200)} {
		if err := sandbox.CheckPackages([]string{"git", s}); !sandbox.Is(err, sandbox.KindInvalid) || len(err.Error()) > 300 {
			t.Errorf("package %q: %v", s, err)
		}
	}
	for _, s := range []string{"bookworm", "trixie-backports", "sid"} {
		if err := sandbox.CheckSuite(s); err != nil {
			t.Errorf("suite %q: %v", s, err)
		}
	}
	for _, s := range []string{"", "--hook", "a/b", "Sid", "a b", "-", "1", strings.Repeat("x", 99)} {
		if err := sandbox.CheckSuite(s); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("suite %q: %v", s, err)
		}
	}
}
