package main

import (
	"bytes"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const diskBlocks = 1024

// writeDisk is remember on the disk: past the caches, so that what is read is what
// is there.
func writeDisk() {
	loadModules()
	disk, err := openDisk()
	if err != nil {
		say("DISK-WRONG %v", err)
		return
	}
	block, err := unix.Mmap(-1, 0, pageBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS) // aligned
	if err != nil {
		say("DISK-WRONG %v", err)
		return
	}
	written := make([]int, diskBlocks)
	for generation := 1; ; generation++ {
		for i := range written {
			if generation > 1 && (i*5+generation)%8 != 0 {
				continue
			}
			fill(block, 0, generation<<10|i)
			written[i] = generation
			if _, err := disk.WriteAt(block, int64(i)*pageBytes); err != nil {
				say("DISK-WRONG write %d: %v", i, err)
				return
			}
		}
		if err := check(disk, block, written); err != nil {
			say("DISK-WRONG %v", err)
			return
		}
		say("DISK-RIGHT %d", generation)
		time.Sleep(5 * time.Millisecond)
	}
}

func openDisk() (*os.File, error) {
	var err error
	for range 500 {
		fd := -1
		if fd, err = unix.Open("/dev/vda", unix.O_RDWR|unix.O_DIRECT, 0); err == nil {
			return os.NewFile(uintptr(fd), "/dev/vda"), nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return nil, err
}

func check(disk *os.File, block []byte, written []int) error {
	want := make([]byte, pageBytes)
	for i, generation := range written {
		if _, err := disk.ReadAt(block, int64(i)*pageBytes); err != nil {
			return fmt.Errorf("read %d: %w", i, err)
		}
		fill(want, 0, generation<<10|i)
		if !bytes.Equal(block, want) {
			return fmt.Errorf("block %d of generation %d is not what was written", i, generation)
		}
	}
	return nil
}
