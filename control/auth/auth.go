// Package auth makes and checks API keys, and tokens for the ports of sandboxes.
//
// It promises that a secret has 160 random bits, is returned once and never
// stored, logged or put into an error: the database has its SHA-256, which is
// enough for a secret that nobody can guess. What a key may do is not its
// concern; every key may do everything.
package auth

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"net/http"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// HeaderKey is the header for clients that cannot set Authorization.
const HeaderKey = "X-API-Key"

// MaxKeys bounds how many keys there may be at once.
const MaxKeys = 1000

const (
	secretBytes = 20
	idBytes     = 10
	prefixLen   = len(api.KeyPrefix) + 4
	// touchEvery is how coarse LastUsedAt is: a write per request would make
	// every read wait for the disk.
	touchEvery = time.Minute
)

var encoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// Keys are the API keys in a database.
type Keys struct {
	db  *store.DB
	now func() time.Time
}

// New returns the keys of a database. A nil clock means time.Now.
func New(db *store.DB, now func() time.Time) *Keys {
	if now == nil {
		now = time.Now
	}
	return &Keys{db: db, now: now}
}

// CreateKey makes a key and returns its secret, which nobody can read again.
func (k *Keys) CreateKey(ctx context.Context, name string) (key store.Key, secret string, err error) {
	if err := sandbox.SafeName("key", name); err != nil {
		return store.Key{}, "", err
	}
	have, err := k.db.Keys(ctx)
	if err != nil {
		return store.Key{}, "", err
	}
	if len(have) >= MaxKeys {
		return store.Key{}, "", sandbox.Errorf(sandbox.KindBusy, "there are %d API keys, at most %d are allowed", len(have), MaxKeys)
	}
	key, secret = k.newKey(name)
	return key, secret, k.db.AddKey(ctx, key)
}

// EnsureKey makes a key for whoever may write the database, in place of an
// earlier one of the same name: that one's secret cannot be read again.
func (k *Keys) EnsureKey(ctx context.Context, name string) (secret string, err error) {
	if err := sandbox.SafeName("key", name); err != nil {
		return "", err
	}
	key, secret := k.newKey(name)
	if err := k.db.ReplaceKey(ctx, key); err != nil {
		return "", err
	}
	return secret, nil
}

func (k *Keys) newKey(name string) (store.Key, string) {
	secret := api.KeyPrefix + random(secretBytes)
	return store.Key{
		ID: "k" + random(idBytes), Name: name, Prefix: secret[:prefixLen], Hash: hash(secret), CreatedAt: k.now(),
	}, secret
}

func random(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // crypto/rand never returns an error
	return encoding.EncodeToString(b)
}

func hash(secret string) []byte {
	sum := sha256.Sum256([]byte(secret))
	return sum[:]
}

var errUnauthorized = sandbox.Errorf(sandbox.KindUnauthorized,
	"this needs a valid API key, as \"Authorization: Bearer %s…\" or in %s", api.KeyPrefix, HeaderKey)

// Check finds the key that a secret belongs to, and notes its use.
func (k *Keys) Check(ctx context.Context, secret string) (store.Key, error) {
	const most = 256
	if !strings.HasPrefix(secret, api.KeyPrefix) || len(secret) > most {
		return store.Key{}, errUnauthorized
	}
	sum := hash(secret)
	key, err := k.db.KeyByHash(ctx, sum)
	if sandbox.Is(err, sandbox.KindNotFound) {
		return store.Key{}, errUnauthorized
	}
	if err != nil {
		return store.Key{}, err
	}
	if subtle.ConstantTimeCompare(sum, key.Hash) != 1 {
		return store.Key{}, errUnauthorized
	}
	k.touch(ctx, key)
	return key, nil
}

func (k *Keys) touch(ctx context.Context, key store.Key) {
	if now := k.now(); now.Sub(key.LastUsedAt) >= touchEvery {
		_ = k.db.TouchKey(ctx, key.ID, now) // a stale last use must not refuse a valid key
	}
}

// Keys lists the keys, oldest first.
func (k *Keys) Keys(ctx context.Context) ([]store.Key, error) { return k.db.Keys(ctx) }

// DeleteKey revokes a key at once. The one that asks cannot revoke itself, so
// that a server always has a key that works.
func (k *Keys) DeleteKey(ctx context.Context, asking store.Key, id string) error {
	if asking.ID == id {
		return sandbox.Errorf(sandbox.KindConflict, "an API key cannot delete itself; use another one")
	}
	return k.db.DeleteKey(ctx, id)
}

// FromRequest finds the secret in a request's headers. It says whether there
// was one at all.
func FromRequest(r *http.Request) (secret string, given bool) {
	if h := r.Header.Get("Authorization"); h != "" {
		scheme, rest, _ := strings.Cut(h, " ")
		if strings.EqualFold(scheme, "Bearer") {
			return strings.TrimSpace(rest), true
		}
		return "", true
	}
	if h := r.Header.Get(HeaderKey); h != "" {
		return h, true
	}
	return "", false
}
