// What the page asks of the API. The key is kept here and goes into the header of
// a request, or the first message of a WebSocket; never into an address or a log.

import { visible } from "./dom.js";
import { begin } from "./log.js";

const store = "dormouse-key";
let key = "";
let refused = () => {};

// onRefused is told when the server does not take the key any more.
export function onRefused(fn) { refused = fn; }

export function keptKey() {
  try { return sessionStorage.getItem(store) ?? ""; } catch { return ""; } // a browser may forbid it
}

export function setKey(to) {
  key = to;
  try {
    if (to) sessionStorage.setItem(store, to);
    else sessionStorage.removeItem(store);
  } catch { /* then it lives as long as this page */ }
}

// Refusal is an error that the API has answered with.
export class Refusal extends Error {
  constructor({ code, message }, status) {
    super(message || `The server answered ${status} without a reason.`);
    this.code = code;
    this.status = status;
  }
}

// What the API calls its fields, and the page calls them.
const fields = { mem_mib: "memory", vcpus: "vCPUs", disk_mib: "disk", timeout_seconds: "the timeout in seconds", count: "the number of copies", sandbox_id: "the sandbox" };

// words says what went wrong, as a sentence for people.
export function words(error) {
  if (error?.name === "AbortError") return "Stopped.";
  const text = (error instanceof TypeError ? "the server does not answer" : visible(error?.message ?? error))
    .replace(/^([a-z_]+)(?= is )/, (field) => fields[field] ?? field);
  const first = /^[a-z]+\b(?!_)/.test(text) ? text.charAt(0).toUpperCase() + text.slice(1) : text;
  return /[.!?…]$/.test(first) ? first : first + ".";
}

export function reason(status, text) {
  try {
    const { error } = JSON.parse(text);
    if (error) return new Refusal(error, status);
  } catch { /* not ours: a proxy in between */ }
  return new Refusal({ code: "internal", message: `the server answered ${status}, and not as the API does` }, status);
}

const authorization = () => ({ Authorization: "Bearer " + key });

function gone(error) {
  if (error.status === 401 || error.code === "unauthorized") refused(error);
  return error;
}

export function pathOf(...parts) { return "/v1/" + parts.map(encodeURIComponent).join("/"); }

// call asks, and answers with the body's JSON. What is the name in the log; quiet
// calls are shown there on request only. Once calls make something: they have a key
// by which the server knows a repeated one.
export async function call(method, path, { body, query, what, quiet, once } = {}) {
  const entry = begin(what ?? `${method} ${path}`, { quiet });
  try {
    const response = await ask(method, path, { query, body: body && JSON.stringify(body), type: body && "application/json", once: once && random() });
    const text = await response.text();
    const answer = text ? JSON.parse(text) : {};
    entry.done(answer.phases);
    return answer;
  } catch (e) {
    entry.fail(words(e));
    throw gone(e);
  }
}

// random is a name that nobody else has. (There is no randomUUID over plain HTTP.)
const random = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(16)).join("-");

async function ask(method, path, { body, query, signal, type, once }) {
  const headers = authorization();
  if (once) headers["Idempotency-Key"] = once;
  if (type) headers["Content-Type"] = type;
  const to = query ? `${path}?${new URLSearchParams(query)}` : path;
  const fetchOnce = () => fetch(to, { method, headers, body, signal, cache: "no-store", credentials: "omit", redirect: "error", referrerPolicy: "no-referrer" });
  // Chromium breaks off what is under way whenever the machine gets or loses a
  // network interface, which is what a machine with sandboxes does.
  const response = await fetchOnce().catch(async (e) => {
    if (!(e instanceof TypeError) || (method !== "GET" && !once)) throw e;
    await new Promise((ok) => setTimeout(ok, 300));
    return fetchOnce();
  });
  if (!response.ok) throw reason(response.status, await response.text());
  return response;
}

// download reads a body piece by piece, and says how far it is.
export async function download(path, query, what, progress, signal) {
  const entry = begin(what);
  try {
    const response = await ask("GET", path, { query, signal });
    const total = Number(response.headers.get("Content-Length")) || 0;
    const pieces = [];
    let have = 0;
    for (const reader = response.body.getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) break;
      pieces.push(value);
      have += value.length;
      progress(have, total);
    }
    entry.done();
    return new Blob(pieces, { type: "application/octet-stream" }); // never a type that a browser would show
  } catch (e) {
    const error = e instanceof TypeError ? new Error("the connection broke, and nothing was kept") : e;
    entry.fail(words(error));
    throw gone(error);
  }
}

// upload sends a file. Only an XMLHttpRequest says how far it is.
export function upload(path, query, file, what, progress, signal) {
  const entry = begin(what);
  return new Promise((ok, no) => {
    const x = new XMLHttpRequest();
    x.open("PUT", `${path}?${new URLSearchParams(query)}`);
    x.setRequestHeader("Authorization", authorization().Authorization);
    x.setRequestHeader("Content-Type", "application/octet-stream");
    x.upload.onprogress = (e) => progress(e.loaded, e.total);
    x.onload = () => (x.status < 300 ? ok() : no(reason(x.status, x.responseText)));
    x.onerror = () => no(new TypeError("the connection broke"));
    x.onabort = () => no(new DOMException("stopped", "AbortError"));
    signal.addEventListener("abort", () => x.abort());
    x.send(file);
  }).then(() => entry.done(), (e) => {
    entry.fail(words(e));
    throw gone(e);
  });
}

// stream opens a WebSocket to a command. Its end is told once: onEnd(error, exit).
export function stream(path, start, what, { onStarted, onBytes, onEnd }) {
  const entry = begin(what);
  const socket = new WebSocket(`${location.protocol === "https:" ? "wss:" : "ws:"}//${location.host}${path}`);
  socket.binaryType = "arraybuffer";
  let ended = false;
  const end = (error, exit) => {
    if (ended) return;
    ended = true;
    if (error) entry.fail(words(error));
    else entry.done(null, exit.status);
    socket.close();
    onEnd(error && gone(error), exit);
  };
  const send = (message) => { if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message)); };
  socket.onopen = () => {
    send({ type: "auth", key });
    send({ type: "start", ...start });
  };
  socket.onmessage = ({ data }) => {
    if (ended) return;
    if (typeof data !== "string") return onBytes(new Uint8Array(data));
    const message = JSON.parse(data);
    if (message.type === "started") onStarted?.(message.pid);
    else if (message.type === "exit") end(null, message);
    else if (message.type === "error") end(new Refusal(message.error, 0));
  };
  socket.onclose = (e) => end(new Error(e.wasClean ? "the server ended the connection" : "the connection to the sandbox broke, or could not be made"));
  return {
    write: (data) => { for (let i = 0; i < data.length && socket.readyState === WebSocket.OPEN; i += 65_536) socket.send(data.subarray(i, i + 65_536)); },
    resize: (size) => send({ type: "resize", size }),
    kill: (signal) => (socket.readyState === WebSocket.OPEN ? send({ type: "kill", signal }) : end(new DOMException("stopped", "AbortError"))),
    close: () => end(null, { status: "left" }),
  };
}
