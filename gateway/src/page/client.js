// The page itself: what its fields say, and what it shows. Whatever comes from
// the gateway or from a network is only ever put in as text.

import { begin as beginDemo } from "./demo.js";
import { echoRequest, parseAddress, readAnswer, showAddress } from "./packet.js";
import { begin as beginServe } from "./serve.js";
import { Tunnel } from "./tunnel.js";

/** Bytes in an echo beside its header, as ping sends them. */
const ECHO_DATA = 56;
const ECHO_MS = 5000;
/** Lines that are kept. */
const LINES = 200;

const the = (id) => document.getElementById(id);

/** The run of echoes that goes on, if one does. */
let run = null;
/** Numbers runs, so that a late answer is not taken for one of the next. */
let lastId = crypto.getRandomValues(new Uint16Array(1))[0];
/** In memory and nowhere else. */
let token = "";

const tunnel = new Tunnel({
  state(state, words) {
    const status = the("status");
    status.dataset.state = state;
    status.textContent = words;
    const wanted = ["connecting", "on", "waiting"].includes(state);
    the("token").disabled = wanted;
    the("connect").disabled = wanted;
    the("disconnect").disabled = !wanted;
    the("go").disabled = state !== "on" || run !== null;
    the("inside").hidden = state !== "on";
    if (state === "on") {
      const { v4, v6 } = tunnel.welcome;
      the("own4").textContent = showAddress(v4);
      the("own6").textContent = v6 ? showAddress(v6) : "none";
    }
    if (!wanted) {
      token = "";
      run?.end();
    }
  },
  packet(packet) {
    const answer = readAnswer(packet);
    if (answer) run?.answered(answer);
  },
  moved(read, written) {
    the("bytes-read").textContent = count(read);
    the("bytes-written").textContent = count(written);
  },
  stats(outbound, inbound) {
    showStats(the("outbound"), outbound);
    showStats(the("inbound"), inbound);
  },
});

/** A number with its thousands apart. */
function count(n) {
  return Number(n).toLocaleString("en").replaceAll(",", "\u202f");
}

function showStats(row, { packets, payload, wire, dropped }) {
  [packets, payload, wire, dropped].forEach((n, i) => {
    row.cells[i + 1].textContent = count(n);
  });
}

/** So many echoes to one address, one every so often. */
class Run {
  #source;
  #target;
  #left;
  #id;
  #sent = 0;
  #received = 0;
  #times = [];
  #waiting = new Map();
  #everyMs;
  #clock = 0;
  #data = crypto.getRandomValues(new Uint8Array(ECHO_DATA));

  constructor(source, target, left, everyMs) {
    lastId = (lastId + 1) & 0xffff;
    this.#id = lastId;
    this.#source = source;
    this.#target = target;
    this.#left = left;
    this.#everyMs = everyMs;
  }

  begin() {
    this.#clock = setInterval(() => this.#next(), this.#everyMs);
    this.#next();
  }

  #next() {
    if (this.#left === 0) return;
    this.#left -= 1;
    this.#sent += 1;
    const sequence = this.#sent & 0xffff;
    const request = echoRequest(this.#source, this.#target, this.#id, sequence, this.#data);
    const late = setTimeout(() => this.#lost(sequence, "no answer"), ECHO_MS);
    this.#waiting.set(sequence, { late, at: performance.now() });
    if (!tunnel.send(request)) this.#lost(sequence, "not sent: there is no connection");
    this.#sum();
  }

  answered({ from, target, id, sequence, data, trouble }) {
    const waiting = this.#waiting.get(sequence);
    if (!waiting || id !== this.#id || !same(target, this.#target)) return;
    if (trouble) {
      this.#lost(sequence, `${showAddress(from)} says: ${trouble}`);
      return;
    }
    // A reply with other contents is not the reply.
    if (!same(data, this.#data)) return;
    const took = performance.now() - waiting.at;
    clearTimeout(waiting.late);
    this.#waiting.delete(sequence);
    this.#received += 1;
    this.#times.push(took);
    say(`${data.length + 8} bytes from ${showAddress(from)}: seq ${sequence}, ${ms(took)} ms`, "reply");
    this.#sum();
  }

  #lost(sequence, why) {
    clearTimeout(this.#waiting.get(sequence)?.late);
    this.#waiting.delete(sequence);
    say(`seq ${sequence}: ${why}`, "lost");
    this.#sum();
  }

  #sum() {
    const summary = the("summary");
    const answered = this.#received + this.#waiting.size;
    const lost = Math.round((100 * (this.#sent - answered)) / this.#sent);
    const words = [`${this.#sent} sent, ${this.#received} received, ${lost} % lost`];
    if (this.#times.length > 0) {
      const mean = this.#times.reduce((a, b) => a + b) / this.#times.length;
      const [least, most] = [Math.min(...this.#times), Math.max(...this.#times)];
      words.push(`least ${ms(least)}, mean ${ms(mean)}, most ${ms(most)} ms`);
    }
    summary.textContent = words.join("; ");
    summary.dataset.sent = this.#sent;
    summary.dataset.received = this.#received;
    if (this.#left === 0 && this.#waiting.size === 0) this.end();
  }

  /** Sends nothing more and waits for nothing. */
  end() {
    clearInterval(this.#clock);
    for (const { late } of this.#waiting.values()) clearTimeout(late);
    this.#waiting.clear();
    this.#left = 0;
    finish(this);
  }
}

function finish(which) {
  if (run !== which) return;
  run = null;
  the("summary").dataset.done = "true";
  the("go").disabled = the("status").dataset.state !== "on";
  the("stop").disabled = true;
}

function ms(time) {
  return time.toFixed(time < 10 ? 2 : 1);
}

function same(a, b) {
  return a.length === b.length && a.every((byte, i) => byte === b[i]);
}

function say(text, kind) {
  const line = document.createElement("li");
  line.textContent = text;
  line.dataset.kind = kind;
  const lines = the("echoes");
  lines.prepend(line);
  while (lines.children.length > LINES) lines.lastChild.remove();
}

function trouble(text) {
  const summary = the("summary");
  summary.textContent = text;
  summary.dataset.done = "true";
}

/** The address that is meant, and ours of the same family. */
async function addresses(text) {
  const own = ({ v4, v6 }, target) => (target.length === 4 ? v4 : v6);
  const written = parseAddress(text.replace(/^\[(.*)\]$/, "$1"));
  const found = written ? [written] : await tunnel.resolve(text);
  const welcome = tunnel.welcome;
  if (!welcome) throw new Error("There is no connection.");
  const target = found.find((address) => own(welcome, address) !== null);
  if (!target) throw new Error("The gateway gave this page no IPv6 address.");
  return { source: own(welcome, target), target };
}

the("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = the("token").value.trim();
  // Not to be read by whoever comes to this screen next.
  the("token").value = "";
  tunnel.begin(token);
});

the("disconnect").addEventListener("click", () => tunnel.end());

the("ping").addEventListener("submit", async (event) => {
  event.preventDefault();
  run?.end();
  const summary = the("summary");
  for (const name of ["sent", "received", "done"]) delete summary.dataset[name];
  the("echoes").replaceChildren();
  summary.textContent = "…";
  the("go").disabled = true;
  try {
    const { source, target } = await addresses(the("target").value.trim());
    const everyMs = 1000 * the("interval").valueAsNumber;
    the("stop").disabled = false;
    run = new Run(source, target, the("count").valueAsNumber, everyMs);
    run.begin();
  } catch (error) {
    trouble(error.message);
    the("go").disabled = the("status").dataset.state !== "on";
  }
});

the("stop").addEventListener("click", () => run?.end());

// Leaving gives the lease back at once; a page that is shown again begins anew.
window.addEventListener("pagehide", () => tunnel.end());
window.addEventListener("online", () => tunnel.hurry());

beginServe(the, () => token || the("token").value.trim());
if (the("demo")) beginDemo(the, () => token || the("token").value.trim());
