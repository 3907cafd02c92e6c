package page_test

import "github.com/dormouse-sandbox/dormouse/test/rig"

// common is the server of the tests with real VMs.
var common = rig.NewShared(rig.Options{})
