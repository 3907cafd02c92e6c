package qcow

import "testing"

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
