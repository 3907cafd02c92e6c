package main

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// asUser runs fn with the file rights of a user, where we are root and the user
// is not. What lies in a home is the user's to arrange: a link in the place of a
// folder would otherwise lead root's pen to any file of the machine.
//
// The rights are a property of the thread (setfsuid(2)), which is not used
// again: its goroutine ends locked to it. fn must not start another one.
func asUser(uid, gid int, fn func() error) error {
	if os.Geteuid() != 0 || uid <= 0 {
		return fn()
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked
		done <- func() error {
			// Raw calls change this thread alone; package syscall's would change all.
			if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); errno != 0 {
				return fmt.Errorf("drop groups: %w", errno)
			}
			if err := setFSID(unix.SYS_SETFSGID, gid); err != nil {
				return err
			}
			if err := setFSID(unix.SYS_SETFSUID, uid); err != nil {
				return err
			}
			return fn()
		}()
	}()
	return <-done
}

// setFSID changes an ID and asks for it: these calls tell no error, and return
// the value before.
func setFSID(call uintptr, id int) error {
	for range 2 { // the first call changes it, the second sees it
		if now, _, _ := unix.RawSyscall(call, uintptr(id), 0, 0); int(now) == id {
			return nil
		}
	}
	return fmt.Errorf("act as user %d: the kernel refuses", id)
}
