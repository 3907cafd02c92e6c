package qemu

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/cavaliergopher/cpio"
)

// probeMarker is what the probe's guest prints when it has reached its first
// process.
const probeMarker = "dormouse-probe: first process runs"

// probeInitramfs is an archive with one file: an /init that prints probeMarker
// and powers the machine off. It goes to /dev/console, which the kernel's
// built-in archive provides.
func probeInitramfs() ([]byte, error) {
	var out bytes.Buffer
	w := cpio.NewWriter(&out)
	program := probeProgram("\n" + probeMarker + "\n")
	if err := w.WriteHeader(&cpio.Header{Name: "init", Mode: cpio.TypeReg | 0o755, Size: int64(len(program))}); err != nil {
		return nil, fmt.Errorf("pack probe: %w", err)
	}
	if _, err := w.Write(program); err != nil {
		return nil, fmt.Errorf("pack probe: %w", err)
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("pack probe: %w", err)
	}
	return out.Bytes(), nil
}

// Sizes of an ELF file header and of one program header, and where the probe is
// loaded.
const (
	elfHeader  = 64
	progHeader = 56
	loadAt     = 0x400000
)

// probeProgram is a static x86-64 ELF file of one segment: headers, code, text.
func probeProgram(text string) []byte {
	code := probeCode(len(text))
	size := uint64(elfHeader + progHeader + len(code) + len(text))
	var b bytes.Buffer
	b.WriteString("\x7fELF\x02\x01\x01") // 64 bit, little endian, version 1
	b.Write(make([]byte, 9))
	put := func(values ...any) {
		for _, v := range values {
			_ = binary.Write(&b, binary.LittleEndian, v) // a Buffer does not fail
		}
	}
	put(uint16(2), uint16(62), uint32(1), // executable, x86-64, version
		uint64(loadAt+elfHeader+progHeader), uint64(elfHeader), uint64(0), // entry, program headers, no sections
		uint32(0), uint16(elfHeader), uint16(progHeader), uint16(1), uint16(0), uint16(0), uint16(0))
	put(uint32(1), uint32(5), uint64(0), // PT_LOAD, read and execute, from the start of the file
		uint64(loadAt), uint64(loadAt), size, size, uint64(0x1000))
	b.Write(code)
	b.WriteString(text)
	return b.Bytes()
}

// probeCode is write(1, text, length); reboot(POWER_OFF); for ever. The text
// follows the code.
func probeCode(length int) []byte {
	u32 := func(v int) []byte { return binary.LittleEndian.AppendUint32(nil, uint32(v)) }
	tail := bytes.Join([][]byte{
		{0xba}, u32(length), // mov edx, length
		{0x0f, 0x05},                   // syscall
		{0xb8, 0xa9, 0, 0, 0},          // mov eax, 169 (reboot)
		{0xbf, 0xad, 0xde, 0xe1, 0xfe}, // mov edi, LINUX_REBOOT_MAGIC1
		{0xbe, 0x69, 0x19, 0x12, 0x28}, // mov esi, LINUX_REBOOT_MAGIC2
		{0xba, 0xdc, 0xfe, 0x21, 0x43}, // mov edx, LINUX_REBOOT_CMD_POWER_OFF
		{0x0f, 0x05},                   // syscall
		{0xeb, 0xfe},                   // jmp to itself
	}, nil)
	return bytes.Join([][]byte{
		{0xb8, 1, 0, 0, 0},                 // mov eax, 1 (write)
		{0xbf, 1, 0, 0, 0},                 // mov edi, 1 (stdout)
		{0x48, 0x8d, 0x35}, u32(len(tail)), // lea rsi, [rip + to the text]
		tail,
	}, nil)
}
