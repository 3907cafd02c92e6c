// Draws /openapi.json. Everything becomes text, never markup.
"use strict";

const make = (name, attributes, ...children) => {
  const e = document.createElement(name);
  for (const [k, v] of Object.entries(attributes ?? {})) if (v != null) e.setAttribute(k, v);
  e.append(...children.filter((c) => c != null));
  return e;
};
const code = (text) => make("code", null, text);
const anchor = (text) => text.replace(/[^a-zA-Z0-9]+/g, "-");
const schemaName = (ref) => ref.split("/").pop();

// typeOf says in a line what a schema allows.
function typeOf(s) {
  if (s == null || Object.keys(s).length === 0) return "anything";
  if (s.$ref) return make("a", { href: "#schema-" + schemaName(s.$ref) }, schemaName(s.$ref));
  const out = make("span");
  const types = [].concat(s.type ?? []).filter((t) => t !== "null");
  if (s.type === "array") out.append("list of ", typeOf(s.items));
  else if (s.additionalProperties && s.additionalProperties !== true) out.append("object of ", typeOf(s.additionalProperties));
  else out.append(types.join(" or ") || "anything");
  return out;
}

// boundsOf says what else holds of a value.
function boundsOf(s) {
  const list = [];
  if (s?.enum) list.push("one of " + s.enum.join(", "));
  if (s?.items?.enum) list.push("each one of " + s.items.enum.join(", "));
  if (s?.minimum != null || s?.maximum != null) list.push(`${s.minimum ?? "…"} to ${s.maximum ?? "…"}`);
  if (s?.minLength != null || s?.maxLength != null) list.push(`${s.minLength ?? 0} to ${s.maxLength ?? "…"} characters`);
  if (s?.maxItems != null) list.push(`at most ${s.maxItems} items`);
  if (s?.pattern) list.push("matches " + s.pattern);
  if (s?.format) list.push(s.format);
  if (s?.default !== undefined) list.push("default " + JSON.stringify(s.default));
  return list.join("; ");
}

function table(head, rows) {
  const t = make("table", null, make("thead", null, make("tr", null, ...head.map((h) => make("th", { scope: "col" }, h)))), make("tbody"));
  for (const row of rows) t.tBodies[0].append(make("tr", null, ...row.map((cell) => make("td", null, cell ?? ""))));
  return make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": head[0] }, t);
}

function described(description, schema) {
  const bounds = boundsOf(schema);
  return make("span", null, description ?? schema?.description ?? "", bounds ? make("span", { class: "soft" }, " (" + bounds + ")") : null);
}

const properties = (s) => table(["Field", "Type", "What it is"], Object.entries(s.properties ?? {}).map(([name, p]) => [
  make("span", null, code(name), s.required?.includes(name) ? " *" : ""), typeOf(p), described(null, p),
]));

// body draws the content of a request or an answer.
function body(content) {
  return Object.entries(content ?? {}).map(([type, c]) => make("p", null, code(type), ": ", typeOf(c.schema)));
}

function responses(doc, list) {
  return table(["Status", "What it means", "Body"], Object.entries(list ?? {}).map(([status, r]) => {
    const answer = r.$ref ? doc.components.responses[schemaName(r.$ref)] : r;
    return [code(status === "default" ? "other" : status), answer.description, make("div", null, ...body(answer.content))];
  }));
}

function operation(doc, path, method, op, shared) {
  const parameters = [...(shared ?? []), ...(op.parameters ?? [])];
  const open = op.security?.length === 0 || op.security?.some((s) => Object.keys(s).length === 0);
  const d = make("details", { id: op.operationId, "data-text": [method, path, op.summary, op.description, op.operationId].join(" ").toLowerCase() },
    make("summary", null, make("span", { class: "method" }, method.toUpperCase()), make("span", { class: "path" }, path), make("span", { class: "about" }, op.summary ?? "")),
    op.description ? make("p", null, op.description) : null,
    make("p", { class: "soft" }, open ? "Needs no key." : "Needs a key."));
  if (parameters.length > 0) {
    d.append(make("h3", null, "Parameters"), table(["Name", "In", "Type", "What it is"], parameters.map((p) => [
      make("span", null, code(p.name), p.required ? " *" : ""), p.in, typeOf(p.schema), described(p.description, p.schema),
    ])));
  }
  if (op.requestBody) d.append(make("h3", null, "Body"), op.requestBody.description ?? "", ...body(op.requestBody.content));
  d.append(make("h3", null, "Answers"), responses(doc, op.responses));
  return d;
}

function draw(doc) {
  document.getElementById("about").textContent = doc.info.description;
  const groups = new Map();
  for (const [path, item] of Object.entries(doc.paths)) {
    for (const [method, op] of Object.entries(item)) {
      if (method === "parameters") continue;
      const tag = op.tags?.[0] ?? "other";
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push(operation(doc, path, method, op, item.parameters));
    }
  }
  groups.set("schemas", Object.entries(doc.components.schemas).map(([name, s]) => make("details",
    { id: "schema-" + name, "data-text": [name, s.description].join(" ").toLowerCase() },
    make("summary", null, make("span", { class: "path" }, name), make("span", { class: "about" }, s.description ?? "")), properties(s))));
  const main = document.getElementById("main"), nav = document.getElementById("nav");
  main.replaceChildren();
  for (const [tag, list] of groups) {
    main.append(make("section", { id: "group-" + anchor(tag) }, make("h2", null, tag), ...list));
    nav.append(make("strong", null, tag), make("ul", null, ...list.map((d) => make("li", null,
      make("a", { href: "#" + d.id }, d.id.replace(/^schema-/, ""))))));
  }
}

// openTarget unfolds what the address names.
function openTarget() {
  const d = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (d?.tagName !== "DETAILS") return;
  d.open = true;
  d.scrollIntoView();
  d.querySelector("summary").focus({ preventScroll: true });
}

function find() {
  const words = document.getElementById("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  let n = 0;
  for (const d of document.querySelectorAll("main details")) {
    const shown = words.every((w) => d.dataset.text.includes(w));
    d.hidden = !shown;
    document.querySelector(`nav a[href="#${d.id}"]`).parentElement.hidden = !shown;
    if (shown) n++;
  }
  for (const s of document.querySelectorAll("main section")) s.hidden = !s.querySelector("details:not([hidden])");
  document.getElementById("found").textContent = words.length > 0 ? `${n} found` : "";
}

addEventListener("keydown", (e) => {
  const input = document.getElementById("find");
  if (e.key === "/" && document.activeElement !== input && !e.ctrlKey && !e.metaKey && !e.altKey) {
    e.preventDefault();
    input.focus();
  } else if (e.key === "Escape" && document.activeElement === input) {
    input.value = "";
    find();
  }
});
addEventListener("hashchange", openTarget);
document.getElementById("find").addEventListener("input", find);

fetch("/openapi.json").then((r) => {
  if (!r.ok) throw new Error("the server answered " + r.status);
  return r.json();
}).then((doc) => { draw(doc); openTarget(); }).catch((e) => {
  document.getElementById("main").textContent = "The description could not be read: " + e.message;
});
