package qcow

import (
	"encoding/binary"
	"testing"
)

// FuzzParseHeader: any bytes give a header or an error, never a panic.
func FuzzParseHeader(f *testing.F) {
	valid := make([]byte, headerV3+16)
	copy(valid, "QFI\xfb\x00\x00\x00\x03")
	valid[103] = headerV3
	f.Add(valid)
	f.Add(valid[:headerV3])
	f.Add([]byte("QFI"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if h, err := parseHeader(data); err != nil && h != (header{}) {
			t.Errorf("a header %v came with the error %v", h, err)
		}
	})
}

// TestHeaderCutShort: less than the whole of a header is an error, never another
// backing file.
func TestHeaderCutShort(t *testing.T) {
	const name, format = "/images/base.ext4", "raw"
	whole := make([]byte, headerV3, 2*headerV3)
	copy(whole, "QFI\xfb\x00\x00\x00\x03")
	binary.BigEndian.PutUint64(whole[24:], 1<<20)
	binary.BigEndian.PutUint32(whole[100:], headerV3)
	whole = binary.BigEndian.AppendUint32(whole, extBackingType)
	whole = binary.BigEndian.AppendUint32(whole, uint32(len(format)))
	whole = append(whole, format+"\x00\x00\x00\x00\x00"...) // padded to 8 bytes
	whole = append(whole, make([]byte, 8)...)               // the end of the extensions
	binary.BigEndian.PutUint64(whole[8:], uint64(len(whole)))
	binary.BigEndian.PutUint32(whole[16:], uint32(len(name)))
	whole = append(whole, name...)
	if h, err := parseHeader(whole); err != nil || h != (header{name, format, 1 << 20}) {
		t.Fatalf("%v, %v", h, err)
	}
	for n := range whole {
		if h, err := parseHeader(whole[:n]); err == nil {
			t.Fatalf("cut at %d: %v", n, h)
		}
	}
}

func TestOldToolsGetSmallClusters(t *testing.T) {
	for version, want := range map[string]string{
		"qemu-img version 4.2.1 (Debian)":  "cluster_size=4k",
		"qemu-img version 5.1.0":           "cluster_size=4k",
		"qemu-img version 5.2.0":           "cluster_size=128k,extended_l2=on",
		"qemu-img version 7.2.22 (Debian)": "cluster_size=128k,extended_l2=on",
		"qemu-img version 10.0.2":          "cluster_size=128k,extended_l2=on",
		"something else":                   "cluster_size=4k",
	} {
		if got := optionsFor([]byte(version)); got != want {
			t.Errorf("%s: %s, want %s", version, got, want)
		}
	}
}
