// How things become visible. What a sandbox prints or names becomes text here, and
// never markup: nothing on this page makes markup from a string.

// make builds an element. Of attributes, on has listeners; null and false are left out.
export function make(name, attributes, ...children) {
  const e = document.createElement(name);
  for (const [k, v] of Object.entries(attributes ?? {})) {
    if (k === "on") for (const [type, fn] of Object.entries(v)) e.addEventListener(type, fn);
    else if (v != null && v !== false) e.setAttribute(k, v === true ? "" : v);
  }
  e.append(...children.flat(Infinity).filter((c) => c != null && c !== false));
  return e;
}

// visible shows characters that would hide or reorder others by their numbers.
export const visible = (text) => String(text).replace(
  /[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
  (c) => "\\u{" + c.codePointAt(0).toString(16) + "}");

// named is a name that somebody else has chosen.
export const named = (text, attributes) => make("bdi", attributes, visible(text));

export const short = (id) => visible(id.slice(0, 8));

let ids = 0;
export const freshID = (prefix) => `${prefix}-${++ids}`;

export function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  for (; n >= 1024 && i < units.length - 1; i++) n /= 1024;
  return `${i === 0 || n >= 100 ? Math.round(n) : n.toFixed(1).replace(/\.0$/, "")}\u00a0${units[i]}`;
}

export const mebibytes = (n) => bytes(n * 1024 * 1024);

export function took(ms) {
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`;
  return `${Math.floor(ms / 60_000)} min ${Math.round(ms % 60_000 / 1000)} s`;
}

// span says roughly how long something is.
export function span(ms) {
  const s = Math.max(0, Math.round(ms / 1000));
  if (s < 90) return `${s} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  if (s < 172_800) return `${Math.round(s / 3600)} h`;
  return `${Math.round(s / 86_400)} days`;
}

export const ago = (when) => `${span(Date.now() - new Date(when))} ago`;
export const until = (when) => span(new Date(when) - Date.now());
export const clock = (when) => new Date(when).toLocaleTimeString([], { hour12: false });
export const moment = (when) => new Date(when).toLocaleString([], { dateStyle: "medium", timeStyle: "medium" });
export const shape = (s) => `${s.vcpus}\u00a0vCPU${s.vcpus === 1 ? "" : "s"} · ${mebibytes(s.mem_mib)}`;

// setText writes only what changes: a selection by the user stays as it is.
export function setText(e, text) {
  if (e.textContent !== text) e.textContent = text;
}

// labelled is a field with its label above it.
export function labelled(text, field, note) {
  field.id ||= freshID("field");
  if (note) {
    note.id ||= freshID("note");
    field.setAttribute("aria-describedby", note.id);
  }
  return make("div", { class: "field" }, make("label", { for: field.id }, text), field, note);
}

// number reads what was typed; nothing typed is undefined.
export function number(field, what) {
  const text = field.value.trim();
  if (text === "") return undefined;
  if (!/^[+-]?[0-9]+(\.[0-9]+)?$/.test(text)) throw new Error(`${what} is “${visible(text)}”, which is not a number`);
  return Number(text);
}
