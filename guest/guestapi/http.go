package guestapi

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strconv"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/tree"
)

// Operations of a FileSignature. A signature for a file is none for a tree that
// takes the file's place.
const (
	FileRead  = "read"
	FileWrite = "write"
	TreeRead  = "read-tree"
	TreeWrite = "write-tree"
)

// FileSignature is what a signature of /files covers. It stands for the token
// in a URL that is handed to somebody who must not have the token.
type FileSignature struct {
	Path      string // as in the query, not resolved
	Operation string
	User      string // empty when the query names none
	Expires   *int64 // Unix seconds, or nil
}

// Sign makes the signature with the sandbox's token.
func (f FileSignature) Sign(token string) string {
	text := f.Path + ":" + f.Operation + ":" + f.User + ":" + token
	if f.Expires != nil {
		text += ":" + strconv.FormatInt(*f.Expires, 10)
	}
	sum := sha256.Sum256([]byte(text))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// Valid reports whether signature was made with token. It does not look at the
// clock.
func (f FileSignature) Valid(token, signature string) bool {
	return subtle.ConstantTimeCompare([]byte(f.Sign(token)), []byte(signature)) == 1
}

// keepaliveDefault is how often an idle stream says that it lives, unless its
// client wants it otherwise.
const keepaliveDefault = 90 * time.Second

// Keepalive is how often an idle stream says that it lives, from the header of its
// request.
func Keepalive(header http.Header) time.Duration {
	seconds, err := strconv.ParseUint(header.Get(HeaderKeepalive), 10, 31)
	if err != nil || seconds == 0 {
		return keepaliveDefault
	}
	return time.Duration(seconds) * time.Second
}

// Tree answers POST /files/tree: what was unpacked, and where.
type Tree struct {
	Path string `json:"path"`
	tree.Report
}

// WriteError answers an HTTP request with an Error.
func WriteError(w http.ResponseWriter, status int, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(Error{Code: status, Message: message}) // the caller is gone
}
