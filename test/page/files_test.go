package page_test

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/browser"
	"github.com/chromedp/chromedp"

	"github.com/dormouse-sandbox/dormouse/control/hostfake"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// downloadsTo lets the browser keep what the page hands it.
func (w *window) downloadsTo(dir string) {
	w.t.Helper()
	w.run(chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := chromedp.CallBrowser(ctx, browser.SetDownloadBehavior, browser.SetDownloadBehaviorParams{
			Behavior: browser.SetDownloadBehaviorBehaviorAllow, DownloadPath: dir, BrowserContextID: chromedp.FromContext(ctx).BrowserContextID,
		})
		return err
	}))
}

// upload chooses files as the browser's dialog would.
func (w *window) upload(paths ...string) {
	w.t.Helper()
	w.run(chromedp.SetUploadFiles(chromedp.CSS(view+"input[type=file]"), paths, chromedp.NodeReady))
}

// wantsFile waits for a downloaded file.
func (w *window) wantsFile(path string) []byte {
	w.t.Helper()
	var data []byte
	testkit.Eventually(w.t, w.limit, "downloaded "+path, func() (there bool) {
		var err error
		data, err = os.ReadFile(path)
		return err == nil
	})
	return data
}

// TestFiles: browse, download, upload, with their progress and their errors.
func TestFiles(t *testing.T) {
	f := newFake(t, nil)
	w := newWindow(t, f.url, f.key)
	dir := t.TempDir()
	w.downloadsTo(dir)
	w.enter()
	id := w.create()
	for path, text := range map[string]string{"/work/notes.txt": "remember", "/work/src/main.go": "package main"} {
		if _, err := f.c.WriteFile(f.ctx(), id, path, "", strings.NewReader(text)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.c.MakeDir(f.ctx(), id, "/work/src", ""); err != nil {
		t.Fatal(err)
	}
	w.tab("files")
	panel := view + ".panel:not([hidden]) "
	w.wantsJS(`document.querySelector(".view .panel:not([hidden]) form input").value === "/"`)
	w.fill(panel+"form input", "/work")
	w.press("\r")
	w.wants(panel+".files", "notes.txt")
	w.wants(panel+".files", "8 B")
	w.wants(panel+"[role=status]", "3 entries")

	w.click(panel + ".files li:last-child button:last-child")
	if got := w.wantsFile(filepath.Join(dir, "notes.txt")); string(got) != "remember" {
		t.Errorf("downloaded %q", got)
	}
	w.wants(panel+"[role=status]", "notes.txt is downloaded, 8 B.")

	big := filepath.Join(t.TempDir(), "big file.bin")
	data, err := io.ReadAll(hostfake.Pattern(700_000))
	if err == nil {
		err = os.WriteFile(big, data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	w.upload(big)
	w.wants(panel+".files", "big file.bin")
	w.wants("#activity .log", "upload to "+id[:8])
	there, _, err := f.c.ReadFile(f.ctx(), id, "/work/big file.bin", "")
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(there)
	if err != nil || there.Close() != nil || !bytes.Equal(got, data) {
		t.Errorf("uploaded are %d bytes of %d, %v", len(got), len(data), err)
	}

	w.click(panel + ".files button.directory:not(:first-child), " + panel + ".files li:nth-child(2) button.directory")
	w.wantsJS(`document.querySelector(".view .panel:not([hidden]) form input").value === "/work/src"`)
	w.wants(panel+".files", "main.go")
	w.wantsJS(`document.activeElement?.closest(".files") !== null`)
	w.click(panel + ".files li:first-child button")
	w.wants(panel+".files", "notes.txt")

	f.slowly(300*time.Millisecond, "ReadFile.data")
	w.click(panel + ".files li:nth-child(3) button:last-child")
	w.wants(panel+".under-way", "of 684 KiB")
	w.click(panel + ".under-way button")
	w.wants(panel+".message", "download big file.bin: Stopped.")
	f.slowly(0)
	w.fill(panel+"form input", strings.Repeat("x", 5000))
	w.press("\r")
	w.wants(panel+".message", "at most 4096 are allowed")
	w.act("pause")
	w.wants(view+".head .badge", "paused")
}
