// Package fault holds named failpoints: places where a test can make a step
// fail, stall, or kill the process.
//
// A point is armed from the environment variable DORMOUSE_FAULT (see Parse) or
// by a test through Set. A release build, which has the build tag "release",
// contains none of it: Point is an empty function there.
package fault
