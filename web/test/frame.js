// Draws a terminal in a document of its own. What there is to draw comes through
// the one port that the page around it has given; what is typed goes back.
"use strict";

addEventListener("message", function first(e) {
  if (e.source !== parent || !e.ports[0]) return;
  removeEventListener("message", first);
  const port = e.ports[0], screen = document.getElementById("screen");
  const term = new Terminal({
    fontFamily: "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace", fontSize: 13, scrollback: 5000, cursorBlink: true,
    screenReaderMode: e.data.reader === true, allowProposedApi: false, linkHandler: { activate() {} }, // links that a program prints lead nowhere
    theme: { background: "#17161a", foreground: "#e6e4e9", cursor: "#f0b070", selectionBackground: "#5b4a36" },
  });
  const fit = new FitAddon.FitAddon();
  term.loadAddon(fit);
  term.open(screen);
  fit.fit();
  const size = () => port.postMessage({ size: { cols: term.cols, rows: term.rows } });
  port.onmessage = ({ data }) => {
    if (data.bytes) term.write(data.bytes, () => port.postMessage({ drawn: data.bytes.length }));
    else if (data.lost) term.write(`\r\n\x1b[7m ${data.lost} bytes came faster than they can be drawn, and are left out \x1b[0m\r\n`);
    else if (data.end !== undefined) {
      term.write("\r\n\x1b[2m");
      term.write(new TextEncoder().encode(data.end.replace(/[\u0000-\u001f\u007f-\u009f]/g, "�")));
      term.write("\x1b[0m\r\n");
      term.options.disableStdin = true;
      term.options.cursorBlink = false;
    } else if (data.reader !== undefined) term.options.screenReaderMode = data.reader;
  };
  term.onData((typed) => port.postMessage({ typed }));
  term.onResize(size);
  term.attachCustomKeyEventHandler((k) => {
    if (k.key !== "Enter" || !k.ctrlKey) return true;
    if (k.type === "keydown") port.postMessage({ leave: true });
    k.preventDefault();
    return false;
  });
  new ResizeObserver(() => { if (screen.clientWidth > 0) fit.fit(); }).observe(screen);
  addEventListener("focus", () => term.focus());
  term.focus();
  size();
});
