// Questions before something is done: Esc leaves, Enter does it.

import { freshID, make } from "./dom.js";

// ask shows a question with fields, and answers with what read says of them; with
// nothing when the user leaves. What read throws is shown, and the dialog stays.
export function ask({ title, text, fields = [], action, danger, read = () => undefined }) {
  return new Promise((answer) => {
    const id = freshID("dialog"), error = make("p", { class: "message", role: "alert" });
    const no = make("button", { type: "button" }, "Cancel"), yes = make("button", { type: "submit", class: danger ? "danger" : "main" }, action);
    const form = make("form", { novalidate: true, autocomplete: "off" }, make("h2", { id }, title), text ? make("p", null, text) : null, ...fields, error,
      make("div", { class: "actions" }, no, yes));
    const dialog = make("dialog", { "aria-labelledby": id }, form);
    let value;
    no.addEventListener("click", () => dialog.close());
    form.addEventListener("submit", (e) => {
      e.preventDefault();
      try {
        value = { value: read() };
        dialog.close();
      } catch (e) {
        error.textContent = e.message;
      }
    });
    dialog.addEventListener("close", () => {
      dialog.remove();
      answer(value);
    });
    document.body.append(dialog);
    dialog.showModal();
    (danger ? no : dialog.querySelector("input, select") ?? yes).focus();
  });
}
