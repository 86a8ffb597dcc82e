// The sign-in view.

import { Away, signInWith } from "../api.js";
import { h } from "../dom.js";

/** The elements of the sign-in view; `begin` continues after a sign-in. */
export function entrance(words, begin) {
  const problem = h("p", { class: "notice bad", role: "alert" }, words);
  problem.hidden = words === null;
  const input = h("input", { type: "password", id: "token", autocomplete: "off", required: true });
  const form = h("form", { class: "token" }, h("label", { for: "token" }, "Or paste a token"), h("div", input, h("button", { class: "primary" }, "Sign in")));
  form.onsubmit = async (event) => {
    event.preventDefault();
    try {
      await signInWith(input.value.trim());
    } catch (error) {
      problem.textContent = error instanceof Away ? "The daemon does not answer." : error.message;
      problem.hidden = false;
      return;
    }
    begin();
  };
  return [
    h("h1", "KSI"),
    problem,
    h("p", "Open this page from the machine where the daemon runs:"),
    h("pre", { class: "command" }, h("code", "ksi open")),
    form,
    h("p", { class: "note" }, "The token is not stored. The browser gets a session that ends after seven days, or when the token is revoked. With a token of the scope “read” the page is read-only."),
  ];
}
