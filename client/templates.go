package client

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"net/url"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// BuildTemplate builds a template and hands its log to news as it comes. Upload
// is read for the sources that are one; nil for an image in a registry. The build
// ends with the context. An error of the build is an *Error with its Step.
func (c *Client) BuildTemplate(ctx context.Context, req api.BuildTemplate, upload io.Reader, news func(api.BuildEvent)) (api.Template, error) {
	k := call{method: http.MethodPost, path: "/v1/templates"}
	if upload == nil {
		k.in = req
	} else {
		body, contentType, err := buildBody(req, upload)
		if err != nil {
			return api.Template{}, err
		}
		defer func() { _ = body.Close() }() // ends whoever writes it
		k.raw, k.contentType = body, contentType
	}
	resp, err := c.send(ctx, k)
	if err != nil {
		return api.Template{}, err
	}
	defer func() { _ = resp.Body.Close() }() // the end of the stream says what counts
	events := json.NewDecoder(resp.Body)
	for {
		var e api.BuildEvent
		if err := events.Decode(&e); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF // the last line says how it went
			}
			return api.Template{}, networkError(ctx, "read the log of the build", err)
		}
		switch {
		case e.Template != nil:
			return *e.Template, nil
		case e.Error != nil:
			failed := &Error{
				Kind: sandbox.KindInternal, Message: "the build has failed, and the server does not say why",
				RequestID: resp.Header.Get(api.HeaderRequestID),
			}
			failed.fill(*e.Error)
			return api.Template{}, failed
		case news != nil:
			news(e)
		}
	}
}

// buildBody writes the two parts of an upload while it is read.
func buildBody(req api.BuildTemplate, upload io.Reader) (io.ReadCloser, string, error) {
	text, err := json.Marshal(req)
	if err != nil {
		return nil, "", err
	}
	r, w := io.Pipe()
	parts := multipart.NewWriter(w)
	go func() {
		err := writePart(parts, "request", "application/json", func(p io.Writer) error { _, err := p.Write(text); return err })
		if err == nil {
			err = writePart(parts, "upload", "application/x-tar", func(p io.Writer) error { _, err := io.Copy(p, upload); return err })
		}
		if err == nil {
			err = parts.Close()
		}
		_ = w.CloseWithError(err) // never fails
	}()
	return r, parts.FormDataContentType(), nil
}

func writePart(parts *multipart.Writer, name, contentType string, write func(io.Writer) error) error {
	header := textproto.MIMEHeader{}
	header.Set("Content-Disposition", `form-data; name="`+name+`"; filename="`+name+`"`)
	header.Set("Content-Type", contentType)
	p, err := parts.CreatePart(header)
	if err != nil {
		return err
	}
	return write(p)
}

// Template describes one template.
func (c *Client) Template(ctx context.Context, name string) (api.Template, error) {
	var out api.Template
	path, err := templatePath(name)
	if err == nil {
		err = c.do(ctx, call{method: http.MethodGet, path: path}, &out)
	}
	return out, err
}

// TemplateLog is what the build of a template has told.
func (c *Client) TemplateLog(ctx context.Context, name string) (string, error) {
	path, err := templatePath(name)
	if err != nil {
		return "", err
	}
	resp, err := c.send(ctx, call{method: http.MethodGet, path: path + "/log"})
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }() // read to its end, or the error says more
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", networkError(ctx, "read the log of a template", err)
	}
	return string(text), nil
}

func templatePath(name string) (string, error) {
	return "/v1/templates/" + url.PathEscape(name), sandbox.SafeName("template", name)
}

// DeleteTemplate removes a template that no sandbox lies on.
func (c *Client) DeleteTemplate(ctx context.Context, name string) error {
	path, err := templatePath(name)
	if err != nil {
		return err
	}
	return c.do(ctx, call{method: http.MethodDelete, path: path}, nil)
}
