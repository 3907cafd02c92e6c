// Servers in the sandbox. Their pages have an origin of their own, and never this one.

import { call, pathOf, words } from "./api.js";
import { callable } from "./boxes.js";
import { clock, labelled, make, number, short } from "./dom.js";

export function openPorts(id) {
  const port = make("input", { inputmode: "numeric", placeholder: "8000" });
  const message = make("p", { class: "message", role: "alert" }), found = make("div", { role: "status" });
  const form = make("form", { novalidate: true, autocomplete: "off", class: "together", on: {
    async submit(e) {
      e.preventDefault();
      message.textContent = "";
      found.replaceChildren();
      try {
        const n = number(port, "the port") ?? 8000;
        const answer = await call("POST", pathOf("sandboxes", id, "ports"), { body: { port: n }, what: `find port ${n} of ${short(id)}` });
        found.replaceChildren(...describe(id, answer));
      } catch (e) {
        message.textContent = words(e);
      }
    },
  } }, labelled("Port of a server in it, which listens on 0.0.0.0", port), make("button", { type: "submit", class: "main" }, "Find"));
  return {
    name: "ports", label: "Ports", element: make("div", { class: "panel" }, form, message, found),
    draw(box) { form.querySelector("button").disabled = !callable(box); },
  };
}

function describe(id, answer) {
  if (!answer.link) {
    return [make("p", null, "This server has no domain, so that browsers cannot visit ports. On your machine: ", make("code", null, `dormouse port-forward ${short(id)} ${answer.port}`))];
  }
  if (!["http:", "https:"].includes(new URL(answer.link).protocol)) throw new Error("the link is not one for a browser");
  return [make("p", null, make("a", { href: answer.link, target: "_blank", rel: "noopener noreferrer" }, `Open port ${answer.port} in a new tab`), ", an origin of its own: ", make("code", null, new URL(answer.url).origin)),
    make("p", { class: "soft" }, `The link is good for five minutes, and what it opens until ${clock(answer.expires_at)}.`)];
}
