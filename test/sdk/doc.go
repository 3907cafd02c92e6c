// Package sdk runs the public SDKs of the in-sandbox protocol against our guest
// agent, in their debug mode, which talks to port 49983 of this machine: as a plain
// process, and inside a VM, through the proxy to a sandbox's ports. It has
// tests only: they install the SDKs into temporary folders with npm and pip, and are
// skipped where these, or their registries, are missing.
package sdk
