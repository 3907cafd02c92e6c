package host_test

import (
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// fitForAMessage checks a text that a guest had a hand in.
func fitForAMessage(t *testing.T, text string) {
	t.Helper()
	strange := func(r rune) bool { return r != '\n' && r != '\t' && !unicode.IsPrint(r) }
	if len(text) > 4100 || !utf8.ValidString(text) || strings.ContainsFunc(text, strange) {
		t.Errorf("%d bytes, valid %v: %.200q", len(text), utf8.ValidString(text), text)
	}
}

// FuzzPrintable: whatever a guest says, it can be shown and encoded.
func FuzzPrintable(f *testing.F) {
	f.Add("plain\n\ttext")
	f.Add("\x1b]0;title\x07\xff\xfe\u202e\u0000")
	f.Add(strings.Repeat("€", 1334))
	f.Fuzz(func(t *testing.T, text string) { fitForAMessage(t, host.Printable(text)) })
}

// FuzzAnswerError: any answer that is no success is an error of a known kind.
func FuzzAnswerError(f *testing.F) {
	f.Add(507, `{"code":507,"message":"the disk is full"}`)
	f.Add(400, `{"message":"\u001b[2J"}`)
	f.Add(302, `{"message":7}`)
	f.Add(-1, "\xff")
	f.Fuzz(func(t *testing.T, status int, body string) {
		res := &http.Response{StatusCode: status, Status: body, Body: io.NopCloser(strings.NewReader(body))}
		err := host.AnswerError(res)
		if err == nil || !slices.Contains(sandbox.Kinds(), sandbox.KindOf(err)) {
			t.Fatalf("status %d: %v", status, err)
		}
		fitForAMessage(t, err.Error())
	})
}

// FuzzFiles: a guest's answer about its files is taken whole or refused, and is
// never much larger in memory than it was on the wire.
func FuzzFiles(f *testing.F) {
	list := &filesystem.ListDirResponse{Entries: []*filesystem.EntryInfo{{Name: "a", Path: "/a", Size: 7}, {Name: "b"}}}
	whole, err := proto.Marshal(list)
	if err != nil {
		f.Fatal(err)
	}
	for n := range len(whole) + 1 { // also cut short anywhere
		f.Add(whole[:n])
	}
	f.Add([]byte(strings.Repeat("\x0a\x00", 60_000)))
	f.Fuzz(func(t *testing.T, data []byte) {
		var list filesystem.ListDirResponse
		if err := host.DecodeFiles(data, &list); err == nil && len(list.GetEntries()) > 50_000 {
			t.Errorf("%d bytes became %d entries", len(data), len(list.GetEntries()))
		}
		var one filesystem.StatResponse
		if err := host.DecodeFiles(data, &one); err == nil && len(data) > 256<<10 {
			t.Errorf("%d bytes about one file are taken", len(data))
		}
	})
}

// FuzzIdentified: what a guest says of its new identity is fit for a log, or refused.
func FuzzIdentified(f *testing.F) {
	f.Add(`{"frozen":true,"clock":"2026-11-27T12:00:00Z","dropped":2,"hooks":[{"name":"10","error":"exit status 1","output":"a\n","tookMs":7}],"warnings":["w"]}`)
	f.Add(`{"hooks":[{"output":"\u001b[2J` + strings.Repeat("x", 9000) + `"}],"clock":"\u0007"}`)
	f.Add(`{"hooks":[` + strings.Repeat(`{},`, 500) + `{}],"warnings":[` + strings.Repeat(`"",`, 500) + `""]}`)
	f.Add(`{"dropped":"many"}`)
	f.Fuzz(func(t *testing.T, body string) {
		got, err := host.DecodeIdentified(strings.NewReader(body))
		if err != nil {
			fitForAMessage(t, err.Error())
			return
		}
		if len(got.Hooks) > 100 || len(got.Warnings) > 100 {
			t.Errorf("%d hooks, %d warnings", len(got.Hooks), len(got.Warnings))
		}
		for _, text := range append(got.Warnings, got.Clock) {
			fitForAMessage(t, text)
		}
		for _, h := range got.Hooks {
			fitForAMessage(t, h.Name)
			fitForAMessage(t, h.Error)
			fitForAMessage(t, h.Output)
		}
	})
}
