// Building blocks of the views: panels, tables, figures, bars, charts, dialogs and announcements.

import { h, s } from "./dom.js";
import { count } from "./words.js";

// -- announcements --------------------------------------------------------------------------------------------------------

let silence;

/** Announce a message, visibly and to screen readers. */
export function say(text, bad = false) {
  const place = document.getElementById("said");
  place.className = bad ? "said shown bad" : "said shown";
  place.textContent = text;
  clearTimeout(silence);
  silence = setTimeout(() => {
    place.className = "said";
    place.textContent = "";
  }, bad ? 12_000 : 6_000);
}

// -- pieces --------------------------------------------------------------------------------------------------------

export const link = (href, ...text) => h("a", { href }, ...text);
export const path = (...parts) => `#/${parts.map((part) => encodeURIComponent(part)).join("/")}`;
const MADE = /^[a-z]+_[0-9a-f]{26}(\/\d+)?$/;

/** A shortened generated id: their beginnings are alike, their ends differ. */
const brief = (name) => (MADE.test(name) ? `${name.slice(0, 10)}…${name.slice(name.indexOf("_") + 21)}` : name);

const named = (view) => (name, { short = false } = {}) => h("a", { href: path(view, name), class: "id", title: name, "aria-label": short && brief(name) !== name ? name : null }, short ? brief(name) : name);

const SHORT = { short: true };
export const requestLink = named("request");
export const conversationLink = named("conversation");
export const chainLink = named("chain");
export const deliveryLink = named("delivery");
export const shortRequest = (name) => requestLink(name, SHORT);
export const shortConversation = (name) => conversationLink(name, SHORT);
export const shortChain = (name) => chainLink(name, SHORT);
export const shortDelivery = (name) => deliveryLink(name, SHORT);

export const button = (text, onclick, given = {}) => h("button", { type: "button", onclick, ...given }, text);

export function panel(title, { side = [], note = null, key = title, wide = false } = {}, ...children) {
  const id = `panel-${key.replace(/\W+/g, "-").toLowerCase()}`;
  return h(
    "section",
    { class: wide ? "panel wide" : "panel", "aria-labelledby": id, "data-key": `panel ${key}` },
    h("header", h("h2", { id }, title), h("div", { class: "side" }, side)),
    note ? h("p", { class: "note" }, note) : null,
    children,
  );
}

export const empty = (...text) => h("p", { class: "empty" }, ...text);

/** Figures beside each other: `[label, value, {note, href, tone}]`. */
export function figures(list) {
  return h(
    "dl",
    { class: "figures" },
    list.map(([label, value, { note = null, href = null, tone = "" } = {}]) =>
      h(
        "div",
        { class: `figure ${tone}` },
        h("dt", label),
        h("dd", href ? link(href, value) : value, note ? h("small", note) : null),
      ),
    ),
  );
}

/** Names and values. */
export const facts = (list) =>
  h(
    "dl",
    { class: "facts" },
    list.filter(([, value]) => value !== null && value !== undefined && value !== false && value !== "").map(([name, value]) => h("div", h("dt", name), h("dd", value))),
  );

/**
 * A table. `columns` are `[title, cell(row), {right, main, quiet}]`, where `main` heads the row. On a narrow screen
 * each row becomes a card; the roles keep it a table for screen readers.
 */
export function table(caption, columns, rows, key) {
  return h(
    "div",
    { class: "scroll" },
    h(
      "table",
      { role: "table" },
      h("caption", caption),
      h(
        "thead",
        { role: "rowgroup" },
        h("tr", { role: "row" }, columns.map(([title, , { right } = {}]) => h("th", { scope: "col", role: "columnheader", class: right ? "right" : null }, title))),
      ),
      h(
        "tbody",
        { role: "rowgroup" },
        rows.map((row) =>
          h(
            "tr",
            { role: "row", "data-key": key(row) },
            columns.map(([title, cell, { right, main, quiet } = {}]) =>
              main
                ? h("th", { scope: "row", role: "rowheader" }, cell(row))
                : h("td", { role: "cell", "data-title": title, class: [right ? "right" : "", quiet ? "quiet" : ""].join(" ").trim() || null }, cell(row)),
            ),
          ),
        ),
      ),
    ),
  );
}

/** A bar for the used share of a whole. */
export function bar(used, of, label, tone = "") {
  const share = of > 0 ? Math.min(1, used / of) : 0;
  const fill = h("span", { class: `fill ${tone}` });
  fill.style.width = `${(share * 100).toFixed(2)}%`;
  return h("span", { class: "bar", role: "img", "aria-label": label, title: label }, fill);
}

// -- charts --------------------------------------------------------------------------------------------------------

const WIDTH = 600;
const HEIGHT = 120;

/**
 * Stacked series over time: `series` are `{name, tone, values}`, `labels` the times. A table with the same numbers
 * follows, for screen readers and for exact values.
 */
export function chart(title, labels, series, say_value = count, { ends = [] } = {}) {
  const sums = labels.map((_, place) => series.reduce((sum, one) => sum + one.values[place], 0));
  const top = nice(Math.max(...sums, 0));
  const step = WIDTH / Math.max(1, labels.length);
  const base = labels.map(() => 0);
  const shapes = series.map((one) =>
    s("g", { class: `series ${one.tone}` }, one.values.map((value, place) => {
      if (!value) return null;
      const tall = Math.max(1, (value / top) * HEIGHT);
      const y = HEIGHT - (base[place] / top) * HEIGHT - tall;
      base[place] += value;
      return s("rect", { x: (place * step).toFixed(2), y: y.toFixed(2), width: Math.max(0.5, step - (step > 4 ? 1 : 0)).toFixed(2), height: tall.toFixed(2) }, s("title", `${labels[place]}: ${say_value(value)} ${one.name}`));
    })),
  );
  const last = sums.length ? say_value(sums.at(-1)) : "nothing";
  return h(
    "figure",
    { class: "chart" },
    h("div", { class: "plot" },
      h("span", { class: "top", "aria-hidden": "true" }, say_value(top)),
      s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": `${title}: at most ${say_value(Math.max(...sums, 0))}, now ${last}` },
        s("line", { class: "grid", x1: 0, x2: WIDTH, y1: 0.5, y2: 0.5 }), s("line", { class: "grid", x1: 0, x2: WIDTH, y1: HEIGHT / 2, y2: HEIGHT / 2 }), s("line", { class: "grid", x1: 0, x2: WIDTH, y1: HEIGHT - 0.5, y2: HEIGHT - 0.5 }), shapes)),
    h("div", { class: "axis", "aria-hidden": "true" }, ends.map((text) => h("span", text))),
    h("figcaption", h("ul", { class: "legend" }, series.map((one) => h("li", { class: one.tone }, one.name)))),
    h("details", h("summary", "Show as a table"),
      table(title, [["Time", (place) => labels[place], { main: true }], ...series.map((one) => [one.name, (place) => say_value(one.values[place]), { right: true }])],
        labels.map((_, place) => place).filter((place) => sums[place] > 0).reverse().slice(0, 200), (place) => `${place}`)),
  );
}

function nice(most) {
  if (most <= 0) return 1;
  const size = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 2.5, 5, 10].map((step) => step * size).find((step) => step >= most) ?? most;
}

// -- dialogs -------------------------------------------------------------------------------------------------------

/**
 * Ask for confirmation. `fields` are `{name, label, kind, value, options, hint}`. Returns their values, or null.
 */
export function confirm(title, text, act, { fields = [], danger = false } = {}) {
  return new Promise((done) => {
    const inputs = fields.map((field) => {
      const given = { name: field.name, id: `field-${field.name}` };
      const input = field.options
        ? h("select", given, field.options.map(([value, label]) => h("option", { value, selected: value === field.value }, label)))
        : h("input", { ...given, type: field.kind ?? "text", value: field.value ?? "", min: field.min, step: field.step, placeholder: field.hint, autocomplete: "off", required: field.required });
      return h("label", { class: "field", for: given.id }, h("span", field.label), input);
    });
    const go = h("button", { class: danger ? "danger" : "primary", value: "go" }, act);
    const dialog = h(
      "dialog",
      { "aria-labelledby": "dialog-title", "aria-describedby": "dialog-text" },
      h("form", { method: "dialog" },
        h("h2", { id: "dialog-title" }, title),
        h("p", { id: "dialog-text" }, text),
        inputs,
        h("div", { class: "buttons" }, button("Back", () => dialog.close(), { value: "no" }), go)),
    );
    dialog.onclose = () => {
      const values = Object.fromEntries([...dialog.querySelectorAll("input, select")].map((input) => [input.name, input.value]));
      const went = dialog.returnValue === "go";
      dialog.remove();
      done(went ? values : null);
    };
    document.body.append(dialog);
    dialog.showModal();
    (inputs.length ? dialog.querySelector("input, select") : go).focus();
  });
}

/** Show something in a dialog. */
export function tell(title, ...content) {
  const dialog = h("dialog", { "aria-labelledby": "dialog-title" }, h("form", { method: "dialog" }, h("h2", { id: "dialog-title" }, title), content, h("div", { class: "buttons" }, h("button", { class: "primary" }, "Close"))));
  dialog.onclose = () => dialog.remove();
  document.body.append(dialog);
  dialog.showModal();
}

/** A button that loads more of a list. */
export const more = (there, onclick) => (there ? h("p", { class: "more" }, button("Show more", onclick)) : null);

