// Command portserver is a server for the inside of a guest: it says what it was
// asked, echoes a WebSocket, and gives and takes many bytes.
package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/coder/websocket"

	"github.com/dormouse-sandbox/dormouse/control/hostfake"
)

func main() {
	mux := http.NewServeMux()
	mux.HandleFunc("/", ask)
	mux.HandleFunc("/ws", echo)
	mux.HandleFunc("GET /bytes/{n}", give)
	mux.HandleFunc("PUT /bytes", take)
	server := &http.Server{Addr: os.Args[1], Handler: mux, ReadHeaderTimeout: time.Minute}
	log.Fatal(server.ListenAndServe())
}

// ask says what arrived of a request, and sets a cookie as wide as it can be.
func ask(w http.ResponseWriter, r *http.Request) {
	http.SetCookie(w, &http.Cookie{Name: "guest", Value: "secret", Path: "/"})
	w.Header().Add("Set-Cookie", "wide=secret; Path=/; Domain="+r.URL.Query().Get("domain"))
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"method": r.Method, "uri": r.RequestURI, "host": r.Host, "header": r.Header}) // the client sees what is missing
}

func echo(w http.ResponseWriter, r *http.Request) {
	c, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
	if err != nil {
		return
	}
	defer func() { _ = c.CloseNow() }()
	c.SetReadLimit(1 << 20)
	for {
		kind, b, err := c.Read(r.Context())
		if err != nil {
			return
		}
		if err := c.Write(r.Context(), kind, b); err != nil {
			return
		}
	}
}

func give(w http.ResponseWriter, r *http.Request) {
	n, err := strconv.ParseInt(r.PathValue("n"), 10, 64)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Length", fmt.Sprint(n))
	_, _ = io.CopyBuffer(struct{ io.Writer }{w}, hostfake.Pattern(n), make([]byte, 256<<10)) // as above
}

func take(w http.ResponseWriter, r *http.Request) {
	sum := sha256.New()
	if _, err := io.Copy(sum, r.Body); err != nil {
		return
	}
	_, _ = fmt.Fprint(w, hex.EncodeToString(sum.Sum(nil))) // as above
}
