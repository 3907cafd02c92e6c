// The files of a sandbox: to look at, to fetch, to bring.

import { call, download, pathOf, upload, words } from "./api.js";
import { callable } from "./boxes.js";
import { bytes, labelled, make, moment, named, setText, short, visible } from "./dom.js";

const most = 1000; // entries that are drawn

const join = (dir, name) => (dir === "/" ? "/" : dir + "/") + name;
const above = (dir) => dir.slice(0, dir.lastIndexOf("/")) || "/";

export function openFiles(id) {
  const at = (...more) => pathOf("sandboxes", id, "files", ...more);
  const where = make("input", { spellcheck: "false", autocapitalize: "off", class: "mono" });
  const message = make("p", { class: "message", role: "alert" }), status = make("p", { class: "soft", role: "status" });
  const list = make("ul", { class: "files", "aria-label": "Files" }), transfers = make("ul", { class: "under-way", "aria-label": "Transfers" });
  const pick = make("input", { type: "file", multiple: true, class: "unseen", tabindex: "-1", "aria-label": "Files to upload" });
  let dir = "", stale = true, turn = 0, dead = false, asleep = false;

  async function open(path, focus) {
    const mine = ++turn;
    message.textContent = "";
    stale = false;
    setText(status, "Reads…");
    try {
      const to = path || await start(at, id);
      const { entries } = await call("GET", at("list"), { query: { path: to }, what: `list files in ${short(id)}` });
      if (mine !== turn) return;
      dir = to;
      where.value = to;
      drawFiles(entries, focus);
    } catch (e) {
      if (mine !== turn) return;
      message.textContent = words(e);
      setText(status, "");
    }
  }

  function drawFiles(entries, focus) {
    entries.sort((a, b) => (b.type === "directory") - (a.type === "directory") || (a.name < b.name ? -1 : 1));
    const up = dir === "/" ? [] : [make("li", null, make("button", { type: "button", class: "file directory", on: { click: () => open(above(dir), true) } }, "..", make("span", { class: "unseen" }, " up")))];
    list.replaceChildren(...up, ...entries.slice(0, most).map(entry));
    setText(status, entries.length > most ? `The first ${most} of ${entries.length} entries are shown.` : entries.length === 0 ? "Nothing is here." : `${entries.length} ${entries.length === 1 ? "entry" : "entries"}`);
    if (focus) list.querySelector("button")?.focus();
  }

  function entry(f) {
    const opens = f.type === "directory" || f.type === "symlink", reads = f.type === "file" || f.type === "symlink";
    const label = [named(f.name), f.symlink_target ? [" → ", named(f.symlink_target)] : null];
    const main = opens ? make("button", { type: "button", class: `file ${f.type}`, on: { click: () => open(f.path, true) } }, label) : make("span", { class: `file ${f.type}` }, label);
    return make("li", null, main,
      make("span", { class: "soft mono" }, f.type === "file" ? bytes(f.size) : ""),
      make("span", { class: "soft mono rights" }, `${f.permissions} `, named(f.owner)),
      make("span", { class: "soft time" }, f.modified_at ? moment(f.modified_at) : ""),
      reads ? make("button", { type: "button", class: "quiet", on: { click: () => fetchFile(f) } }, "Download", make("span", { class: "unseen" }, " ", visible(f.name))) : make("span"));
  }

  // transfer shows one that is under way, with its end in sight, and a way out.
  async function transfer(label, work) {
    const bar = make("progress", { max: "1", "aria-label": label }), figure = make("span", { class: "soft" }), stop = new AbortController();
    const line = make("li", null, make("bdi", { class: "what" }, label), bar, figure, make("button", { type: "button", class: "quiet", on: { click: () => stop.abort() } }, "Stop"));
    transfers.append(line);
    message.textContent = "";
    try {
      await work((have, total) => {
        if (total > 0) bar.value = have / total;
        figure.textContent = total > 0 ? `${bytes(have)} of ${bytes(total)}` : bytes(have);
      }, stop.signal);
    } catch (e) {
      message.textContent = `${label}: ${words(e)}`;
    }
    line.remove();
  }

  const fetchFile = (f) => transfer(`download ${visible(f.name)}`, async (progress, signal) => {
    const blob = await download(at("read"), { path: f.path }, `download from ${short(id)}`, progress, signal);
    const url = URL.createObjectURL(blob);
    const link = make("a", { href: url, download: f.name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
    setText(status, `${visible(f.name)} is downloaded, ${bytes(blob.size)}.`);
  });

  async function bring(files) {
    for (const file of files) {
      await transfer(`upload ${visible(file.name)}`, (progress, signal) => upload(at("write"), { path: join(dir, file.name) }, file, `upload to ${short(id)}`, progress, signal));
    }
    const before = message.textContent;
    await open(dir);
    message.textContent ||= before;
  }

  pick.addEventListener("change", () => {
    const files = [...pick.files];
    pick.value = "";
    bring(files);
  });
  const form = make("form", { novalidate: true, autocomplete: "off", class: "together", on: { submit(e) { e.preventDefault(); open(where.value.trim()); } } },
    labelled("Directory", where), make("button", { type: "submit" }, "Go"), make("button", { type: "button", class: "main", on: { click: () => pick.click() } }, "Upload…"), pick);
  const drop = make("div", { class: "panel" }, form, message, transfers, list, status);
  drop.addEventListener("dragover", (e) => { e.preventDefault(); drop.classList.add("drop"); });
  drop.addEventListener("dragleave", () => drop.classList.remove("drop"));
  drop.addEventListener("drop", (e) => {
    e.preventDefault();
    drop.classList.remove("drop");
    if (!dead && dir && e.dataTransfer.files.length) bring([...e.dataTransfer.files]);
  });
  return {
    name: "files", label: "Files", element: drop,
    shown() {
      if (!stale || dead) return;
      if (asleep) return setText(status, "It is paused: “Go” resumes it and reads the directory.");
      stale = false;
      open(dir);
    },
    draw(box) {
      dead = !callable(box);
      asleep = box.state === "paused";
      for (const b of form.querySelectorAll("button")) b.disabled = dead;
    },
  };
}

// start is the home of the sandbox's user, or the root where it has none.
async function start(at, id) {
  try {
    return (await call("GET", at("stat"), { query: { path: "." }, what: `look at the home in ${short(id)}`, quiet: true })).path;
  } catch (e) {
    if (e.code === "not_found" || e.code === "invalid") return "/";
    throw e;
  }
}
