// Package dockerfile reads a Dockerfile and works out what its steps are: which
// command in which environment, which files to where, and the configuration that
// holds after each. It does none of it, and touches no file.
//
// The language is that of BuildKit's own parser. What a step cannot have here is
// an error with its line, not something that is left out: RUN with mounts, ADD
// from the network, ONBUILD.
package dockerfile
