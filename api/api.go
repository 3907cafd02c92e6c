// Package api is the public HTTP contract: paths, bodies, bounds, and how an
// error's Kind becomes a status. Servers and clients are built on it; it does
// no I/O itself.
package api

import (
	"net/http"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Bounds of the HTTP interface.
const (
	MaxBodyBytes      = 1 << 20   // of a JSON body
	MaxExecOutput     = 4 << 20   // of stdout and of stderr in an ExecResult
	MaxExecArgs       = 4096      // elements of a command
	MaxExecBytes      = 128 << 10 // of one argument, the kernel's own bound
	MaxPathBytes      = 4096
	MaxListDepth      = 64
	MaxStreamMessage  = 1 << 20 // one WebSocket message
	DefaultPageSize   = 100
	MaxPageSize       = 1000
	MaxIdempotencyKey = 128
	MaxUserName       = 32
	MaxPort           = 65535
)

// Header names.
const (
	HeaderIdempotencyKey = "Idempotency-Key"
	HeaderNextOffset     = "Dormouse-Next-Offset" // of GET …/logs: where to read on
	HeaderRequestID      = "X-Request-Id"
	HeaderToken          = "X-Dormouse-Token" // of a port; instead of an API key
)

// CookieToken has the token of a port that is visited by its host name, and
// ParamLink is the parameter of a link that is exchanged for it.
const (
	CookieToken = "dormouse_token"
	ParamLink   = "dormouse_link"
)

// KeyPrefix begins every API key, so that scanners of leaked secrets find them.
const KeyPrefix = "dm_"

// TokenPrefix begins every token of a sandbox's ports.
const TokenPrefix = "dmt_"

// Error is the body of every error answer.
type Error struct {
	Error ErrorDetail `json:"error"`
}

// ErrorDetail says what went wrong. Code is a sandbox.Kind.
type ErrorDetail struct {
	Code      string `json:"code"`
	Message   string `json:"message"`
	SandboxID string `json:"sandbox_id,omitempty"` // of a create that failed: its cause can be read there
	Step      string `json:"step,omitempty"`       // of a build that failed: where
}

var statuses = map[sandbox.Kind]int{
	sandbox.KindInvalid:      http.StatusBadRequest,
	sandbox.KindUnauthorized: http.StatusUnauthorized,
	sandbox.KindNotFound:     http.StatusNotFound,
	sandbox.KindExists:       http.StatusConflict,
	sandbox.KindConflict:     http.StatusConflict,
	sandbox.KindPaused:       http.StatusConflict,
	sandbox.KindBusy:         http.StatusTooManyRequests,
	sandbox.KindTooLarge:     http.StatusRequestEntityTooLarge,
	sandbox.KindNoSpace:      http.StatusInsufficientStorage,
	sandbox.KindTimeout:      http.StatusGatewayTimeout,
	sandbox.KindUnsupported:  http.StatusNotImplemented,
	sandbox.KindTransient:    http.StatusServiceUnavailable,
	sandbox.KindUnanswered:   http.StatusBadGateway,
	sandbox.KindInternal:     http.StatusInternalServerError,
}

// Status is the HTTP status of a kind.
func Status(kind sandbox.Kind) int {
	if s, ok := statuses[kind]; ok {
		return s
	}
	return http.StatusInternalServerError
}
