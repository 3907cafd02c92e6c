package page_test

import (
	"context"
	"flag"
	"os"
	"path/filepath"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/chromedp"
)

var shots = flag.String("shots", "", "where TestEverythingWithAVM leaves its pictures; empty: nowhere")

// look is how a page is looked at.
type look struct {
	name          string
	width, height int64
	dark          bool
}

var looks = []look{{"light", 1440, 900, false}, {"dark", 1440, 900, true}, {"phone", 390, 844, true}, {"phone-light", 390, 844, false}}

// as makes the browser show the page so.
func (w *window) as(l look) {
	w.t.Helper()
	scheme := "light"
	if l.dark {
		scheme = "dark"
	}
	w.run(chromedp.EmulateViewport(l.width, l.height), chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}})
		return err
	}))
}

// shoot takes a picture of the window, or of the whole page.
func (w *window) shoot(name string, whole bool) {
	w.t.Helper()
	if *shots == "" {
		return
	}
	ctx, cancel := context.WithTimeout(w.ctx, limit)
	defer cancel()
	quality := int64(90)
	data, err := chromedp.Run(ctx, func(ctx context.Context, t *chromedp.Target) ([]byte, error) {
		r, err := cdp.Call(ctx, t, page.CaptureScreenshot, page.CaptureScreenshotParams{Format: page.CaptureScreenshotFormatWebp, Quality: &quality, CaptureBeyondViewport: &whole})
		if err != nil {
			return nil, err
		}
		return r.Data, nil
	})
	if err == nil {
		err = os.WriteFile(filepath.Join(*shots, name+".webp"), data, 0o644)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}
