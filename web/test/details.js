// What else is known of a sandbox.

import { bytes, make, moment, named, setText, shape, short } from "./dom.js";
import { choose } from "./state.js";

const started = { boot: "booted", warm: "restored from what an earlier boot had kept", snapshot: "restored from a snapshot", fork: "copied from another", resume: "resumed" };

function rows(box) {
  const out = [["ID", box.id], ["Shape", `${shape(box)} · ${bytes(box.disk_mib * 1024 * 1024)} of disk`], ["Created", moment(box.created_at)],
    ["Internet", box.network.internet ? "reachable" : "not reachable"]];
  const add = (name, value) => { if (value) out.push([name, value]); };
  add("How it came to run", started[box.started_by]);
  add("Ends", box.deadline && moment(box.deadline));
  add("Ended", box.ended_at && moment(box.ended_at));
  add("Why", box.cause_detail ? `${box.cause}: ${box.cause_detail}` : box.cause);
  add("Automatic pause failed", box.auto_pause_error);
  if (box.saved) {
    add("Pause point", `generation ${box.saved.generation}, of ${moment(box.saved.at)}`);
    add("On disk", `${bytes(box.saved.own_bytes)} of its own, ${bytes(box.saved.memory_bytes)} of memory and ${bytes(box.saved.disk_bytes)} of disk with what it shares`);
  }
  return out;
}

export function details() {
  const list = make("dl"), element = make("div", { class: "panel" }, list);
  let drawn = "";
  return {
    name: "details", label: "Details", element,
    draw(box) {
      if (!box.created_at) return; // gone: what was known last stays
      const now = rows(box), text = JSON.stringify([now, box.template, box.forked_from]);
      if (text === drawn) return;
      drawn = text;
      list.replaceChildren(...[["Template", named(box.template)], ...now].map(([name, value]) => make("div", null, make("dt", null, name), make("dd", null, typeof value === "string" ? named(value) : value))));
      if (box.forked_from) {
        const link = make("button", { type: "button", class: "link", on: { click: () => choose(box.forked_from) } });
        setText(link, short(box.forked_from));
        list.append(make("div", null, make("dt", null, "Forked from"), make("dd", null, link)));
      }
    },
  };
}
