package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Where a server listens and keeps its data unless it is told otherwise.
const (
	defaultListen  = "127.0.0.1:7070"
	defaultURL     = "http://" + defaultListen
	defaultDataDir = "/var/lib/dormouse"
)

// config is the client's config file.
type config struct {
	URL string `json:"url"`
	Key string `json:"key"`
}

// configPathIn is where the config of the user with this home directory is.
func configPathIn(home string) string {
	return filepath.Join(home, ".config", "dormouse", "config.json")
}

// configPath is where this process looks for its config.
func configPath() (string, error) {
	if dir := os.Getenv("XDG_CONFIG_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "dormouse", "config.json"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("find the config file: %w", err)
	}
	return configPathIn(home), nil
}

// readConfig reads a config file; a missing one is empty.
func readConfig(path string) (config, error) {
	const most = 64 << 10
	data, err := osfs.ReadFileLimit(path, most)
	if errors.Is(err, fs.ErrNotExist) {
		return config{}, nil
	}
	if err != nil {
		return config{}, fmt.Errorf("read config: %w", err)
	}
	var c config
	if err := json.Unmarshal(data, &c); err != nil {
		return config{}, sandbox.Errorf(sandbox.KindInvalid, "read config %s: %w", path, err)
	}
	return c, nil
}

// writeConfig replaces a config file as a whole, readable to its owner only.
// Directories that it has to make are the owner's and private too. A negative
// uid leaves everything to the caller's user.
func writeConfig(path string, c config, uid, gid int) error {
	if err := makeOwnedDir(filepath.Dir(path), uid, gid); err != nil {
		return fmt.Errorf("make config directory: %w", err)
	}
	data, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return fmt.Errorf("encode config: %w", err)
	}
	err = osfs.Replace("config", path, 0o600, func(f *os.File) error {
		if uid >= 0 {
			if err := f.Chown(uid, gid); err != nil {
				return err
			}
		}
		_, err := f.Write(append(data, '\n'))
		return err
	})
	if err != nil {
		return fmt.Errorf("write config: %w", err)
	}
	return nil
}

func makeOwnedDir(dir string, uid, gid int) error {
	if info, err := os.Stat(dir); err == nil {
		if !info.IsDir() {
			return fmt.Errorf("%s is not a directory", dir)
		}
		return nil
	}
	if parent := filepath.Dir(dir); parent != dir {
		if err := makeOwnedDir(parent, uid, gid); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil // made by somebody else just now
		}
		return err
	}
	if uid >= 0 {
		return os.Lchown(dir, uid, gid)
	}
	return nil
}

// loadConfig is the config file with the environment over it.
func loadConfig() (config, error) {
	path, err := configPath()
	if err != nil {
		return config{}, err
	}
	c, err := readConfig(path)
	if err != nil {
		return config{}, err
	}
	if v := os.Getenv("DORMOUSE_URL"); v != "" {
		c.URL = v
	}
	if v := os.Getenv("DORMOUSE_API_KEY"); v != "" {
		c.Key = v
	}
	if c.URL == "" {
		c.URL = defaultURL
	}
	if c.Key == "" {
		return config{}, sandbox.Errorf(sandbox.KindUnauthorized,
			"no API key: run make up, which writes one into %s, or dormouse login, or set DORMOUSE_API_KEY", path)
	}
	return c, nil
}
