// Where the time of a pause, a snapshot or a fork went: a bar, and the same in words.

import { bytes, make, took, visible } from "./dom.js";

// phaseChart is both. A brief one names only the longest, in their order.
export function phaseChart(phases, report, brief = false) {
  const least = brief ? [...phases].sort((a, b) => b.ms - a.ms)[Math.min(3, phases.length - 1)].ms : 0;
  const total = phases.reduce((sum, p) => sum + p.ms, 0) || 1;
  const bar = make("div", { class: "phases", "aria-hidden": "true" });
  const list = make("ol", { class: "phase-list" });
  phases.forEach((p, i) => {
    const part = make("span", { class: `phase tone-${i % 6}` });
    part.style.flexGrow = String(p.ms / total); // through the CSSOM: the policy allows no style attribute
    bar.append(part);
    if (p.ms >= least) list.append(make("li", null, make("span", { class: `key tone-${i % 6}`, "aria-hidden": "true" }), `${visible(p.name.replaceAll("_", " "))} ${took(p.ms)}`));
  });
  return make("div", { class: "chart" }, bar, list, report ? make("p", { class: "soft" }, reported(report)) : null);
}

function reported(r) {
  const stood = r.stopped_ms > 0 ? `The guest stood still for ${took(r.stopped_ms)}. ` : "";
  return `${stood}${bytes(r.bytes_written)} written: ${r.changed_pages} of ${r.dirty_pages} touched pages of memory and ${r.changed_blocks} of ${r.dirty_blocks} blocks of the disk had changed.`;
}
