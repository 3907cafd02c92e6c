// Commands with their output as it comes.

import { pathOf, stream, words } from "./api.js";
import { callable } from "./boxes.js";
import { labelled, make, setText, short, took } from "./dom.js";

const most = 400_000; // characters of output that are kept on the page

// screen is text that grows, drawn once a frame however fast it comes.
function screen(pre) {
  let waiting = [], size = 0, asked = false;
  const draw = () => {
    asked = false;
    const below = pre.scrollHeight - pre.scrollTop - pre.clientHeight < 40;
    for (const [kind, text] of waiting) {
      const end = pre.lastChild;
      if (end?.className === kind) end.firstChild.appendData(text);
      else pre.append(make("span", { class: kind }, document.createTextNode(text)));
      size += text.length;
    }
    waiting = [];
    while (size > most) {
      const first = pre.firstChild.firstChild, cut = Math.min(first.length, size - most);
      first.deleteData(0, cut);
      size -= cut;
      if (first.length === 0) pre.firstChild.remove();
      pre.dataset.cut = "yes";
    }
    if (below) pre.scrollTop = pre.scrollHeight;
  };
  let held = 0;
  return (kind, text) => {
    if (text === "") return;
    const last = waiting.at(-1);
    if (last?.[0] === kind) last[1] += text;
    else waiting.push([kind, text]);
    held += text.length;
    if (held > 2 * most) { // between two frames: only the end will be seen
      const w = waiting.at(-1);
      if (w[1].length > most) waiting = [[w[0], w[1].slice(-most)]];
      held = waiting.reduce((n, p) => n + p[1].length, 0);
    }
    if (asked) return;
    asked = true;
    setTimeout(() => { held = 0; draw(); }, 30); // a hidden tab has no frames
  };
}

export function openRun(id) {
  const line = make("input", { spellcheck: "false", autocapitalize: "off", autocomplete: "off", class: "mono" });
  const go = make("button", { type: "submit", class: "main" }, "Run"), stop = make("button", { type: "button", hidden: true }, "Stop");
  const output = make("pre", { class: "output", tabindex: "0", role: "region", "aria-label": "Output" });
  const status = make("p", { class: "soft", role: "status" });
  const write = screen(output), past = [];
  let at = 0, running = null, signal = "TERM";
  const asleep = make("p", { class: "soft", hidden: true }, "It is paused: a command resumes it.");

  const begin = (text) => {
    const decoders = { 1: new TextDecoder(), 2: new TextDecoder() }, since = performance.now();
    write("typed", `$ ${text}\n`);
    setText(status, "Runs…");
    stop.hidden = false;
    go.hidden = true;
    signal = "TERM";
    running = stream(pathOf("sandboxes", id, "exec", "stream"), { exec: { shell: text } }, `exec in ${short(id)}`, {
      onBytes: (b) => { if (decoders[b[0]]) write(b[0] === 2 ? "stderr" : "stdout", decoders[b[0]].decode(b.subarray(1), { stream: true })); },
      onEnd(error, exit) {
        running = null;
        stop.hidden = true;
        go.hidden = false;
        const said = error ? words(error) : exit.status;
        write(error || exit.exit_code !== 0 ? "failed" : "ended", `[${said}]\n`);
        setText(status, `${said} after ${took(performance.now() - since)}`);
      },
    });
  };
  const form = make("form", { novalidate: true, autocomplete: "off", class: "together", on: {
    submit(e) {
      e.preventDefault();
      if (running) return;
      const text = line.value.trim();
      if (text === "") return setText(status, "Type a command first, such as uname -a.");
      if (past.at(-1) !== text) past.push(text);
      at = past.length;
      line.value = "";
      begin(text);
    },
  } }, labelled("Command, for /bin/sh -c", line), go, stop);
  line.addEventListener("keydown", (e) => {
    const to = at + ({ ArrowUp: -1, ArrowDown: 1 }[e.key] ?? NaN);
    if (Number.isNaN(to)) return;
    e.preventDefault();
    at = Math.max(0, Math.min(past.length, to));
    line.value = past[at] ?? "";
  });
  stop.addEventListener("click", () => {
    setText(status, signal === "TERM" ? "Asked to end; Stop again kills it." : "Killed.");
    running?.kill(signal); // where it is not connected yet, that is its end, and says so
    signal = "KILL";
  });
  return {
    name: "run", label: "Run", element: make("div", { class: "panel" }, asleep, form, status, output),
    draw(box) {
      asleep.hidden = box.state !== "paused";
      go.disabled = !callable(box);
    },
    close: () => running?.close(),
  };
}
