package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// bodyLimit is how long a client may take to send a JSON body.
const bodyLimit = 30 * time.Second

var errMediaType = errors.New("wrong content type")

// readBody reads a JSON body into v, strictly.
func readBody(w http.ResponseWriter, r *http.Request, v any) error {
	body, err := bodyOf(w, r)
	if err != nil {
		return err
	}
	return DecodeStrict(body, v)
}

// readOptional is readBody for a body that may be left out.
func readOptional(w http.ResponseWriter, r *http.Request, v any) error {
	body, err := bodyOf(w, r)
	if err != nil || len(body) == 0 {
		return err
	}
	return DecodeStrict(body, v)
}

// bodyOf reads a body that is to be JSON, within bounds.
func bodyOf(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if err := checkMediaType(r, "application/json"); err != nil {
		return nil, err
	}
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Now().Add(bodyLimit)) // not every connection can; the body is bounded anyway
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, api.MaxBodyBytes))
	var tooBig *http.MaxBytesError
	switch {
	case errors.As(err, &tooBig):
		return nil, sandbox.Errorf(sandbox.KindTooLarge, "the body is larger than %d bytes", api.MaxBodyBytes)
	case err != nil:
		return nil, sandbox.Errorf(sandbox.KindInvalid, "read body: %w", err)
	}
	_ = rc.SetReadDeadline(time.Time{}) // as above
	return body, nil
}

// checkMediaType lets a request without a content type pass: there is only one
// that it could have.
func checkMediaType(r *http.Request, want string) error {
	given := r.Header.Get("Content-Type")
	if given == "" {
		return nil
	}
	media, _, err := mime.ParseMediaType(given)
	if err != nil || media != want {
		return sandbox.WithKind(sandbox.KindInvalid,
			fmt.Errorf("%w: it is %q, must be %s", errMediaType, cut(given, 100), want))
	}
	return nil
}

// DecodeStrict decodes one JSON value and nothing else. Unknown fields, data
// behind the value and wrong types are errors that say what and where.
func DecodeStrict(body []byte, v any) error {
	if len(bytes.TrimSpace(body)) == 0 {
		return sandbox.Errorf(sandbox.KindInvalid, "the body is empty, it must be a JSON object")
	}
	if !utf8.Valid(body) {
		return sandbox.Errorf(sandbox.KindInvalid, "the body is not UTF-8")
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return jsonError(err, len(body))
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return sandbox.Errorf(sandbox.KindInvalid, "the body has data behind its JSON object, at byte %d", dec.InputOffset())
	}
	if bytes.Equal(bytes.TrimSpace(body), []byte("null")) {
		return sandbox.Errorf(sandbox.KindInvalid, "the body is null, it must be a JSON object")
	}
	return nil
}

func jsonError(err error, size int) error {
	var syntax *json.SyntaxError
	var typ *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		return sandbox.Errorf(sandbox.KindInvalid, "the body is not JSON: %v, at byte %d", syntax, syntax.Offset)
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return sandbox.Errorf(sandbox.KindInvalid, "the body is not JSON: it ends early, at byte %d", size)
	case errors.As(err, &typ):
		where := typ.Field
		if where == "" {
			where = "the body"
		}
		return sandbox.Errorf(sandbox.KindInvalid, "%s is a JSON %s, must be %s, at byte %d", where, cut(typ.Value, 60), jsonName(typ), typ.Offset)
	}
	if field, ok := strings.CutPrefix(err.Error(), "json: unknown field "); ok {
		return sandbox.Errorf(sandbox.KindInvalid, "unknown field %s", cut(field, 100))
	}
	return sandbox.Errorf(sandbox.KindInvalid, "the body is not understood: %s", cut(err.Error(), 200))
}

// jsonName is what JSON calls a Go type.
func jsonName(e *json.UnmarshalTypeError) string {
	switch kind := e.Type.Kind().String(); {
	case strings.HasPrefix(kind, "int"), strings.HasPrefix(kind, "uint"):
		return "a whole number within " + kind
	case strings.HasPrefix(kind, "float"):
		return "a number"
	case kind == "string":
		return "a string"
	case kind == "bool":
		return "true or false"
	case kind == "slice":
		return "an array"
	}
	return "an object"
}
