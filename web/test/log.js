// What the page has asked of the API, how long each call took, and what is under way.

import { clock, make, took, visible } from "./dom.js";
import { phaseChart } from "./phases.js";

const most = 300; // entries that are kept

const running = make("ul", { class: "under-way", "aria-label": "Under way" });
const list = make("ol");
const box = make("div", { class: "log", role: "log", "aria-label": "What was asked, newest first", tabindex: "0" }, list);
const polls = make("input", { type: "checkbox", id: "polls", on: { change: () => list.classList.toggle("with-polls", polls.checked) } });

export function openLog(section) {
  section.append(make("p", { class: "check" }, polls, make("label", { for: "polls" }, "Show the polling, too")), running, box);
  setInterval(tick, 100);
}

export function clearLog() { list.replaceChildren(); }

const timers = new Map(); // the elements that show a running time, and since when

function tick() {
  for (const [e, since] of timers) e.textContent = took(performance.now() - since);
}

// timer is an element that shows how long something has been going on.
export function timer() {
  const e = make("span", { class: "took", "aria-hidden": "true" }, "0 ms");
  timers.set(e, performance.now());
  return { element: e, stop: () => timers.delete(e) };
}

// begin notes a call. It ends once, with done or fail.
export function begin(what, { quiet = false } = {}) {
  const at = new Date(), since = performance.now(), name = visible(what);
  let shown, time;
  const appear = () => {
    time = timer();
    timers.set(time.element, since);
    shown = make("li", null, make("span", { class: "what" }, name), time.element, make("progress", { "aria-label": name }));
    running.append(shown);
  };
  const late = quiet ? 0 : setTimeout(appear, 150); // what is quick does not flicker
  const end = (state, detail, phases) => {
    clearTimeout(late);
    shown?.remove();
    time?.stop();
    const line = make("li", { class: `entry ${state}${quiet && state === "ok" ? " poll" : ""}` },
      make("time", { datetime: at.toISOString() }, clock(at)), make("span", { class: "what" }, name),
      make("span", { class: "took" }, took(performance.now() - since)), detail ? make("span", { class: "detail" }, visible(detail)) : null);
    if (phases?.length > 1) line.append(phaseChart(phases, null, true));
    list.prepend(line);
    trim();
  };
  return {
    done: (phases, detail) => end("ok", detail, phases),
    fail: (text) => end("bad", text),
  };
}

// trim forgets the oldest, of the polls first: they would push out everything else.
function trim() {
  const old = list.querySelectorAll(".poll");
  for (let i = 30; i < old.length; i++) old[i].remove();
  while (list.children.length > most) list.lastElementChild.remove();
}
