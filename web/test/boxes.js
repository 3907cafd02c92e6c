// The list of sandboxes with their states, as of the last look.

import { make, named, setText, shape, short, until, ago } from "./dom.js";
import { choose, look, onChange, state } from "./state.js";

const list = make("ul", { class: "boxes" });
const empty = make("p", { class: "soft" }, "None yet.");
const more = make("p", { class: "soft", hidden: true }, "The newest 200 are shown.");
const all = make("input", { type: "checkbox", id: "ended" });
const items = new Map();

export function openBoxes(section) {
  section.append(list, empty, more, make("p", { class: "check" }, all, make("label", { for: "ended" }, "Also those that ended")));
  all.addEventListener("change", () => {
    state.ended = all.checked;
    look();
  });
  list.addEventListener("keydown", move);
  onChange(draw);
}

// move goes through the list with the arrow keys.
function move(e) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[e.key];
  const buttons = [...list.querySelectorAll("button")], at = buttons.indexOf(document.activeElement);
  if (!step || at < 0) return;
  e.preventDefault();
  buttons[at + step]?.focus();
}

export const ended = (box) => box.state === "gone" || box.state === "failed";
// callable says whether anything can be asked of what is in a sandbox. A call resumes
// one that is paused.
export const callable = (box) => ["running", "pausing", "paused", "resuming", "unreachable"].includes(box.state);
export const moving = (box) => ["creating", "pausing", "resuming", "destroying"].includes(box.state);

// condition says in words how a sandbox is.
export function condition(box) {
  if (box.frozen) return "frozen: the disk of its host is nearly full";
  if (box.state === "paused") return `paused${box.pause_reason === "idle" ? ", for it was idle" : ""}`;
  if (ended(box)) return `${box.state} (${box.cause ?? "cause not known"})`;
  return box.state;
}

function when(box) {
  if (ended(box)) return box.ended_at ? `ended ${ago(box.ended_at)}` : "";
  if (box.state === "paused") return box.paused_at ? ago(box.paused_at) : "";
  return box.deadline ? `ends in ${until(box.deadline)}` : "";
}

export function badge(box) {
  return make("span", { class: `badge ${box.frozen ? "frozen" : box.state}` }, condition(box));
}

function item() {
  const id = make("code"), state = make("span"), about = make("span", { class: "soft" }), time = make("span", { class: "soft when" });
  const button = make("button", { type: "button", class: "pick" }, id, state, about, time);
  return { element: make("li", null, button), button, id, state, about, time };
}

function draw() {
  empty.hidden = state.boxes.length > 0;
  more.hidden = !state.more;
  const seen = new Set();
  state.boxes.forEach((box, i) => {
    seen.add(box.id);
    let it = items.get(box.id);
    if (!it) {
      it = item();
      items.set(box.id, it);
      it.button.addEventListener("click", () => {
        choose(box.id);
        const panel = document.getElementById("box");
        if (matchMedia("(max-width: 700px)").matches) panel.scrollIntoView({ behavior: "smooth", block: "start" });
      });
    }
    if (list.children[i] !== it.element) list.insertBefore(it.element, list.children[i] ?? null);
    setText(it.id, short(box.id));
    if (it.state.textContent !== condition(box) || it.state.firstChild?.className !== badge(box).className) it.state.replaceChildren(badge(box));
    const about = `${box.template} · ${shape(box)}`;
    if (it.about.textContent !== about) it.about.replaceChildren(named(box.template), ` · ${shape(box)}`);
    setText(it.time, when(box));
    it.button.toggleAttribute("aria-current", box.id === state.chosen);
    if (box.id === state.chosen) it.button.setAttribute("aria-current", "true");
    it.element.classList.toggle("moving", moving(box));
  });
  for (const [id, it] of items) {
    if (seen.has(id)) continue;
    const hadFocus = it.element.contains(document.activeElement);
    it.element.remove();
    items.delete(id);
    if (hadFocus) (list.querySelector("button") ?? all).focus();
  }
}
