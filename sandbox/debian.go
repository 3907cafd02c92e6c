package sandbox

import "regexp"

// MaxPackages bounds the list of Debian packages that a template is built from.
const MaxPackages = 500

var (
	suitePattern   = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)
	packagePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9.+-]{0,126}[a-z0-9.+]$`) // apt removes what ends with a "-"
)

// CheckSuite checks the name of a Debian suite, such as "bookworm".
func CheckSuite(s string) error {
	if !suitePattern.MatchString(s) {
		return Errorf(KindInvalid, "suite %s must match %s", quote(s), suitePattern)
	}
	return nil
}

// CheckPackages checks names of Debian packages. Nothing that passes is an option,
// a path, or a request to remove something.
func CheckPackages(names []string) error {
	for _, s := range names {
		if !packagePattern.MatchString(s) {
			return Errorf(KindInvalid, "package %s must match %s", quote(s), packagePattern)
		}
	}
	return nil
}
