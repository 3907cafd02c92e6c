// Package fault holds named failpoints: places where a test can make a step
// fail, stall, or kill the process.
//
// A point is armed from the environment variable DORMOUSE_FAULT (see Parse) or
// by a test through Set; DORMOUSE_FAULT_SEEN names a file for the names of all
// points that are passed. A release build, which has the build tag "release",
// contains none of it: Point is an empty function there.
package fault
