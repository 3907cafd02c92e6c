package dm

import (
	"crypto/sha256"
	"io"
	"os"
)

func (r *rig) hashFile(path string) digest {
	r.t.Helper()
	f, err := os.Open(path)
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // read only
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		r.t.Fatal(err)
	}
	return digest(sum.Sum(nil))
}
