// Package e2e shows from outside, through package client and the command line,
// that the whole system does its main job: real server, real VMs, real
// networks. It holds nothing but tests.
package e2e
