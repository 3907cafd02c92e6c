// Package up shows the commands with which a person starts with Dormouse, one
// after the other and with nothing but the two programs: up, its proof, doctor,
// run, down. It holds nothing but tests; in a lab they run on KVM, elsewhere on
// whatever up finds.
package up
