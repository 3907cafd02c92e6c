package auth_test

import (
	"bytes"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/control/auth"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func TestKeys(t *testing.T) {
	ctx := t.Context()
	path := filepath.Join(t.TempDir(), "db")
	db, err := store.OpenSQLite(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Unix(1_800_000_000, 0)
	keys := auth.New(db, func() time.Time { return now })
	k, secret, err := keys.CreateKey(ctx, "laptop")
	if err != nil || len(secret) != 3+32 || !strings.HasPrefix(secret, k.Prefix) {
		t.Fatalf("%+v, %d characters, %v", k, len(secret), err)
	}
	if got, err := keys.Check(ctx, secret); err != nil || got.ID != k.ID {
		t.Errorf("check: %+v, %v", got, err)
	}
	for _, bad := range []string{"", "dm_", secret + "x", secret[:len(secret)-1], strings.ToUpper(secret), secret[3:], strings.Repeat("dm_", 1000)} {
		if _, err := keys.Check(ctx, bad); !sandbox.Is(err, sandbox.KindUnauthorized) {
			t.Errorf("%d characters passed or failed otherwise: %v", len(bad), err)
		}
	}
	now = now.Add(30 * time.Second)
	if _, err := keys.Check(ctx, secret); err != nil {
		t.Fatal(err)
	}
	list, err := keys.Keys(ctx)
	if err != nil || !list[0].LastUsedAt.Equal(now.Add(-30*time.Second)) {
		t.Errorf("last use is %v, want it coarse: %v", list[0].LastUsedAt, err)
	}
	second, err := keys.EnsureKey(ctx, "laptop")
	if err != nil || second == secret {
		t.Fatal(err)
	}
	if _, err := keys.Check(ctx, secret); !sandbox.Is(err, sandbox.KindUnauthorized) {
		t.Errorf("the replaced key: %v", err)
	}
	asking, err := keys.Check(ctx, second)
	if err != nil {
		t.Fatal(err)
	}
	if err := keys.DeleteKey(ctx, asking, asking.ID); !sandbox.Is(err, sandbox.KindConflict) {
		t.Errorf("a key deleted itself: %v", err)
	}
	for _, name := range []string{"", "a/b", "..", strings.Repeat("x", 65)} {
		if _, _, err := keys.CreateKey(ctx, name); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("name %q: %v", name, err)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil || bytes.Contains(b, []byte(second[8:])) {
		t.Errorf("the secret is in the database: %v", err)
	}
}

func TestFromRequest(t *testing.T) {
	for _, tt := range []struct {
		header, value, want string
		given               bool
	}{
		{"Authorization", "Bearer dm_x", "dm_x", true},
		{"Authorization", "bearer  dm_x ", "dm_x", true},
		{"Authorization", "Basic dm_x", "", true},
		{"X-API-Key", "dm_x", "dm_x", true},
		{"X-Other", "dm_x", "", false},
	} {
		r := &http.Request{Header: http.Header{}}
		r.Header.Set(tt.header, tt.value)
		if got, given := auth.FromRequest(r); got != tt.want || given != tt.given {
			t.Errorf("%s: %s gives %q, %v", tt.header, tt.value, got, given)
		}
	}
}

// FuzzFromRequest: a header that is there and not understood is a wrong key, not
// none; what is understood is what was sent.
func FuzzFromRequest(f *testing.F) {
	f.Add("Bearer dmk_1", "")
	f.Add("bearer", "x")
	f.Add("Basic eDp5", "dmk_2")
	f.Add("", "dmk_3")
	f.Fuzz(func(t *testing.T, authorization, key string) {
		r := &http.Request{Header: http.Header{}}
		r.Header.Set("Authorization", authorization)
		r.Header.Set(auth.HeaderKey, key)
		secret, given := auth.FromRequest(r)
		if given != (authorization != "" || key != "") {
			t.Errorf("%q, %q: given %v", authorization, key, given)
		}
		if secret != "" && !strings.Contains(authorization, secret) && secret != key {
			t.Errorf("%q, %q: secret %q", authorization, key, secret)
		}
	})
}
