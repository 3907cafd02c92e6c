// The tree that snapshots form: what goes on from where, and what runs on top.

import { call, pathOf, words } from "./api.js";
import { bytes, clock, make, named, short } from "./dom.js";
import { choose, onChange, state } from "./state.js";

const most = 40; // lines that are asked for

const picture = make("div", { class: "tree" });
const message = make("p", { class: "soft", role: "status" });
const section = make("div", { id: "tree", hidden: true }, make("h3", null, "Tree"), picture, message);

export function openTree() {
  onChange(check);
  return section;
}

// check asks again when something has changed that the tree shows.
let known = "", asking = false;
async function check() {
  const ready = state.snapshots.filter((s) => s.state === "ready");
  section.hidden = ready.length === 0;
  const now = JSON.stringify([ready.map((s) => s.name), state.boxes.map((b) => [b.id, b.state])]);
  if (now === known || asking || section.hidden) return;
  asking = true;
  try {
    const nodes = await gather(ready);
    picture.replaceChildren(draw(nodes));
    known = now;
    message.textContent = "";
  } catch (e) {
    message.textContent = `The tree is not up to date: ${words(e)}`;
  }
  asking = false;
}

// gather merges the trees of all snapshots. One that descends from another is in
// the other's tree, with all below it.
async function gather(ready) {
  const nodes = new Map(), covered = new Set();
  const older = [...ready].sort((a, b) => (a.saved?.generation ?? 0) - (b.saved?.generation ?? 0));
  let asked = 0;
  for (const { name } of older) {
    if (covered.has(name)) continue;
    if (++asked > most) {
      message.textContent = `Of more than ${most} lines the first are drawn.`;
      break;
    }
    const answer = await call("GET", pathOf("snapshots", name, "tree"), { what: `tree of ${name}`, quiet: true });
    for (const n of answer.nodes) if (!nodes.has(n.digest) || n.parent) nodes.set(n.digest, n);
    const top = answer.nodes.find((n) => n.kind === "snapshot" && n.name === name);
    for (const n of answer.nodes) if (top && n.name && descends(nodes, n, top.digest)) covered.add(n.name);
  }
  return nodes;
}

function descends(nodes, n, from) {
  for (let i = 0; n && i <= nodes.size; i++) {
    if (n.digest === from) return true;
    n = nodes.get(n.parent);
  }
  return false;
}

function draw(nodes) {
  const children = new Map();
  for (const n of nodes.values()) {
    const parent = nodes.has(n.parent) ? n.parent : "";
    children.set(parent, [...children.get(parent) ?? [], n]);
  }
  const largest = Math.max(1, ...[...nodes.values()].map((n) => n.own_bytes));
  const branch = (parent, depth) => {
    const list = (children.get(parent) ?? []).sort((a, b) => a.generation - b.generation || String(a.at).localeCompare(String(b.at)));
    if (list.length === 0 || depth > nodes.size) return null;
    return make("ul", null, list.map((n) => make("li", { class: n.kind }, node(n, largest), branch(n.digest, depth + 1))));
  };
  return branch("", 0) ?? make("p", { class: "soft" }, "Nothing to draw.");
}

function node(n, largest) {
  const what = { template: () => ["template ", named(n.name)], snapshot: () => [make("strong", null, named(n.name))], pause: () => ["paused ", chip(n.sandbox_id)] }[n.kind]?.() ??
    ["unnamed point", n.sandbox_id ? [" of ", make("code", null, short(n.sandbox_id))] : ""];
  const size = make("span", { class: "size", "aria-hidden": "true" });
  size.style.width = `${Math.max(2, Math.round(100 * Math.sqrt(n.own_bytes / largest)))}px`; // its area says how much it is
  const facts = n.kind === "template" ? "" : ` generation ${n.generation} · ${bytes(n.own_bytes)}${n.at ? ` · ${clock(n.at)}` : ""}`;
  return make("div", { class: "node" }, make("span", null, what), n.kind === "template" ? null : size, make("span", { class: "soft" }, facts),
    n.running?.length ? make("span", { class: "runs" }, "runs: ", n.running.flatMap((id) => [chip(id), " "])) : null);
}

const chip = (id) => make("button", { type: "button", class: "link", on: { click: () => choose(id) } }, make("code", null, short(id)));
