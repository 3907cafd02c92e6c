// The form that makes sandboxes, from templates and from snapshots.

import { call, pathOf, words } from "./api.js";
import { labelled, make, named, number, setText, shape } from "./dom.js";
import { choose, look, onChange, state } from "./state.js";

const template = make("select", { id: "template" });
const vcpus = make("input", { id: "vcpus", inputmode: "numeric", placeholder: "1", spellcheck: "false" });
const memory = make("input", { id: "memory", inputmode: "numeric", placeholder: "512", spellcheck: "false" });
const timeout = make("input", { id: "timeout", inputmode: "decimal", placeholder: "5", spellcheck: "false" });
const note = make("p", { class: "soft", role: "status" });
const message = make("p", { class: "message", role: "alert" });

export function openCreate(section) {
  const form = make("form", { novalidate: true, autocomplete: "off", on: { submit: create } },
    labelled("Template or snapshot", template), note,
    make("div", { class: "row" }, labelled("vCPUs", vcpus), labelled("Memory (MiB)", memory), labelled("Timeout (min)", timeout)),
    message, make("div", { class: "actions" }, make("button", { type: "submit", class: "main", id: "create-button" }, "Create")));
  section.append(form);
  template.addEventListener("change", fit);
  onChange(drawOptions);
}

// useAsTemplate chooses a snapshot in the form.
export function useAsTemplate(name) {
  template.value = name;
  fit();
  document.getElementById("create-button").focus();
  document.getElementById("create").scrollIntoView({ block: "nearest" });
}

let drawn = "";

function drawOptions() {
  const templates = state.templates.map((t) => t.name), snapshots = state.snapshots.filter((s) => s.state === "ready").map((s) => s.name);
  const now = JSON.stringify([templates, snapshots]);
  if (now === drawn) return;
  drawn = now;
  const before = template.value || "base";
  const option = (name) => {
    const o = named(name);
    return make("option", { value: name }, o.textContent);
  };
  template.replaceChildren(make("optgroup", { label: "Templates" }, templates.map(option)));
  if (snapshots.length) template.append(make("optgroup", { label: "Snapshots" }, snapshots.map(option)));
  template.value = [...templates, ...snapshots].includes(before) ? before : templates[0] ?? "";
  fit();
}

// fit locks the shape to that of a snapshot, which fixes it.
function fit() {
  const snapshot = state.snapshots.find((s) => s.name === template.value);
  for (const field of [vcpus, memory]) field.disabled = snapshot != null;
  if (snapshot) {
    vcpus.value = snapshot.vcpus;
    memory.value = snapshot.mem_mib;
    vcpus.dataset.locked = "yes";
  } else if (vcpus.dataset.locked) {
    vcpus.value = memory.value = "";
    delete vcpus.dataset.locked;
  }
  setText(note, snapshot ? `It goes on where the snapshot was taken, with ${shape(snapshot)}.` : "");
}

async function create(e) {
  e.preventDefault();
  message.textContent = "";
  const body = { template: template.value || undefined };
  try {
    if (!vcpus.disabled) Object.assign(body, { vcpus: number(vcpus, "vCPUs"), mem_mib: number(memory, "memory") });
    const minutes = number(timeout, "timeout");
    if (minutes !== undefined) body.timeout_seconds = minutes * 60;
    const before = new Set(state.boxes.map((b) => b.id));
    const made = call("POST", pathOf("sandboxes"), { body, once: true, what: `create from ${body.template ?? "base"}` });
    setTimeout(async () => { // it is in the list while it is being made
      await look();
      const box = state.boxes.find((b) => b.state === "creating" && !before.has(b.id));
      if (box) choose(box.id);
    }, 100);
    const box = await made;
    await look();
    choose(box.id);
  } catch (e) {
    message.textContent = words(e);
    look();
  }
}
