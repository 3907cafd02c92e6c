// A terminal. What draws it is a document of its own, terminal.html, with an opaque
// origin: it gets the bytes to draw through a port, and has neither the key, nor
// the network, nor a way into this page. The WebSocket is here.

import { pathOf, stream, words } from "./api.js";
import { callable } from "./boxes.js";
import { labelled, make, setText, short } from "./dom.js";

const most = 8 << 20; // bytes that may wait to be drawn; what comes beyond is left out

export function openTerminal(id) {
  const command = make("input", { spellcheck: "false", autocapitalize: "off", class: "mono", placeholder: "the login shell" });
  const go = make("button", { type: "submit", class: "main" }, "Open"), close = make("button", { type: "button", hidden: true }, "Close");
  const reader = make("input", { type: "checkbox", id: `reader-${id}` });
  const status = make("p", { class: "soft", role: "status" }), place = make("div", { class: "terminal" });
  let session = null;

  const end = (text) => {
    session = null;
    go.hidden = false;
    close.hidden = true;
    setText(status, text);
  };
  function open() {
    const frame = make("iframe", { src: "/test/terminal.html", sandbox: "allow-scripts", title: `Terminal of sandbox ${short(id)}` });
    place.replaceChildren(frame);
    setText(status, "Opens…");
    go.hidden = true;
    close.hidden = false;
    session = connect(id, frame, command.value.trim(), reader.checked, {
      opened: () => setText(status, "Ctrl+Enter leaves the terminal for the page."),
      left: () => close.focus(),
      end,
    });
  }
  const form = make("form", { novalidate: true, autocomplete: "off", class: "together", on: { submit(e) { e.preventDefault(); if (!session) open(); } } },
    labelled("Command", command), go, close);
  close.addEventListener("click", () => {
    session?.close();
    go.focus();
  });
  reader.addEventListener("change", () => session?.reader(reader.checked));
  return {
    name: "terminal", label: "Terminal",
    element: make("div", { class: "panel" }, form, make("p", { class: "check" }, reader, make("label", { for: reader.id }, "For a screen reader")), status, place),
    draw(box) { go.disabled = !callable(box); },
    close: () => session?.close(),
  };
}

// connect joins a frame to a command. The frame says first how large it is.
function connect(id, frame, line, reader, { opened, left, end }) {
  const { port1: port, port2: theirs } = new MessageChannel();
  const encoder = new TextEncoder();
  let socket = null, waiting = 0, lost = 0, over = false;
  const finish = (text) => {
    if (over) return;
    over = true;
    port.postMessage({ end: text });
    end(text);
  };
  const draw = (bytes) => {
    if (waiting + bytes.length > most) {
      lost += bytes.length;
      return;
    }
    if (lost > 0) {
      port.postMessage({ lost });
      lost = 0;
    }
    waiting += bytes.length;
    port.postMessage({ bytes }, [bytes.buffer]);
  };
  const start = (size) => {
    const exec = line ? { shell: line } : undefined;
    socket = stream(pathOf("sandboxes", id, "pty"), { exec, size }, `terminal of ${short(id)}`, {
      onStarted: opened, onBytes: draw, onEnd: (error, exit) => finish(error ? words(error) : exit.status === "left" ? "Closed." : `The command has ended: ${exit.status}.`),
    });
  };
  port.onmessage = ({ data }) => {
    if (over) return;
    if (data.size && !socket) start(data.size);
    else if (data.size) socket.resize(data.size);
    else if (data.typed) socket?.write(encoder.encode(data.typed));
    else if (data.drawn) waiting -= data.drawn;
    else if (data.leave) left();
  };
  frame.addEventListener("load", () => {
    frame.contentWindow.postMessage({ reader }, "*", [theirs]); // its origin is opaque and has no name; there is no secret in it
    frame.focus();
  }, { once: true });
  return {
    reader: (on) => port.postMessage({ reader: on }),
    close: () => (socket ? socket.close() : finish("Closed.")),
  };
}
