// Package identity holds who this sandbox is: its token, its variables, its
// default user and directory. The host sets it after every start and every
// restore; processes and files read it on each request. It lives in memory only.
package identity

import (
	"crypto/subtle"
	"errors"
	"maps"
	"sync"

	"github.com/dormouse-sandbox/dormouse/guest/account"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
)

// ErrToken says that a request without the host's signature wanted to replace a
// token.
var ErrToken = errors.New("another access token is set already")

// Identity is one state of it. Its map is never changed in place.
type Identity struct {
	SandboxID string
	Token     string
	User      string // the default user's name
	Workdir   string // the default working directory; empty means the user's home
	Env       map[string]string
}

// Current is the identity of now. The zero value has none.
type Current struct {
	Accounts account.Dir

	mu  sync.Mutex
	now Identity
}

// New starts with what holds before the host has said anything.
func New(accounts account.Dir, user, workdir string) *Current {
	return &Current{Accounts: accounts, now: Identity{User: user, Workdir: workdir}}
}

// BootedAs sets the sandbox that the machine was booted for, which the host names
// in the first thing that it signs.
func (c *Current) BootedAs(sandboxID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now.SandboxID = sandboxID
}

// Get returns the identity of this moment.
func (c *Current) Get() Identity {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

// Apply takes over what is present in init. Only a signed request may replace a
// token, or set the sandbox's ID.
func (c *Current) Apply(init guestapi.Init, signed bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !signed && c.now.Token != "" && !sameToken(c.now.Token, init.AccessToken) {
		return ErrToken
	}
	next := c.now
	if init.AccessToken != "" {
		next.Token = init.AccessToken
	}
	if init.EnvVars != nil {
		next.Env = maps.Clone(init.EnvVars)
	}
	if init.DefaultUser != "" {
		next.User = init.DefaultUser
	}
	if init.DefaultWorkdir != "" {
		next.Workdir = init.DefaultWorkdir
	}
	if signed && init.SandboxID != "" {
		next.SandboxID = init.SandboxID
	}
	c.now = next
	return nil
}

// Allows reports whether token is the sandbox's. Without a token everything is
// allowed: the caller decides what that means.
func (c *Current) Allows(token string) bool {
	want := c.Get().Token
	return want == "" || sameToken(want, token)
}

// Account finds the named user, or the default one for an empty name.
func (c *Current) Account(name string) (account.User, error) {
	if name == "" {
		name = c.Get().User
	}
	return c.Accounts.User(name)
}

func sameToken(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }
