package testkit

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// defaultAssets is where `make` puts what tests with real VMs need.
const defaultAssets = "/var/cache/dormouse/assets"

// Assets is the folder with a guest kernel and what else tests boot:
// DORMOUSE_ASSETS, or the place where make puts it.
func Assets() string {
	if dir := os.Getenv("DORMOUSE_ASSETS"); dir != "" {
		return dir
	}
	return defaultAssets
}

// Asset is the path of one of the assets. The test is skipped when it is missing.
func Asset(t testing.TB, name string) string {
	t.Helper()
	path := filepath.Join(Assets(), name)
	_, err := os.Stat(path)
	Require(t, "assets", err == nil, path+" is missing; DORMOUSE_ASSETS names another folder")
	return path
}

// Accelerator is how the VMs of whole-system tests run: by software emulation,
// the same on every machine, or as DORMOUSE_ACCEL says, which in a lab is kvm.
func Accelerator() string {
	if accel := os.Getenv("DORMOUSE_ACCEL"); accel != "" {
		return accel
	}
	return "tcg"
}

// UpFlags are further flags of every "dormouse up" that a test runs: those of
// DORMOUSE_UP, by which a slow machine gets more time.
func UpFlags() []string { return strings.Fields(os.Getenv("DORMOUSE_UP")) }

// Long skips a test that takes minutes, unless DORMOUSE_LONG=1 asks for it.
func Long(t testing.TB, why string) {
	t.Helper()
	Require(t, "long", IsLong(), "set DORMOUSE_LONG=1: "+why)
}

// IsLong says that tests may take minutes: DORMOUSE_LONG=1 asks for it.
func IsLong() bool { return os.Getenv("DORMOUSE_LONG") == "1" }

// InLab says that the tests run in a lab, see test/lab.
func InLab() bool { return os.Getenv("DORMOUSE_LAB") == "1" }
