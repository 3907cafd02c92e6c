// The page at /test: a client of the API like any other.

import { call, keptKey, onRefused, pathOf, setKey, words } from "./api.js";
import { closeViews, openBox } from "./box.js";
import { openBoxes } from "./boxes.js";
import { openCreate } from "./create.js";
import { bytes, make, visible } from "./dom.js";
import { clearLog, openLog } from "./log.js";
import { openSnapshots } from "./snapshots.js";
import { changed, onChange, start, state, stop } from "./state.js";

const at = (id) => document.getElementById(id);

function showDoor(text) {
  stop();
  closeViews();
  setKey("");
  changed();
  at("room").hidden = true;
  at("door").hidden = false;
  at("forget").hidden = true;
  at("key-error").textContent = text;
  at("key").focus();
}

// enter tries the key on something that is asked for anyway. One that was taken
// before is kept while the server does not answer.
async function enter(key, before) {
  setKey(key);
  try {
    state.host = await call("GET", pathOf("host"), { what: "look at the host" });
  } catch (e) {
    if (!before || e.status === 401) throw e;
  }
  at("door").hidden = true;
  at("room").hidden = false;
  at("forget").hidden = false;
  await start();
}

at("key-form").addEventListener("submit", async (e) => {
  e.preventDefault();
  const key = at("key").value.trim(), button = e.submitter ?? at("key-form").querySelector("button");
  at("key-error").textContent = "";
  if (key === "") {
    at("key-error").textContent = "Type or paste your key first.";
    return at("key").focus();
  }
  if (!/^[\x21-\x7e]+$/.test(key)) {
    at("key-error").textContent = "That is no key: a key has only letters, digits and underscores.";
    return at("key").focus();
  }
  button.disabled = true;
  try {
    await enter(key);
    at("key").value = "";
    at("template").focus();
  } catch (e) {
    showDoor(words(e));
  }
  button.disabled = false;
});
at("forget").addEventListener("click", () => {
  clearLog();
  showDoor("");
});
onRefused((error) => { if (!at("room").hidden) showDoor(words(error)); });

function drawHost() {
  const h = state.host;
  if (!h) {
    delete at("host").dataset.facts;
    return at("host").replaceChildren();
  }
  const kind = h.accelerator === "kvm" ? make("span", { class: "badge running" }, "KVM")
    : make("span", { class: "badge pausing" }, "software emulation: no security boundary");
  const facts = `${visible(h.name)} · ${h.vmm} · ${h.cpus} CPUs · ${bytes(h.mem_available_mib * 1024 * 1024)} of memory and ${bytes(h.disk_free_mib * 1024 * 1024)} of disk free`;
  if (at("host").dataset.facts === facts) return;
  at("host").dataset.facts = facts;
  at("host").replaceChildren(kind, ` ${facts}`);
}

openCreate(at("create"));
openBoxes(at("boxes"));
openBox(at("box"));
openSnapshots(at("snapshots"));
openLog(at("activity"));
onChange(drawHost);

const kept = keptKey();
if (kept) enter(kept, true).catch((e) => showDoor(words(e)));
else showDoor("");
