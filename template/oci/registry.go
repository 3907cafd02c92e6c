package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Credentials are for one registry and one call. They are kept nowhere.
type Credentials struct {
	Username, Password string
	Token              string // a registry's bearer token, instead of the two
}

// Pull finds an image in a registry: "debian:12", "ghcr.io/a/b@sha256:…". Layers
// are fetched when it is unpacked; ctx is for finding it only.
func Pull(ctx context.Context, ref string, creds Credentials) (*Image, error) {
	image, err := pull(ctx, ref, creds)
	if err != nil {
		return nil, fmt.Errorf("image %.200s: %w", ref, err)
	}
	return image, nil
}

func pull(ctx context.Context, ref string, creds Credentials) (*Image, error) {
	parsed, err := name.ParseReference(ref)
	if err != nil {
		return nil, sandbox.WithKind(sandbox.KindInvalid, err)
	}
	r := registry{repository: parsed.Context(), roads: newRoads(), auth: authn.FromConfig(authn.AuthConfig{
		Username: creds.Username, Password: creds.Password, RegistryToken: creds.Token,
	})}
	image, err := r.find(ctx, parsed)
	if err != nil {
		r.roads.CloseIdleConnections()
		return nil, err
	}
	image.close = func() error { r.roads.CloseIdleConnections(); return nil }
	return image, nil
}

func (r registry) find(ctx context.Context, ref name.Reference) (*Image, error) {
	raw, err := r.get(ctx, ref)
	if err != nil {
		return nil, err
	}
	if digest, ok := ref.(name.Digest); ok && digest.DigestStr() != digestOf(raw) {
		return nil, invalid("its bytes have the digest %s", digestOf(raw))
	}
	return readImage(ctx, r, raw)
}

// RegistryOf is the name of the registry that a reference means: "index.docker.io"
// where it names none. For what is no reference it is empty.
func RegistryOf(ref string) string {
	parsed, err := name.ParseReference(ref)
	if err != nil {
		return ""
	}
	return parsed.Context().RegistryStr()
}

// registry is a source: one repository.
type registry struct {
	repository name.Repository
	auth       authn.Authenticator
	roads      *http.Transport
}

// responseLimit bounds the wait for the head of an answer. The body may take as
// long as the caller's context.
const responseLimit = 30 * time.Second

// newRoads is how a registry is reached: through the proxies of the environment,
// as with the other tools of a build, but never at a link-local address, where
// clouds keep the secrets of a machine.
func newRoads() *http.Transport {
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: responseLimit, Control: refuseLinkLocal}).DialContext,
		TLSHandshakeTimeout:   responseLimit,
		ResponseHeaderTimeout: responseLimit,
		IdleConnTimeout:       30 * time.Second,
		MaxIdleConnsPerHost:   2,
		ForceAttemptHTTP2:     true,
	}
}

func refuseLinkLocal(_, address string, _ syscall.RawConn) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	if ip := at.Addr().Unmap(); ip.IsLinkLocalUnicast() || ip.IsUnspecified() || ip.IsMulticast() {
		return invalid("%s is no address of a registry", ip)
	}
	return nil
}

func (r registry) options(ctx context.Context) []remote.Option {
	return []remote.Option{remote.WithContext(ctx), remote.WithAuth(r.auth), remote.WithTransport(r.roads), remote.WithUserAgent("dormouse")}
}

func (r registry) get(ctx context.Context, ref name.Reference) ([]byte, error) {
	d, err := remote.Get(ref, r.options(ctx)...)
	if err != nil {
		return nil, unavailable(ctx, err)
	}
	return d.Manifest, nil
}

func (r registry) manifest(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	return r.get(ctx, r.repository.Digest(d.Digest.String()))
}

func (r registry) blob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	l, err := remote.Layer(r.repository.Digest(d.Digest.String()), r.options(ctx)...)
	if err != nil {
		return nil, unavailable(ctx, err)
	}
	body, err := l.Compressed()
	if err != nil {
		return nil, unavailable(ctx, err)
	}
	return download{ctx, body}, nil
}

// download gives an interrupted transfer its kind.
type download struct {
	ctx context.Context
	io.ReadCloser
}

func (d download) Read(p []byte) (int, error) {
	n, err := d.ReadCloser.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = unavailable(d.ctx, err)
	}
	return n, err
}

// unavailable says whose fault it is that something could not be fetched.
func unavailable(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	kind := sandbox.KindTransient
	var e *transport.Error
	var own *sandbox.Error
	switch {
	case errors.As(err, &own):
		kind = own.Kind
	case !errors.As(err, &e):
	case e.StatusCode == http.StatusNotFound:
		kind = sandbox.KindNotFound
	case e.StatusCode == http.StatusUnauthorized, e.StatusCode == http.StatusForbidden: // not the API key: the request is wrong
		return sandbox.Errorf(sandbox.KindInvalid, "the registry does not let us: credentials are missing or wrong, or there is no such image: %w", err)
	case e.StatusCode/100 == 4 && e.StatusCode != http.StatusTooManyRequests:
		kind = sandbox.KindInvalid
	}
	return sandbox.WithKind(kind, err)
}
