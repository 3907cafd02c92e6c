package page_test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// One browser serves all tests; each has a window of its own, which shares nothing
// with the others.
var chromium struct {
	once   sync.Once
	ctx    context.Context
	cancel context.CancelFunc
	dir    string
	err    error
}

func openBrowser(t *testing.T) context.Context {
	t.Helper()
	testkit.Tool(t, "chromium")
	chromium.once.Do(func() {
		if chromium.dir, chromium.err = os.MkdirTemp("", "dormouse-page-"); chromium.err != nil {
			return
		}
		options := append(chromedp.DefaultExecAllocatorOptions[:],
			chromedp.ExecPath("chromium"), chromedp.NoSandbox, chromedp.UserDataDir(chromium.dir), chromedp.DisableGPU,
			chromedp.WSURLReadTimeout(testkit.Patience(time.Minute)),
			chromedp.Flag("host-resolver-rules", "MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE *.localhost"), chromedp.Flag("disable-component-update", true))
		allocator, stop := chromedp.NewExecAllocator(context.Background(), options...)
		ctx, cancel := chromedp.NewContext(allocator)
		chromium.ctx, chromium.cancel = ctx, func() { cancel(); stop() }
		chromium.err = chromedp.Do(ctx)
	})
	if chromium.err != nil {
		t.Fatal("chromium:", chromium.err)
	}
	return chromium.ctx
}

func closeBrowser() {
	if chromium.cancel != nil {
		chromium.cancel()
	}
	if chromium.dir != "" {
		_ = os.RemoveAll(chromium.dir) // it is temporary either way
	}
}

// window is one in which the page is open.
type window struct {
	t   *testing.T
	ctx context.Context
	url string
	key string
	// limit is how long anything may take that it waits for.
	limit time.Duration

	mu      sync.Mutex
	wrong   []string // what a page must not do: exceptions, violations of its policy
	foreign []string // requests to others, and addresses that have the key in them
	broken  []string // what did not load, and why
	said    []string // what the page wrote to the console
}

// newWindow opens the page and lets the test fail for what goes wrong in it.
func newWindow(t *testing.T, url, key string) *window {
	t.Helper()
	ctx, cancel := chromedp.NewContext(openBrowser(t), chromedp.WithNewBrowserContext())
	t.Cleanup(cancel)
	w := &window{t: t, ctx: ctx, url: url, key: key, limit: limit}
	if err := chromedp.Listen(ctx, w.listen); err != nil {
		t.Fatal(err)
	}
	w.run(enable, chromedp.EmulateViewport(1440, 900))
	w.open()
	t.Cleanup(w.check)
	return w
}

// open loads the page. Chromium breaks off what is under way when the machine gets
// or loses a network interface, which other tests see to; then it is loaded again.
func (w *window) open() {
	w.t.Helper()
	const drawn = `!document.querySelector("#door").hidden || !document.querySelector("#room").hidden`
	for range 5 {
		w.run(chromedp.Navigate(w.url + "/test"))
		if testkit.Poll(3*time.Second, func() bool { return js[bool](w, drawn) }) {
			return
		}
		w.mu.Lock()
		broken := w.broken
		w.mu.Unlock()
		if !strings.Contains(strings.Join(broken, " "), "ERR_NETWORK_CHANGED") {
			w.t.Fatalf("the page is not drawn; what did not load: %q", broken)
		}
	}
	w.t.Fatal("the network changes all the time")
}

// enable asks the browser to tell what listen listens for.
func enable(ctx context.Context, t *chromedp.Target) (none chromedp.Void, err error) {
	if _, err = cdp.Call(ctx, t, network.Enable, network.EnableParams{}); err == nil {
		_, err = cdp.Call(ctx, t, log.Enable, cdp.Empty{})
	}
	return none, err
}

func (w *window) listen(event any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch e := event.(type) {
	case *runtime.EventExceptionThrown:
		w.wrong = append(w.wrong, fmt.Sprint(e.ExceptionDetails.Text, exceptionOf(e)))
	case *runtime.EventConsoleAPICalled:
		w.said = append(w.said, fmt.Sprint(e.Type))
	case *log.EventEntryAdded:
		if e.Entry.Source != log.EntrySourceNetwork { // an answer of 400 is no mistake of the page
			w.wrong = append(w.wrong, fmt.Sprint(e.Entry.Source, " ", e.Entry.Text))
		}
	case *network.EventRequestWillBeSent:
		w.look(e.Request.URL)
	case *network.EventLoadingFailed:
		w.broken = append(w.broken, e.ErrorText)
	case *network.EventWebSocketCreated:
		w.look(strings.Replace(e.URL, "ws", "http", 1))
	}
}

func (w *window) look(url string) {
	if !strings.HasPrefix(url, w.url+"/") && !strings.HasPrefix(url, "blob:"+w.url+"/") || strings.Contains(url, w.key) {
		w.foreign = append(w.foreign, url)
	}
}

// check is what holds of every visit.
func (w *window) check() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, text := range w.wrong {
		w.t.Error("in the page:", text)
	}
	if len(w.foreign) > 0 {
		w.t.Errorf("asked for %q", w.foreign)
	}
	if len(w.said) > 0 {
		w.t.Errorf("the page writes to the console: %q", w.said)
	}
}

func (w *window) run(actions ...chromedp.Action[chromedp.Void]) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.ctx, testkit.Patience(w.limit))
	defer cancel()
	if err := chromedp.Do(ctx, actions...); err != nil {
		w.t.Fatalf("%v\n%s", err, w.text("body"))
	}
}

// js evaluates an expression, and waits for what it promises.
func js[T any](w *window, expression string) T {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.ctx, testkit.Patience(w.limit))
	defer cancel()
	out, err := chromedp.Run(ctx, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
	if err != nil {
		w.t.Fatalf("%s: %v", expression, err)
	}
	return out
}

// do evaluates statements.
func (w *window) do(statements string) {
	w.t.Helper()
	js[bool](w, "(() => {"+statements+"; return true})()")
}

// text is what of an element people see.
func (w *window) text(selector string) string {
	ctx, cancel := context.WithTimeout(w.ctx, testkit.Patience(5*time.Second))
	defer cancel()
	out, err := chromedp.Run(ctx, chromedp.Evaluate[string](fmt.Sprintf("document.querySelector(%q)?.innerText ?? ''", selector)))
	if err != nil {
		return err.Error()
	}
	return strings.ReplaceAll(out, "\u00a0", " ")
}

// wants waits until an element shows a text.
func (w *window) wants(selector, part string) {
	w.t.Helper()
	if !testkit.Poll(w.limit, func() bool { return strings.Contains(w.text(selector), part) }) {
		w.t.Fatalf("%s shows %q, not %q; the page:\n%s", selector, w.text(selector), part, w.text("body"))
	}
}

// wantsJS waits until an expression holds.
func (w *window) wantsJS(expression string) {
	w.t.Helper()
	if !testkit.Poll(w.limit, func() bool { return js[bool](w, "Boolean("+expression+")") }) {
		w.t.Fatalf("%s does not hold; the page:\n%s", expression, w.text("body"))
	}
}

func (w *window) click(selector string) {
	w.t.Helper()
	w.run(chromedp.Click(chromedp.CSS(selector), chromedp.NodeVisible))
}

// fill replaces what stands in a field.
func (w *window) fill(selector, text string) {
	w.t.Helper()
	w.do(fmt.Sprintf("document.querySelector(%q).select()", selector))
	w.run(chromedp.KeyEvent(text))
}

// press sends keys to whatever has the focus.
func (w *window) press(keys string) {
	w.t.Helper()
	w.run(chromedp.KeyEvent(keys))
}

// enter gives the key.
func (w *window) enter() {
	w.t.Helper()
	w.wantsJS(`document.activeElement?.id === "key"`)
	w.fill("#key", w.key)
	w.press("\r")
	w.wants("#room", "New sandbox")
	w.wantsJS(`document.querySelector("#template").options.length > 0`)
}

const view = ".view:not([hidden]) "

// create makes a sandbox with the form as it stands, and returns its ID.
func (w *window) create() string {
	w.t.Helper()
	n := js[int](w, `document.querySelectorAll(".pick").length`)
	w.click("#create-button")
	w.wantsJS(fmt.Sprintf(`document.querySelectorAll(".pick").length === %d`, n+1))
	w.click(".boxes li:first-child .pick")
	w.wants(view+".badge", "running")
	w.tab("details")
	return js[string](w, fmt.Sprintf(`[...document.querySelectorAll("%sdd")].map((d) => d.textContent).find((t) => /^[a-z0-9]{24}$/.test(t))`, view))
}

// act presses one of the buttons of the chosen sandbox.
func (w *window) act(verb string) {
	w.t.Helper()
	selector := view + "[data-act=" + verb + "]"
	w.wantsJS(fmt.Sprintf(`document.querySelector(%q)?.disabled === false`, selector))
	w.click(selector)
}

func (w *window) tab(name string) {
	w.t.Helper()
	w.click(view + "[data-tab=" + name + "]")
}

func exceptionOf(e *runtime.EventExceptionThrown) string {
	if e.ExceptionDetails.Exception == nil {
		return ""
	}
	return " " + e.ExceptionDetails.Exception.Description
}
