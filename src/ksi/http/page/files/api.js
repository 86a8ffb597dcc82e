// Access to the daemon: the session, events with their replies, and the stream of changes.

const KEPT = "ksi.session";
const AT_ONCE = 4; // a browser has six connections for one server; one of them is the stream
const SILENT = 40_000; // milliseconds after which a stream that says nothing is taken for dead

export class Refused extends Error {
  constructor(code, message, status, details) {
    super(message);
    this.code = code;
    this.status = status;
    this.details = details ?? {};
  }
}

/** The daemon could not be reached. */
export class Away extends Error {}

// -- the session ---------------------------------------------------------------------------------------------------

let kept = localStorage.getItem(KEPT);

export const signedIn = () => kept !== null;

export function signOut() {
  kept = null;
  localStorage.removeItem(KEPT);
}

// A session that another tab got, or gave up, is this one's too.
window.addEventListener("storage", (event) => {
  if (event.key === KEPT) location.reload();
});

async function post(path, body, token, signal) {
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  let answer, reply;
  try {
    answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal, cache: "no-store" });
    reply = await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Away("the daemon does not answer");
  }
  if (answer.ok) return reply;
  const { code, message, details } = reply.error;
  throw new Refused(code, message, answer.status, details);
}

/** Exchange a one-time code for a session. */
export async function signIn(code) {
  const { session } = await post("/page/sessions", { code });
  kept = session;
  localStorage.setItem(KEPT, session);
}

/** Exchange a token for a session. The token itself is not stored. */
export async function signInWith(token) {
  const { code } = await post("/page/codes", {}, token);
  await signIn(code);
}

// -- events --------------------------------------------------------------------------------------------------------

let running = 0;
const waiting = [];
let ahead = 0; // milliseconds that the daemon's clock is ahead of the browser's

/** Unix seconds by the daemon's clock. */
export const now = () => (Date.now() + ahead) / 1000;

let onLost = () => {};

/** Register a callback for a session that is no longer valid. */
export function whenSignedOut(call) {
  onLost = call;
}

/** Send an event; returns its reply's data. */
export async function ask(event, data = {}, signal = undefined) {
  if (running >= AT_ONCE) await new Promise((go) => waiting.push(go));
  else running += 1;
  try {
    const reply = await post("/v1/events", { event, data }, kept, signal);
    ahead = reply.timestamp * 1000 - Date.now();
    return reply.data;
  } catch (error) {
    if (error.status === 401) onLost();
    throw error;
  } finally {
    const next = waiting.shift();
    if (next) next();
    else running -= 1;
  }
}

// -- streams -------------------------------------------------------------------------------------------------------

/** Yields the data of server-sent events, and null for each piece of the stream as a sign of life. */
export async function* events(path, signal) {
  let answer;
  try {
    answer = await fetch(path, { headers: { Authorization: `Bearer ${kept}` }, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Away("the daemon does not answer");
  }
  if (!answer.ok) {
    if (answer.status === 401) onLost();
    throw new Refused("refused", `the daemon answered ${answer.status}`, answer.status);
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let rest = ""; ; ) {
      const { value, done } = await silenceEnds(reader.read());
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      yield null;
      for (const line of lines) if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Away("the stream broke");
  } finally {
    reader.cancel().catch(() => {}); // it may be broken already
  }
}

function silenceEnds(reading) {
  let timer;
  const silence = new Promise((_, fail) => {
    timer = setTimeout(() => fail(new Away("the stream is silent")), SILENT);
  });
  return Promise.race([reading, silence]).finally(() => clearTimeout(timer));
}

/**
 * Follow changes while the page is visible: a hidden page costs the daemon nothing. `changed` gets the number of events
 * by name, or null after a break, when anything may have changed. `state` gets "live" or "lost".
 *
 * A browser has six connections for a server, over all of its tabs. So one tab reads the stream and tells the others;
 * when it is hidden or closed, the next one takes over.
 */
export function follow(patterns, changed, state) {
  const path = `/v1/events?every=1&pattern=${patterns.map(encodeURIComponent).join(",")}`;
  // Browsers have locks on this machine and by TLS. Elsewhere each tab reads a stream of its own.
  if (!navigator.locks) return read_while_visible(path, changed, state);
  const others = new BroadcastChannel("ksi.changes");
  let reading = false;
  let current = null;
  const tell = (news) => {
    if ("state" in news) state((current = news.state));
    else changed(news.events);
  };
  const spread = (news) => {
    tell(news);
    others.postMessage(news);
  };
  others.onmessage = ({ data }) => {
    if (data.asked && reading && current) others.postMessage({ state: current });
    else if (!data.asked && !reading && !document.hidden) tell(data);
  };
  others.postMessage({ asked: true });
  return (async () => {
    for (let over = false; !over; ) {
      await visible();
      changed(null); // whatever it missed while it was hidden
      const hidden = new AbortController();
      const hide = () => document.hidden && hidden.abort();
      document.addEventListener("visibilitychange", hide);
      try {
        await navigator.locks.request("ksi.stream", { signal: hidden.signal }, async () => {
          reading = true;
          over = await read_while_visible(path, (events) => spread({ events }), (now) => spread({ state: now }), false);
        });
      } catch (error) {
        if (error.name !== "AbortError") throw error;
      } finally {
        reading = false;
        document.removeEventListener("visibilitychange", hide);
      }
    }
    others.close();
  })();
}

async function visible() {
  while (document.hidden) await once(document, "visibilitychange");
}

/** Read the stream, again after each break. A hidden page pauses it, or ends it unless `forever`. True if the session ended. */
async function read_while_visible(path, changed, state, forever = true) {
  for (let wait = 500; ; ) {
    if (document.hidden && !forever) return false;
    await visible();
    const leaving = new AbortController();
    const hide = () => document.hidden && leaving.abort();
    document.addEventListener("visibilitychange", hide);
    try {
      let begun = false;
      for await (const event of events(path, leaving.signal)) {
        if (!begun) {
          begun = true;
          wait = 500;
          state("live");
          changed(null);
        }
        if (event !== null) changed(event.data.events);
      }
      state("lost");
    } catch (error) {
      if (error.name === "AbortError") continue;
      if (error.status === 401) return true;
      state("lost");
    } finally {
      document.removeEventListener("visibilitychange", hide);
    }
    await new Promise((go) => setTimeout(go, wait * (0.75 + Math.random() / 2)));
    wait = Math.min(wait * 2, 8_000);
  }
}

const once = (target, name) => new Promise((go) => target.addEventListener(name, go, { once: true }));
