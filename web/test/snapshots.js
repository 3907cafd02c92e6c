// Snapshots: what they are and take, and the tree that they form.

import { call, pathOf, words } from "./api.js";
import { useAsTemplate } from "./create.js";
import { ask } from "./dialogs.js";
import { ago, bytes, make, mebibytes, named, shape, short, visible } from "./dom.js";
import { choose, look, onChange, state } from "./state.js";
import { openTree } from "./tree.js";

const empty = make("p", { class: "soft" }, "None yet. Choose a sandbox, and “Snapshot…” keeps its memory and disk under a name.");
const heads = ["Name", "Shape", "Generation", "Allocated", "Taken", "Actions"]; // also those of a card on a phone
const body = make("tbody");
const table = make("table", { class: "snapshots" }, make("thead", null, make("tr", null, heads.map((h) => make("th", { scope: "col" }, h)))), body);
const scroll = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Snapshots, a table" }, table);
const message = make("p", { class: "message", role: "alert" });

export function openSnapshots(section) {
  section.append(empty, scroll, message, openTree());
  onChange(draw);
}

let drawn = "";
const deleting = new Set();

function draw() {
  const now = JSON.stringify([state.snapshots, [...deleting], Math.floor(Date.now() / 30_000)]);
  if (now === drawn) return;
  drawn = now;
  empty.hidden = state.snapshots.length > 0;
  scroll.hidden = !empty.hidden;
  const focused = document.activeElement?.closest("tr")?.dataset.name, act = document.activeElement?.dataset.act;
  body.replaceChildren(...state.snapshots.map(row));
  if (focused && act) {
    const again = [...body.rows].find((r) => r.dataset.name === focused);
    (again?.querySelector(`[data-act="${act}"]`) ?? document.getElementById("snapshots").querySelector("button"))?.focus();
  }
}

function row(s) {
  const cell = (head, ...content) => make("td", { "data-head": head }, make("div", null, content));
  const busy = deleting.has(s.name) || s.state !== "ready";
  const state = s.state === "ready" ? null : make("span", { class: `badge ${s.state}` }, s.state === "lost" ? "lost: its host does not have it" : s.state);
  const button = (label, act, fn, kind, disabled) => make("button", { type: "button", class: kind, "data-act": act, disabled, on: { click: fn } }, label, make("span", { class: "unseen" }, ` ${visible(s.name)}`));
  const tr = make("tr", null,
    make("th", { scope: "row" }, named(s.name), s.parent ? make("span", { class: "soft" }, " after ", named(s.parent)) : null, state),
    cell("Shape", `${shape(s)} · ${mebibytes(s.disk_mib)}`),
    cell("Generation", s.saved ? String(s.saved.generation) : "–"),
    cell("Allocated", s.saved ? [bytes(s.saved.own_bytes), make("span", { class: "soft" }, ` of ${bytes(s.saved.memory_bytes + s.saved.disk_bytes)}`)] : "–"),
    cell("Taken", `${ago(s.created_at)}, of `, make("button", { type: "button", class: "link", on: { click: () => choose(s.sandbox_id) } }, short(s.sandbox_id))),
    cell("Actions", make("div", { class: "actions" }, button("Use", "use", () => useAsTemplate(s.name), "quiet", busy), button("Delete", "delete", () => remove(s.name), "quiet danger", deleting.has(s.name)))));
  tr.dataset.name = s.name;
  return tr;
}

async function remove(name) {
  const answer = await ask({ title: "Delete this snapshot?", text: "What something depends on cannot be deleted.", fields: [make("p", null, named(name))], action: "Delete", danger: true, read: () => true });
  if (!answer) return;
  message.textContent = "";
  deleting.add(name);
  draw();
  try {
    await call("DELETE", pathOf("snapshots", name), { what: `delete snapshot ${name}` });
  } catch (e) {
    message.textContent = words(e);
  }
  deleting.delete(name);
  draw();
  look();
}
