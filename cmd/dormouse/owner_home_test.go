package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// TestLinksInAHome: "sudo dormouse up" writes a key into the home of whoever
// typed it. What that user put there does not lead root anywhere else.
func TestLinksInAHome(t *testing.T) {
	testkit.Root(t)
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil { // the user passes through
		t.Fatal(err)
	}
	victim := filepath.Join(dir, "victim")
	if err := os.Mkdir(victim, 0o755); err != nil {
		t.Fatal(err)
	}
	secret := config{URL: "http://elsewhere", Key: "secret"}
	if err := writeConfig(filepath.Join(victim, "config.json"), secret, -1, -1); err != nil {
		t.Fatal(err)
	}
	for name, link := range map[string]string{"folder": ".config/dormouse", "parent": ".config"} {
		t.Run(name, func(t *testing.T) {
			home := filepath.Join(dir, name)
			o := owner{name: "u", uid: 4321, gid: 4322, config: configPathIn(home)}
			if err := os.MkdirAll(filepath.Dir(filepath.Join(home, link)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(victim, filepath.Join(home, link)); err != nil {
				t.Fatal(err)
			}
			for _, p := range []string{home, filepath.Join(home, ".config")} {
				if err := os.Lchown(p, o.uid, o.gid); err != nil {
					t.Fatal(err)
				}
			}
			if c, err := o.readConfig(); c.Key != "" {
				t.Errorf("root read for the user: %+v, %v", c, err)
			}
			if err := o.writeConfig(o.config, config{URL: defaultURL, Key: "x"}); err == nil {
				t.Error("root wrote where the user may not")
			}
			entries, err := os.ReadDir(victim)
			if err != nil || len(entries) != 1 {
				t.Errorf("the victim has %v, %v", entries, err)
			}
			if c, err := readConfig(filepath.Join(victim, "config.json")); err != nil || c != secret {
				t.Errorf("the victim's file is %+v, %v", c, err)
			}
		})
	}
	t.Run("no link", func(t *testing.T) {
		home := filepath.Join(dir, "honest")
		o := owner{name: "u", uid: 4321, gid: 4322, config: configPathIn(home)}
		if err := os.Mkdir(home, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(home, o.uid, o.gid); err != nil {
			t.Fatal(err)
		}
		want := config{URL: defaultURL, Key: "x"}
		if err := o.writeConfig(o.config, want); err != nil {
			t.Fatal(err)
		}
		if c, err := o.readConfig(); err != nil || c != want {
			t.Errorf("read %+v, %v", c, err)
		}
		if u, g := ownerOf(t, o.config); u != o.uid || g != o.gid {
			t.Errorf("the file belongs to %d:%d", u, g)
		}
		if os.Geteuid() != 0 || os.WriteFile(filepath.Join(dir, "roots"), nil, 0o600) != nil {
			t.Error("root lost its rights")
		}
	})
}
