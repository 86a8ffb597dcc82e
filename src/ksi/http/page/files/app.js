// The frame of the page: routing, refreshing, the navigation, and the state of the connection.

import { afterwards } from "./acts.js";
import { badges, when_badges_change } from "./badges.js";
import { ask, Away, follow, Refused, signedIn, signIn, whenSignedOut } from "./api.js";
import { h, morph } from "./dom.js";
import { say, tell } from "./ui.js";
import * as approvals from "./views/approvals.js";
import * as budgets from "./views/budgets.js";
import * as chains from "./views/chains.js";
import * as conversations from "./views/conversations.js";
import * as deliveries from "./views/deliveries.js";
import * as entrance from "./views/entrance.js";
import * as overview from "./views/overview.js";
import * as providers from "./views/providers.js";
import * as requests from "./views/requests.js";
import * as search from "./views/search.js";
import * as settings from "./views/settings.js";
import * as spend from "./views/spend.js";
import { clock, compact, tick } from "./words.js";

const VIEWS = {
  "": overview.overview,
  requests: requests.list,
  request: requests.one,
  conversations: conversations.list,
  conversation: conversations.one,
  chains: chains.list,
  chain: chains.one,
  providers: providers.list,
  spend: spend.spend,
  budgets: budgets.list,
  approvals: approvals.list,
  deliveries: deliveries.list,
  delivery: deliveries.one,
  search: search.results,
  settings: settings.settings,
};

/** The navigation: path, label, key, and the event that the daemon must have. */
const NAVIGATION = [
  ["", "Overview", "o"],
  ["requests", "Requests", "r"],
  ["conversations", "Conversations", "c"],
  ["chains", "Chains", "h"],
  ["approvals", "Approvals", "a", approvals.NEEDS],
  ["deliveries", "Deliveries", "d"],
  ["providers", "Providers", "p"],
  ["spend", "Spend", "s"],
  ["budgets", "Budgets", "b", budgets.NEEDS],
  ["settings", "Settings", "e"],
];
const UNDER = { request: "requests", conversation: "conversations", chain: "chains", delivery: "deliveries" };

/** Without the moves of locks: there are several for each request, and the end of the request tells the same. */
const WATCHED = ["completion:result", "completion:progress", "completion:appro*", "completion:rejected", "completion:loop", "conversation:queued", "conversation:forked", "conversation:lock_expired", "conversation:renamed", "conversation:deleted", "provider:*", "queue:*", "injection:*", "budget:*"];
const REST = 4; // after a refresh, a view rests for so many times as long as it took

const main = document.getElementById("main");
let known = new Set(); // the events that this daemon has
let shown = null; // the view that is shown: its spec, arguments, state, and what is under way
let lost = false;

// -- where one is --------------------------------------------------------------------------------------------------

function place() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, ...rest] = path.split("/").map(decoded);
  return { name, rest, query: new URLSearchParams(query) };
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // somebody typed it
  }
}

function open() {
  const { name, rest, query } = place();
  const view = Object.hasOwn(VIEWS, name) ? VIEWS[name] : null;
  shown?.leaving.abort();
  shown = { name, view, args: { rest, query, known, signal: null, again: () => look() }, leaving: new AbortController(), running: false, again: false, next: 0, timer: 0, first: true };
  shown.args.signal = shown.leaving.signal;
  shown.args.state = {};
  draw_navigation(UNDER[name] ?? name);
  document.title = `${view ? view.title(shown.args) : "Not found"} · KSI`;
  if (view === null) {
    main.replaceChildren(h("h1", { tabindex: "-1" }, "Not found"), h("p", "There is no such view. ", h("a", { href: "#/" }, "To the overview")));
    return;
  }
  main.replaceChildren(h("h1", { tabindex: "-1" }, view.title(shown.args)), h("p", { class: "loading" }, "Loading…"));
  scrollTo(0, 0);
  look();
}

/** Refresh the view. Requests for a refresh that arrive meanwhile are combined into one. */
async function look() {
  const mine = shown;
  if (!mine?.view) return;
  if (mine.running) {
    mine.again = true;
    return;
  }
  mine.running = true;
  clearTimeout(mine.timer);
  const begun = performance.now();
  try {
    const data = await mine.view.load(mine.args);
    if (mine !== shown) return;
    const wanted = h("div", h("h1", { tabindex: "-1" }, mine.view.title(mine.args)), mine.view.render(data, mine.args));
    morph(main, wanted);
    if (mine.first) {
      mine.first = false;
      announce_view(mine);
    }
    set_lost(false);
  } catch (error) {
    if (mine !== shown || error.name === "AbortError") return;
    if (error instanceof Away) set_lost(true);
    else if (error instanceof Refused && error.status !== 401) show_refusal(error);
    else if (!(error instanceof Refused)) throw error;
  } finally {
    mine.running = false;
    mine.next = performance.now() + Math.max(900, REST * (performance.now() - begun));
  }
  if (mine !== shown) return;
  if (mine.again) later(mine);
  else mine.timer = setTimeout(later, (mine.view.every ?? 10) * 1000, mine);
}

/** Refresh as soon as the rest is over. */
function later(mine) {
  mine.again = false;
  clearTimeout(mine.timer);
  if (document.hidden) return;
  mine.timer = setTimeout(() => mine === shown && look(), Math.max(0, mine.next - performance.now()));
}

function announce_view(mine) {
  document.title = `${mine.view.title(mine.args)} · KSI`;
}

function show_refusal(error) {
  const words = error.code === "not_found" ? "Not found. It may have been deleted, or removed after its retention time." : `The daemon refused: ${error.message}`;
  morph(main, h("div", h("h1", { tabindex: "-1" }, shown.view.title(shown.args)), h("p", { class: "notice bad" }, words), h("p", h("a", { href: "#/" }, "To the overview"))));
}

// -- above all views -----------------------------------------------------------------------------------------------

function draw_navigation(current) {
  const list = h("ul", NAVIGATION.filter(([, , , needs]) => !needs || known.has(needs)).map(([path, words, key]) => {
    const number = badges.get(path);
    return h("li", { "data-key": `nav ${path}` }, h("a", { href: `#/${path}`, "aria-current": path === current ? "page" : null, title: `${words} (g ${key})` },
      words, number ? h("span", { class: `badge ${number.tone ?? ""}` }, h("span", { class: "aloud" }, `${number.what}: `), compact(number.count)) : null));
  }));
  morph(document.getElementById("views"), h("nav", list));
}

when_badges_change(() => draw_navigation(UNDER[place().name] ?? place().name));

let lost_since = 0;

function set_lost(is) {
  if (is === lost) return;
  lost = is;
  document.body.classList.toggle("lost", is);
  if (is) lost_since = Date.now() / 1000;
  const link = document.getElementById("link");
  link.className = is ? "link lost" : "link live";
  link.textContent = is ? `Disconnected since ${clock(lost_since)}, reconnecting…` : "Live";
  if (!is && lost_since) look();
}

function link_state(state) {
  const link = document.getElementById("link");
  if (state === "live") {
    set_lost(false);
    link.className = "link live";
    link.textContent = "Live";
  } else if (state === "lost") set_lost(true);
}

function changed(events) {
  if (!shown?.view) return;
  const mine = shown;
  if (events !== null && mine.view.on && !Object.keys(events).some((name) => mine.view.on.test(name))) return;
  if (mine.running) mine.again = true;
  else later(mine);
}

// -- keys ----------------------------------------------------------------------------------------------------------

let after_g = false;

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const typing = event.target.closest("input, textarea, select");
  if (event.key === "Escape" && typing) typing.blur();
  if (typing) return;
  if (after_g) {
    after_g = false;
    const to = NAVIGATION.find(([, , key]) => key === event.key);
    if (to) location.hash = `#/${to[0]}`;
  } else if (event.key === "g") {
    after_g = true;
    setTimeout(() => { after_g = false; }, 1500);
  } else if (event.key === "/") {
    event.preventDefault();
    document.getElementById("query").select();
  } else if (event.key === "?") {
    show_keys();
  }
});

function show_keys() {
  const keys = [["/", "search"], ...NAVIGATION.filter(([, , , needs]) => !needs || known.has(needs)).map(([, words, key]) => [`g ${key}`, words.toLowerCase()]), ["?", "this list"]];
  tell("Keys", h("dl", { class: "keys" }, keys.map(([key, what]) => h("div", h("dt", h("kbd", key)), h("dd", what)))));
}

document.getElementById("find").onsubmit = (event) => {
  event.preventDefault();
  const text = document.getElementById("query").value.trim();
  if (text) location.hash = `#/search?q=${encodeURIComponent(text)}`;
};
document.getElementById("skip").onclick = () => main.focus();

// -- the beginning -------------------------------------------------------------------------------------------------

function leave(words) {
  shown?.leaving.abort();
  shown = null;
  document.body.classList.add("outside");
  main.replaceChildren(...entrance.entrance(words, begin));
}

async function begin() {
  document.body.classList.remove("outside");
  whenSignedOut(() => leave("This session has ended: it expired, or its token was revoked."));
  try {
    known = new Set((await ask("system:discover", { schemas: false })).events.map((event) => event.name));
  } catch (error) {
    if (error instanceof Refused && error.status === 401) return;
    if (!(error instanceof Away)) throw error;
    set_lost(true);
    setTimeout(begin, 2000);
    main.replaceChildren(h("h1", "The daemon is not running"), h("p", "Start it with `ksi start`; this page then connects by itself."));
    return;
  }
  afterwards(() => {
    // What an action changed is not answered from what was asked before it.
    for (const one of Object.values(shown?.args.state ?? {})) if (one?.until) one.until = 0;
    look();
  });
  open();
  window.onhashchange = () => {
    open();
    // A screen reader says where one is now.
    main.querySelector("h1").focus({ preventScroll: true });
  };
  follow(WATCHED, changed, link_state);
}

setInterval(() => document.hidden || tick(), 1000);

/** Exchange the one-time code after the #, where no server and no log sees it, and remove it from the address. */
async function arrive() {
  const given = /^#code=([\w-]+)(.*)$/.exec(location.hash);
  if (given) {
    history.replaceState(null, "", `/${given[2] ? `#${given[2]}` : ""}`);
    try {
      await signIn(given[1]);
    } catch (error) {
      if (!signedIn()) return leave(error.message);
      say(error.message, true);
    }
  }
  if (!signedIn()) return leave(null);
  return begin();
}

arrive();
