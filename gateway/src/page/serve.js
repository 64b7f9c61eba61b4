// A page that serves: one session of rvpn.streams.1, and the section that
// offers texts and files of this tab under a name.

import { answer } from "./answer.js";
import { Mux } from "./mux.js";
import { check } from "./tunnel.js";

const PROTOCOL = "rvpn.streams.1";
const BEARER = "rvpn.bearer.";
/** A page in the background is woken once a minute only. */
const KEEPALIVE_S = 50;
const PING_MS = 20_000;
const BEGIN_MS = 15_000;
const WAIT_MOST_MS = 30_000;
/** Bytes that may wait in the socket before streams wait too. */
const BUFFERED = 1024 * 1024;
const OPENING_MOST = 1024;
const ACCEPTED = Uint8Array.of(0);
const REFUSED = Uint8Array.of(1);

const utf8 = new TextDecoder();

function random() {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * Serves HTTP under a name from this page. Tells its owner, by `on`, about
 * `state(state, words)`, `served(urls)` and `visitor(peer, open)`; `handle`
 * answers requests, see answer.js. States: off, connecting, on, waiting, failed.
 */
export class Server {
  #on;
  #handle;
  #instance = `page-${random()}`;
  #wish = null;
  #socket = null;
  #mux = null;
  #goodbye = null;
  #tries = 0;
  #timers = { begin: 0, ping: 0, again: 0 };

  constructor(on, handle) {
    this.#on = on;
    this.#handle = handle;
  }

  /** Begins, and goes on until it is told to end or that it may not. */
  async begin(token, name) {
    this.end();
    if (!/^[A-Za-z0-9._-]{1,4096}$/.test(token)) {
      this.#on.state("failed", "This is not a token: it has letters no token has.");
      return;
    }
    const wish = { token, name };
    this.#wish = wish;
    this.#tries = 0;
    this.#on.state("connecting", "Connecting …");
    try {
      await check(token);
    } catch (trouble) {
      if (this.#wish === wish) this.#fail(trouble.message);
      return;
    }
    if (this.#wish === wish) this.#open();
  }

  /** Ends for good; the name is free at once. */
  end() {
    if (this.#wish === null) return;
    this.#wish = null;
    clearTimeout(this.#timers.again);
    const socket = this.#letGo();
    if (socket?.readyState === WebSocket.OPEN) {
      socket.send(JSON.stringify({ kind: "goodbye", code: 1000, text: "" }));
    }
    socket?.close(1000);
    this.#on.state("off", "Not serving.");
  }

  #open() {
    this.#goodbye = null;
    const url = new URL("v1/packets", location.href);
    url.protocol = url.protocol === "http:" ? "ws:" : "wss:";
    const socket = new WebSocket(url, [PROTOCOL, BEARER + this.#wish.token]);
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    const mine = (act) => (event) => {
      if (this.#socket === socket) act(event);
    };
    const room = async () => {
      while (this.#socket === socket && socket.bufferedAmount > BUFFERED) {
        await new Promise((wake) => setTimeout(wake, 5));
      }
    };
    const send = (bytes) => {
      if (this.#socket === socket) socket.send(bytes);
    };
    this.#mux = new Mux(send, room, (stream) => this.#visited(stream));
    socket.onopen = mine(() => {
      const hello = {
        kind: "hello", versions: [1], name: "rvpn page", instance: this.#instance,
        keepalive_s: KEEPALIVE_S,
      };
      socket.send(JSON.stringify(hello));
    });
    socket.onmessage = mine((event) => this.#message(event.data));
    socket.onclose = mine((event) => this.#closed(event));
    this.#timers.begin = setTimeout(mine(() => this.#lost("The gateway does not answer.")), BEGIN_MS);
  }

  #message(data) {
    try {
      if (typeof data === "string") this.#control(JSON.parse(data));
      else this.#mux.receive(new Uint8Array(data));
    } catch (trouble) {
      this.#fail(`The gateway does not speak this page's protocol: ${trouble.message}.`);
    }
  }

  #control(message) {
    switch (message.kind) {
      case "welcome": {
        const serve = { kind: "serve", id: 1, service: "http" };
        if (this.#wish.name) serve.name = this.#wish.name;
        this.#socket.send(JSON.stringify(serve));
        this.#timers.ping = setInterval(() => this.#mux.ping(), PING_MS);
        break;
      }
      case "serving":
        clearTimeout(this.#timers.begin);
        this.#tries = 0;
        this.#on.state("on", "Serving.");
        this.#on.served((message.at?.urls ?? []).map(String));
        break;
      case "refused":
        this.#fail(`${message.text}: ${message.remedy}`);
        break;
      case "goodbye":
        this.#goodbye = message;
        break;
      default:
        break;
    }
  }

  /** Reads what a stream is for, and answers it. */
  async #visited(stream) {
    const mux = this.#mux;
    try {
      let held = new Uint8Array();
      const need = async (n) => {
        while (held.length < n) {
          const more = await stream.read();
          if (more === null) throw new Error("no description");
          const both = new Uint8Array(held.length + more.length);
          both.set(held);
          both.set(more, held.length);
          held = both;
        }
      };
      await need(2);
      const length = held[0] * 256 + held[1];
      if (length === 0 || length > OPENING_MOST) throw new Error("no description");
      await need(2 + length);
      const visit = JSON.parse(utf8.decode(held.subarray(2, 2 + length)));
      if (visit.kind !== "visit" || visit.offer !== 1 || visit.service !== "http") {
        await stream.write(REFUSED);
        stream.finish();
        return;
      }
      await stream.write(ACCEPTED);
      this.#on.visitor(String(visit.peer), mux.open);
      const rest = held.subarray(2 + length);
      const source = {
        first: rest.length > 0 ? rest : undefined,
        async read() {
          const { first } = this;
          this.first = undefined;
          return first ?? stream.read();
        },
        write: (bytes) => stream.write(bytes),
        finish: () => stream.finish(),
        reset: () => stream.reset(),
      };
      await answer(source, this.#handle);
    } catch {
      stream.reset();
    }
  }

  #closed({ code, reason }) {
    const goodbye = this.#goodbye;
    this.#letGo();
    const words = String(goodbye?.text || reason || "");
    const because = words ? `: ${words}` : "";
    const retryMs = Number(goodbye?.retry_after_ms);
    if (goodbye && !Number.isFinite(retryMs)) this.#fail(`The gateway ended it${because}.`);
    else if (goodbye) this.#again(`The gateway asks to come back later${because}.`, retryMs);
    else if ([1002, 1008, 1009].includes(code)) this.#fail(`The gateway closed (${code}${because}).`);
    else this.#again("The connection was lost.");
  }

  #lost(words) {
    this.#letGo()?.close();
    this.#again(words);
  }

  #fail(words) {
    this.#wish = null;
    clearTimeout(this.#timers.again);
    this.#letGo()?.close();
    this.#on.state("failed", words);
  }

  #again(words, afterMs) {
    const grown = this.#tries === 0 ? 0 : Math.min(500 * 2 ** this.#tries, WAIT_MOST_MS);
    this.#tries += 1;
    this.#on.state("waiting", words);
    const wait = afterMs ?? grown * (0.75 + Math.random() / 2);
    this.#timers.again = setTimeout(() => this.#wish && this.#open(), wait);
  }

  #letGo() {
    const socket = this.#socket;
    this.#socket = null;
    this.#mux?.end();
    clearTimeout(this.#timers.begin);
    clearInterval(this.#timers.ping);
    return socket;
  }
}

/** Brings the section to life. `token` gives the one that was entered. */
export function begin(the, token) {
  let visitors = 0;
  let requests = 0;
  let files = new Map();

  const page = () => ({
    headers: { "content-type": "text/plain; charset=utf-8", "x-content-type-options": "nosniff" },
    body: the("serve-text").value,
  });
  const handle = ({ method, target }) => {
    requests += 1;
    the("serve-requests").textContent = String(requests);
    if (method !== "GET" && method !== "HEAD") {
      return { status: 405, headers: { allow: "GET, HEAD" }, body: "only to be read\n" };
    }
    let path;
    try {
      path = decodeURIComponent(target.split("?")[0].slice(1));
    } catch {
      return { status: 400, body: "bad path\n" };
    }
    if (path === "") return page();
    const file = files.get(path);
    if (!file) return { status: 404, body: "not found\n" };
    return {
      headers: {
        "content-type": file.type || "application/octet-stream",
        "x-content-type-options": "nosniff",
      },
      body: file,
    };
  };
  const server = new Server(
    {
      state(state, words) {
        the("serve-status").dataset.state = state;
        the("serve-status").textContent = words;
        const wanted = ["connecting", "on", "waiting"].includes(state);
        the("serve-begin").disabled = wanted;
        the("serve-end").disabled = !wanted;
        if (!wanted) the("serve-url").textContent = "–";
      },
      served(urls) {
        the("serve-url").textContent = urls.join(" ");
      },
      visitor(peer) {
        visitors += 1;
        the("serve-visitors").textContent = String(visitors);
        the("serve-last").textContent = peer;
      },
    },
    handle,
  );
  the("serve").addEventListener("submit", (event) => {
    event.preventDefault();
    const presented = token();
    if (presented === "") {
      the("serve-status").textContent = "Enter a token above first.";
      return;
    }
    [visitors, requests] = [0, 0];
    files = new Map([...the("serve-files").files].map((file) => [file.name, file]));
    server.begin(presented, the("serve-name").value.trim());
  });
  the("serve-end").addEventListener("click", () => server.end());
  window.addEventListener("pagehide", () => server.end());
}
