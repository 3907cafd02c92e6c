// What the server has, as of the last look, and who wants to know.

import { call, pathOf, words } from "./api.js";

export const state = { boxes: [], more: false, templates: [], snapshots: [], host: null, chosen: "", ended: false };

const listeners = new Set();
export const onChange = (fn) => { listeners.add(fn); };
export function changed() { for (const fn of listeners) fn(); }

export function choose(id) {
  state.chosen = id;
  changed();
}

// How long lies between two looks, and which of them look at more than the states.
const every = 2000, sometimes = 3, rarely = 15;
let looks = 0, timer = 0, open = false, looking = null, again = false;

// look asks for everything that moves. Of several wishes at a time two are granted:
// what was changed after a look began is seen by the next.
export function look(whole = true) {
  if (!open) return Promise.resolve();
  if (looking) {
    again = true;
    return looking;
  }
  clearTimeout(timer);
  looking = refresh(whole).finally(() => {
    looking = null;
    if (again) {
      again = false;
      look();
    } else if (open && !document.hidden) timer = setTimeout(look, every, false);
  });
  return looking;
}

async function refresh(whole) {
  try {
    const rare = looks % rarely === 0, more = whole || looks % sometimes === 0;
    const get = (what, ...parts) => call("GET", pathOf(...parts), { what, quiet: true });
    const [boxes, snapshots, templates, host] = await Promise.all([
      call("GET", pathOf("sandboxes"), { what: "list sandboxes", quiet: true, query: { limit: "200", all: String(state.ended) } }),
      more ? get("list snapshots", "snapshots") : null, rare ? get("list templates", "templates") : null, rare ? get("look at the host", "host") : null,
    ]);
    if (!open) return;
    state.boxes = boxes.sandboxes;
    state.more = boxes.next_cursor != null;
    if (snapshots) state.snapshots = snapshots.snapshots;
    if (templates) state.templates = templates.templates;
    if (host) state.host = host;
    looks++;
    trouble("");
  } catch (e) {
    if (open) trouble(`The list is not up to date: ${words(e)} It is tried again.`);
  }
  changed();
}

export function trouble(text) {
  const e = document.getElementById("trouble");
  e.hidden = text === "";
  if (e.textContent !== text) e.textContent = text;
}

export function start() {
  open = true;
  looks = 0;
  return look();
}

export function stop() {
  open = false;
  clearTimeout(timer);
  trouble("");
  Object.assign(state, { boxes: [], more: false, templates: [], snapshots: [], host: null, chosen: "" });
}

document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
