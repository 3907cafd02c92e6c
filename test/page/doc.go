// Package page has the tests of the page at /test in a real browser: over a server
// whose host is made up, and, where a test may take minutes, over one with real VMs.
package page
