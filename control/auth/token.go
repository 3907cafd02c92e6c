package auth

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"strconv"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Purpose is what a token is good for.
type Purpose string

// A token for ports opens the ports of one sandbox, from a header or a cookie.
// One for a link is in a URL, which browsers and proxies write down: it is good
// for little time, and only to get the other.
const (
	ForPorts Purpose = "ports"
	ForLink  Purpose = "link"
)

// Token is what a key lets somebody do with one sandbox. It is kept nowhere: it
// is signed with the hash of the key's secret, which nobody but the database
// has, so it ends with the key.
type Token struct {
	Purpose Purpose
	Sandbox sandbox.ID
	Expires time.Time
	// Until is when the token expires that is made from a link; otherwise Expires.
	Until time.Time
}

const macBytes = 20

// Sign writes a token down.
func Sign(key store.Key, t Token) string {
	text := strings.Join([]string{
		string(t.Purpose), string(t.Sandbox), key.ID,
		strconv.FormatInt(t.Expires.Unix(), 10), strconv.FormatInt(t.Until.Unix(), 10),
	}, ".")
	return api.TokenPrefix + text + "." + mac(key, text)
}

func mac(key store.Key, text string) string {
	h := hmac.New(sha256.New, key.Hash)
	_, _ = h.Write([]byte("dormouse-port-token-v1\n" + text)) // a hash never fails
	return encoding.EncodeToString(h.Sum(nil)[:macBytes])
}

// ErrToken is for those who bring neither a key nor a token that opens a port.
var ErrToken = sandbox.Errorf(sandbox.KindUnauthorized,
	"this needs an API key, or a token of this sandbox in %s: POST /v1/sandboxes/{id}/ports makes one, and a link for a browser", api.HeaderToken)

// CheckToken finds what a token is and whose. It must be for this sandbox and this
// purpose.
func (k *Keys) CheckToken(ctx context.Context, secret string, id sandbox.ID, purpose Purpose) (Token, store.Key, error) {
	const most, fields = 256, 6
	text, ours := strings.CutPrefix(secret, api.TokenPrefix)
	part := strings.Split(text, ".")
	if !ours || len(secret) > most || len(part) != fields || part[0] != string(purpose) || part[1] != string(id) {
		return Token{}, store.Key{}, ErrToken
	}
	t := Token{Purpose: purpose, Sandbox: id, Expires: unix(part[3]), Until: unix(part[4])}
	if !k.now().Before(t.Expires) {
		return Token{}, store.Key{}, ErrToken
	}
	key, err := k.db.Key(ctx, part[2])
	if sandbox.Is(err, sandbox.KindNotFound) {
		return Token{}, store.Key{}, ErrToken
	}
	if err != nil {
		return Token{}, store.Key{}, err
	}
	signed, given, _ := cutLast(text)
	if !hmac.Equal([]byte(mac(key, signed)), []byte(given)) {
		return Token{}, store.Key{}, ErrToken
	}
	k.touch(ctx, key)
	return t, key, nil
}

func cutLast(text string) (before, after string, found bool) {
	i := strings.LastIndexByte(text, '.')
	if i < 0 {
		return text, "", false
	}
	return text[:i], text[i+1:], true
}

// unix reads a time; what is none has passed long ago.
func unix(text string) time.Time {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return time.Time{}
	}
	return time.Unix(n, 0)
}
