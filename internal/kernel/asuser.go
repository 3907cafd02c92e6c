package kernel

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// AsUser runs fn with the file rights of a user and the groups, where we are root
// and the user is not. What lies in a user's folders is the user's to arrange: a
// link in the place of a folder would otherwise lead root's pen to any file.
//
// The rights are a property of the thread (setfsuid(2)), which is not used
// again: its goroutine ends locked to it. fn must not start another one. To
// signals and debuggers the thread still is root's. A panic of fn is the caller's.
func AsUser(uid, gid int, groups []uint32, fn func() error) error {
	if os.Geteuid() != 0 || uid <= 0 {
		return fn()
	}
	var panicked any
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked
		defer close(done)
		defer func() { panicked = recover() }()
		if err := become(uid, gid, groups); err != nil {
			done <- err
			return
		}
		done <- fn()
	}()
	err := <-done
	if _, open := <-done; !open && panicked != nil {
		panic(panicked)
	}
	return err
}

// become makes raw calls, which change this thread alone; those of package syscall
// would change all.
func become(uid, gid int, groups []uint32) error {
	var first unsafe.Pointer
	if len(groups) > 0 {
		first = unsafe.Pointer(&groups[0])
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(first), 0); errno != 0 {
		return fmt.Errorf("take the groups of user %d: %w", uid, errno)
	}
	if err := setFSID(unix.SYS_SETFSGID, gid); err != nil {
		return err
	}
	if err := setFSID(unix.SYS_SETFSUID, uid); err != nil {
		return err
	}
	// The change of the user took the capabilities over files. The others go too:
	// with CAP_SYS_RESOURCE it would write into the blocks that are kept for root.
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	return nil
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
