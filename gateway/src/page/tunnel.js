// One session of rvpn.packets.1: login, welcome, keepalive, coming back with the
// ticket, goodbye. PROTOCOL.md sections 1, 4 and 5.

import { packetsOf, parseAddress, record } from "./packet.js";

const PROTOCOL = "rvpn.packets.1";
const BEARER = "rvpn.bearer.";
/** The most there is: a page in the background is woken once a minute only, and
 *  the gateway waits for two and a half of these. */
const KEEPALIVE_S = 50;
/** A page cannot send pings, so it asks for the counters, which it shows anyway. */
const ASK_MS = 1000;
/** Questions in a row without any answer, after which the connection is lost. */
const UNANSWERED = 15;
const BEGIN_MS = 15_000;
const WAIT_MOST_MS = 30_000;
/** Gateways do not resolve more names at a time. */
const NAMES = 8;
const NAME_MS = 10_000;

const utf8 = new TextEncoder();

/** What keeps a login from being tried again. */
class Final extends Error {}

/** Something to do with the gateway that may pass. */
class Passing extends Error {
  constructor(text, afterMs) {
    super(text);
    this.afterMs = afterMs;
  }
}

/**
 * Tells its owner, by `on`, about `state(state, words)`, `packet(bytes)`,
 * `moved(bytesRead, bytesWritten)` and `stats(outbound, inbound)`.
 * States: off, connecting, on, waiting, failed.
 */
export class Tunnel {
  #on;
  #token = null;
  #socket = null;
  #ticket = null;
  #instance = `page-${hex(8)}`;
  #welcome = null;
  #goodbye = null;
  #tries = 0;
  #unanswered = 0;
  #timers = { ask: 0, begin: 0, again: 0 };
  #names = new Map();
  #lastName = 0;
  #read = 0;
  #written = 0;

  constructor(on) {
    this.#on = on;
  }

  /** The addresses inside, once there are any. */
  get welcome() {
    return this.#welcome;
  }

  /** Begins, and goes on until it is told to end or that it may not. */
  async begin(token) {
    this.end();
    // It goes into headers, where other letters would be something else.
    if (!/^[A-Za-z0-9._-]{1,4096}$/.test(token)) {
      this.#state("failed", "This is not a token: it has letters no token has.");
      return;
    }
    this.#token = token;
    this.#ticket = null;
    this.#tries = 0;
    this.#moved(-this.#read, -this.#written);
    await this.#knock();
  }

  /** Ends for good. The gateway takes the lease back at once. */
  end() {
    if (this.#token === null) return;
    this.#stopTimers();
    this.#token = null;
    this.#part("");
    this.#letGo()?.close(1000);
    this.#state("off", "Not connected.");
  }

  /** The line is back: no need to wait any longer. */
  hurry() {
    if (this.#token !== null && !this.#socket && this.#timers.again) this.#open();
  }

  /** Sends a packet; false if there is no way to. */
  send(packet) {
    if (!this.#welcome) return false;
    this.#put(record(packet));
    return true;
  }

  /** The addresses of a name, looked up where the packets leave. */
  resolve(name) {
    return new Promise((resolve, reject) => {
      if (!this.#welcome) return reject(new Error("There is no connection."));
      if (this.#names.size >= NAMES) return reject(new Error("Too many names at a time."));
      this.#lastName += 1;
      const id = this.#lastName;
      const settle = (result) => {
        clearTimeout(timer);
        this.#names.delete(id);
        if (result instanceof Error) reject(result);
        else resolve(result);
      };
      const timer = setTimeout(() => settle(new Error("The gateway does not answer.")), NAME_MS);
      this.#names.set(id, settle);
      this.#put(JSON.stringify({ kind: "resolve", id, name }));
    });
  }

  #state(state, words) {
    this.#on.state(state, words);
  }

  #moved(read, written) {
    this.#read += read;
    this.#written += written;
    this.#on.moved(this.#read, this.#written);
  }

  /** Asks first whether the token is accepted: of a WebSocket that does not
   *  open, a browser does not tell the reason. */
  async #knock() {
    const token = this.#token;
    this.#state("connecting", "Connecting …");
    try {
      await check(token);
    } catch (trouble) {
      if (this.#token !== token) return;
      if (trouble instanceof Final) this.#fail(trouble.message);
      else this.#again(trouble.message, trouble.afterMs);
      return;
    }
    if (this.#token === token && !this.#socket) this.#open();
  }

  #open() {
    this.#stopTimers();
    this.#goodbye = null;
    this.#unanswered = 0;
    this.#state("connecting", "Connecting …");
    // Beside this page, whatever a proxy in front calls the place.
    const url = new URL("v1/packets", location.href);
    url.protocol = url.protocol === "http:" ? "ws:" : "wss:";
    const socket = new WebSocket(url, [PROTOCOL, BEARER + this.#token]);
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    const mine = (act) => (event) => {
      if (this.#socket === socket) act(event);
    };
    socket.onopen = mine(() => this.#hello());
    socket.onmessage = mine((event) => this.#message(event.data));
    socket.onclose = mine((event) => this.#closed(event));
    this.#timers.begin = setTimeout(mine(() => this.#lost("The gateway does not answer.")), BEGIN_MS);
  }

  #hello() {
    const hello = {
      kind: "hello",
      versions: [1],
      name: "rvpn page",
      instance: this.#instance,
      capabilities: [],
      keepalive_s: KEEPALIVE_S,
    };
    if (this.#ticket !== null) hello.ticket = this.#ticket;
    this.#put(JSON.stringify(hello));
  }

  #put(message) {
    this.#socket.send(message);
    const bytes = typeof message === "string" ? utf8.encode(message) : message;
    this.#moved(0, bytes.length);
  }

  #message(data) {
    this.#unanswered = 0;
    const text = typeof data === "string";
    this.#moved(text ? utf8.encode(data).length : data.byteLength, 0);
    let read;
    try {
      read = text ? JSON.parse(data) : packetsOf(data);
    } catch (trouble) {
      this.#refuse(trouble.message);
      return;
    }
    if (text) this.#control(read);
    else read.forEach((packet) => this.#on.packet(packet));
  }

  #control(message) {
    switch (message.kind) {
      case "welcome":
        this.#begun(message);
        break;
      case "ticket":
        this.#ticket = String(message.ticket);
        break;
      case "stats":
        if (message.outbound && message.inbound) {
          this.#on.stats(message.outbound, message.inbound);
        }
        break;
      case "resolved":
        this.#names.get(message.id)?.(resolved(message));
        break;
      case "goodbye":
        this.#goodbye = message;
        break;
      default:
        // Quotas and notices are for programs; kinds to come are for pages to come.
        break;
    }
  }

  #begun(welcome) {
    if (this.#welcome) return;
    const v4 = parseAddress(String(welcome.v4?.address));
    const v6 = welcome.v6 ? parseAddress(String(welcome.v6.address)) : null;
    const keepalive = Number(welcome.keepalive_s);
    const fits =
      welcome.version === 1 &&
      v4?.length === 4 &&
      (v6 === null || v6.length === 16) &&
      keepalive >= 1 &&
      keepalive <= KEEPALIVE_S;
    if (!fits) {
      this.#refuse("its welcome is not acceptable");
      return;
    }
    this.#welcome = { v4, v6 };
    this.#ticket = welcome.ticket ? String(welcome.ticket.ticket) : null;
    this.#tries = 0;
    clearTimeout(this.#timers.begin);
    const ask = () => this.#ask();
    // Never more seldom than the gateway was promised.
    this.#timers.ask = setInterval(ask, Math.min(ASK_MS, keepalive * 1000));
    this.#state("on", welcome.resumed ? "Connected again." : "Connected.");
    ask();
  }

  #ask() {
    this.#unanswered += 1;
    if (this.#unanswered > UNANSWERED) {
      this.#lost("The gateway has fallen silent.");
      return;
    }
    this.#put(JSON.stringify({ kind: "stats" }));
  }

  #closed({ code, reason }) {
    const begun = this.#welcome !== null;
    const goodbye = this.#goodbye;
    this.#letGo();
    const words = String(goodbye?.text || reason || "");
    const because = words ? `: ${words}` : "";
    const retryMs = Number(goodbye?.retry_after_ms);
    const returns = [1001, 1005, 1006, 1011, 1012, 1013];
    if (goodbye && !Number.isFinite(retryMs)) {
      this.#fail(`The gateway ended the session${because}.`);
    } else if (goodbye) {
      this.#again(`The gateway asks to come back later${because}.`, retryMs);
    } else if (!returns.includes(code)) {
      this.#fail(`The gateway closed the connection (${code}${because}).`);
    } else if (begun) {
      this.#again("The connection was lost.");
    } else {
      // Perhaps the token was taken back in the meantime; the next knock tells.
      this.#again("The gateway cannot be reached.");
    }
  }

  /** Gives up a connection nothing comes from. */
  #lost(words) {
    const socket = this.#letGo();
    socket?.close();
    this.#again(words);
  }

  #fail(words) {
    this.#stopTimers();
    this.#letGo()?.close();
    this.#token = null;
    this.#state("failed", words);
  }

  /** Tries again: at once, then after a second and longer each time. */
  #again(words, afterMs) {
    this.#stopTimers();
    const grown = this.#tries === 0 ? 0 : Math.min(500 * 2 ** this.#tries, WAIT_MOST_MS);
    const wait = afterMs ?? grown * (0.75 + Math.random() / 2);
    this.#tries += 1;
    const known = this.#tries === 1;
    const seconds = Math.ceil(wait / 1000);
    this.#state("waiting", seconds ? `${words} Trying again in ${seconds} s.` : words);
    this.#timers.again = setTimeout(() => (known ? this.#open() : this.#knock()), wait);
  }

  /** What came is not what the protocol says. */
  #refuse(why) {
    this.#part("what came could not be read");
    this.#fail(`The gateway does not speak this page's protocol: ${why}.`);
  }

  #part(text) {
    if (this.#socket?.readyState === WebSocket.OPEN) {
      this.#put(JSON.stringify({ kind: "goodbye", code: 1000, text }));
    }
  }

  /** Takes the socket out of use and returns it. */
  #letGo() {
    const socket = this.#socket;
    this.#socket = null;
    this.#welcome = null;
    clearInterval(this.#timers.ask);
    clearTimeout(this.#timers.begin);
    for (const settle of [...this.#names.values()]) settle(new Error("The connection was lost."));
    return socket;
  }

  #stopTimers() {
    clearInterval(this.#timers.ask);
    clearTimeout(this.#timers.begin);
    clearTimeout(this.#timers.again);
    this.#timers.again = 0;
  }
}

/** Random hexadecimal digits, two for each of so many bytes. */
function hex(bytes) {
  const random = crypto.getRandomValues(new Uint8Array(bytes));
  return Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function resolved(message) {
  const addresses = (message.addresses ?? []).map((text) => parseAddress(String(text)));
  const found = addresses.filter((address) => address !== null);
  if (found.length > 0) return found;
  return new Error(String(message.error ?? "the name does not resolve"));
}

/** Returns if the gateway would let this token in now. */
export async function check(token) {
  let answer;
  try {
    answer = await fetch("v1/check", {
      headers: { Authorization: `Bearer ${token}` },
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
      signal: AbortSignal.timeout(BEGIN_MS),
    });
  } catch {
    throw new Passing("The gateway cannot be reached.");
  }
  if (answer.ok) return;
  const seconds = Number(answer.headers.get("retry-after") ?? NaN);
  const later = Number.isFinite(seconds) ? seconds * 1000 : undefined;
  switch (answer.status) {
    case 401:
    case 403:
      throw new Final("The gateway does not accept this token: it is wrong, expired or revoked.");
    case 429:
      throw new Passing("Too many failed logins or connections.", later);
    case 502:
    case 503:
    case 504:
      throw new Passing("The gateway is not ready.", later);
    default:
      throw new Final(`The gateway refuses this page (${answer.status}).`);
  }
}
