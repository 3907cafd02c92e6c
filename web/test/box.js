// The chosen sandbox: what it is, what can be done with it, and its tabs. Views of
// others that were looked at stay: a terminal goes on while another is chosen.

import { call, pathOf, words } from "./api.js";
import { badge, ended, moving } from "./boxes.js";
import { details } from "./details.js";
import { ask } from "./dialogs.js";
import { make, labelled, named, number, setText, shape, short, until } from "./dom.js";
import { openFiles } from "./files.js";
import { timer } from "./log.js";
import { phaseChart } from "./phases.js";
import { openPorts } from "./ports.js";
import { openRun } from "./run.js";
import { changed, choose, look, onChange, state } from "./state.js";
import { openTerminal } from "./terminal.js";

const views = new Map();
const nothing = make("p", { class: "soft empty" }, "Make a sandbox, or choose one, to run commands in it, open a terminal, move files, pause, fork or keep it.");
let home;

export function openBox(section) {
  home = section;
  home.append(nothing);
  onChange(draw);
}

export function closeViews() {
  for (const view of views.values()) view.close();
  views.clear();
}

function draw() {
  const box = state.boxes.find((b) => b.id === state.chosen);
  if (state.chosen && box && !views.has(box.id)) {
    const view = openView(box.id);
    views.set(box.id, view);
    home.append(view.element);
  }
  for (const [id, view] of views) {
    const now = state.boxes.find((b) => b.id === id);
    view.element.hidden = id !== state.chosen;
    if (now) view.draw(now);
    else if (id === state.chosen) view.gone();
    else {
      view.close();
      views.delete(id);
    }
  }
  nothing.hidden = views.has(state.chosen);
  const view = views.get(state.chosen);
  if (view) home.setAttribute("aria-labelledby", view.title);
  else home.removeAttribute("aria-labelledby");
}

// tabs joins buttons to panels; the arrow keys go from one to the next.
function tabs(id, parts) {
  const bar = make("div", { class: "tabs", role: "tablist", "aria-label": "What to do with it" }), panels = [];
  const select = (i, focus) => parts.forEach((_, j) => {
    const tab = bar.children[j];
    tab.setAttribute("aria-selected", String(i === j));
    tab.tabIndex = i === j ? 0 : -1;
    panels[j].hidden = i !== j;
    if (i === j) {
      if (focus) tab.focus();
      parts[j].shown?.();
    }
  });
  parts.forEach((part, i) => {
    const tab = make("button", { type: "button", role: "tab", id: `${part.name}-tab-${id}`, "aria-controls": `${part.name}-${id}`, "data-tab": part.name, on: { click: () => select(i) } }, part.label);
    part.element.id = `${part.name}-${id}`;
    part.element.setAttribute("role", "tabpanel");
    part.element.setAttribute("aria-labelledby", tab.id);
    panels.push(part.element);
    bar.append(tab);
  });
  bar.addEventListener("keydown", (e) => {
    const at = [...bar.children].indexOf(document.activeElement), n = parts.length;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1 + n, Home: 0, End: n - 1 }[e.key];
    if (to === undefined || at < 0) return;
    e.preventDefault();
    select(to % n, true);
  });
  select(0);
  return [bar, ...panels];
}

function openView(id) {
  const title = `box-title-${id}`;
  const status = make("span"), about = make("p", { class: "soft" });
  const button = (label, name, act, kind) => make("button", { type: "button", class: kind ?? null, "data-act": name, on: { click: act } }, label);
  const busy = make("p", { class: "busy", role: "status", hidden: true }), message = make("p", { class: "message", role: "alert" }), last = make("div", { class: "last" });
  const act = actions(id, busy, message, last);
  const toggle = button("Pause", "pause", () => (toggle.dataset.act === "pause" ? act.pause() : act.resume()));
  const bar = [toggle, button("Fork…", "fork", act.fork), button("Snapshot…", "snapshot", act.snapshot), button("Destroy…", "destroy", act.destroy, "danger")];
  const facts = details(), parts = [openRun(id), openTerminal(id), openFiles(id), openPorts(id), facts];
  const element = make("div", { class: "view" },
    make("div", { class: "head" }, make("h2", { id: title }, "Sandbox ", make("code", null, short(id))), status, make("div", { class: "actions" }, bar)),
    about, busy, message, last, tabs(id, parts));
  return {
    element, title,
    draw(box) {
      if (status.textContent !== badge(box).textContent || status.firstChild?.className !== badge(box).className) status.replaceChildren(badge(box));
      const line = [box.forked_from ? `, a fork of ${short(box.forked_from)}` : "", ` · ${shape(box)} · `, box.deadline && !ended(box) ? `ends in ${until(box.deadline)}` : box.state === "paused" ? "no deadline while it is paused" : ""];
      if (about.dataset.line !== line.join("")) about.replaceChildren("From ", named(box.template), ...line);
      about.dataset.line = line.join("");
      const asleep = box.state === "paused" || box.state === "resuming";
      toggle.dataset.act = asleep ? "resume" : "pause";
      setText(toggle, asleep ? "Resume" : "Pause");
      const out = ended(box) || moving(box) || act.busy();
      for (const b of bar) b.disabled = out && !(b === bar[3] && !ended(box) && box.state !== "destroying" && !act.busy());
      for (const part of parts) part.draw?.(box);
    },
    gone() {
      setText(status, "");
      setText(about, "It has ended, and is no longer in the list.");
      for (const b of bar) b.disabled = true;
      for (const part of parts) part.draw?.({ id, state: "gone" });
    },
    close() {
      for (const part of parts) part.close?.();
      element.remove();
    },
  };
}

// actions are the verbs. One at a time: it shows what it is and for how long.
function actions(id, busy, message, last) {
  const at = (...more) => pathOf("sandboxes", id, ...more);
  let running = false;
  const run = async (what, then, ask) => {
    if (running) return;
    running = true;
    message.textContent = "";
    last.replaceChildren();
    const time = timer();
    busy.replaceChildren(`${what}… `, time.element, make("progress", { "aria-label": what }));
    busy.hidden = false;
    const asked = ask();
    changed();
    setTimeout(look, 100);
    try {
      then?.(await asked);
    } catch (e) {
      message.textContent = words(e);
    }
    running = false;
    time.stop();
    busy.hidden = true;
    look();
  };
  const chart = (title) => (answer) => {
    if (answer.phases?.length) last.replaceChildren(make("h3", null, title), phaseChart(answer.phases, answer.report));
  };
  const post = (verb, what, body, once) => () => call("POST", at(verb), { body, once, what: `${what} ${short(id)}` });
  return {
    busy: () => running,
    pause: () => run("Pausing", chart("Where the time of the pause went"), post("pause", "pause")),
    resume: () => run("Resuming", chart("Where the time of the resume went"), post("resume", "resume", {})),
    async fork() {
      const count = make("input", { inputmode: "numeric", value: "1" });
      const answer = await ask({
        title: "Fork this sandbox", text: "Copies go on from what is in it now. The original runs on.", action: "Fork",
        fields: [labelled("How many copies", count)], read: () => number(count, "the number of copies") ?? 1,
      });
      if (answer) run("Forking", (forked) => forkDone(forked, message, chart("Where the time of the fork went")), post("fork", "fork", { count: answer.value }, true));
    },
    async snapshot() {
      const name = make("input", { spellcheck: "false", autocapitalize: "off" });
      const answer = await ask({
        title: "Keep a snapshot", text: "Its memory and disk as they are now, under a name. It runs on.", action: "Keep",
        fields: [labelled("Name", name)], read: () => name.value.trim(),
      });
      if (!answer) return;
      run("Taking a snapshot", chart("Where the time of the snapshot went"), () => call("POST", pathOf("snapshots"), {
        body: { name: answer.value, sandbox_id: id }, what: `snapshot of ${short(id)}`,
      }));
    },
    async destroy() {
      const answer = await ask({ title: `Destroy sandbox ${short(id)}?`, text: "What is in it is lost, unless a snapshot has it.", action: "Destroy", danger: true, read: () => true });
      if (answer) run("Destroying", null, () => call("DELETE", at(), { what: `destroy ${short(id)}` }));
    },
  };
}

function forkDone(forked, message, chart) {
  chart(forked);
  const failed = forked.copies.filter((c) => c.error);
  if (failed.length) message.textContent = `${failed.length} of ${forked.copies.length} copies did not come to run: ${words(failed[0].error)}`;
  const first = forked.copies.find((c) => c.sandbox);
  if (first && forked.copies.length === 1) look().then(() => choose(first.sandbox.id));
}
