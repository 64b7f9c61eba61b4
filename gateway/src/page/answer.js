// HTTP on a visitor's stream: requests in, what the page answers out.

const HEAD_MOST = 32 * 1024;
const BODY_MOST = 1024 * 1024;
/** How long a visitor may take over a request. */
const SLOW_MS = 60_000;

const ascii = new TextDecoder("latin1");
const utf8 = new TextEncoder();

const WORDS = {
  200: "OK", 204: "No Content", 206: "Partial Content", 301: "Moved Permanently", 302: "Found",
  304: "Not Modified", 400: "Bad Request", 403: "Forbidden", 404: "Not Found",
  405: "Method Not Allowed", 413: "Content Too Large", 431: "Request Header Fields Too Large",
  500: "Internal Server Error", 501: "Not Implemented",
};

/** What cannot be answered otherwise. */
class Refused extends Error {
  constructor(status) {
    super(WORDS[status]);
    this.status = status;
  }
}

/** Bytes of a stream, taken as they are needed. */
class Source {
  #stream;
  #held = new Uint8Array();

  constructor(stream) {
    this.#stream = stream;
  }

  async #more() {
    const late = new Promise((_, fail) => {
      setTimeout(() => fail(new Error("the visitor is too slow")), SLOW_MS);
    });
    const next = this.#stream.read();
    next.catch(() => {});
    const bytes = await Promise.race([next, late]);
    if (bytes === null) return false;
    const both = new Uint8Array(this.#held.length + bytes.length);
    both.set(this.#held);
    both.set(bytes, this.#held.length);
    this.#held = both;
    return true;
  }

  /** All up to a mark, without it; null if there is nothing at all. */
  async until(mark, most) {
    for (;;) {
      const at = ascii.decode(this.#held.subarray(0, most + mark.length)).indexOf(mark);
      if (at >= 0) {
        const text = ascii.decode(this.#held.subarray(0, at));
        this.#held = this.#held.slice(at + mark.length);
        return text;
      }
      if (this.#held.length >= most + mark.length) throw new Refused(431);
      const nothing = this.#held.length === 0;
      if (!(await this.#more())) {
        if (nothing) return null;
        throw new Refused(400);
      }
    }
  }

  async take(n) {
    while (this.#held.length < n) if (!(await this.#more())) throw new Refused(400);
    const taken = this.#held.slice(0, n);
    this.#held = this.#held.slice(n);
    return taken;
  }
}

function parse(head) {
  const [line, ...fields] = head.split("\r\n");
  const request = /^([!#$%&'*+.^_`|~0-9A-Za-z-]+) (\S+) HTTP\/1\.([01])$/.exec(line);
  if (!request) throw new Refused(400);
  const headers = new Map();
  for (const field of fields) {
    const parts = /^([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*$/.exec(field);
    if (!parts) throw new Refused(400);
    const name = parts[1].toLowerCase();
    const before = headers.get(name);
    headers.set(name, before === undefined ? parts[2] : `${before}, ${parts[2]}`);
  }
  return { method: request[1], target: request[2], minor: Number(request[3]), headers };
}

/** The whole body, however it is sent. */
async function bodyOf({ headers }, source) {
  const coding = headers.get("transfer-encoding");
  const length = headers.get("content-length");
  if (coding !== undefined) {
    // Two ways to say where it ends are one too many.
    if (coding.toLowerCase() !== "chunked" || length !== undefined) throw new Refused(400);
    const pieces = [];
    for (let all = 0; ; ) {
      const size = await source.until("\r\n", 64);
      if (!/^[0-9A-Fa-f]{1,8}(;.*)?$/.test(size ?? "")) throw new Refused(400);
      const n = parseInt(size, 16);
      all += n;
      if (all > BODY_MOST) throw new Refused(413);
      if (n === 0) break;
      pieces.push(await source.take(n));
      if ((await source.until("\r\n", 0)) !== "") throw new Refused(400);
    }
    // What comes behind the last is of no interest.
    while ((await source.until("\r\n", HEAD_MOST)) !== "");
    return new Uint8Array(await new Blob(pieces).arrayBuffer());
  }
  if (length === undefined) return new Uint8Array();
  if (!/^\d{1,15}$/.test(length)) throw new Refused(400);
  if (Number(length) > BODY_MOST) throw new Refused(413);
  return source.take(Number(length));
}

async function send(stream, request, { status = 200, headers = {}, body = "" }, last) {
  const bytes = body instanceof Blob ? null : typeof body === "string" ? utf8.encode(body) : body;
  const length = bytes ? bytes.length : body.size;
  const lines = [`HTTP/1.1 ${status} ${WORDS[status] ?? "Status"}`];
  for (const [name, value] of Object.entries(headers)) {
    lines.push(`${name}: ${String(value).replace(/[\r\n]/g, " ")}`);
  }
  lines.push(`content-length: ${length}`);
  if (last) lines.push("connection: close");
  await stream.write(utf8.encode(`${lines.join("\r\n")}\r\n\r\n`));
  if (request?.method === "HEAD") return;
  if (bytes) {
    await stream.write(bytes);
    return;
  }
  // A file of any size, piece by piece.
  for (let at = 0; at < body.size; at += 64 * 1024) {
    await stream.write(new Uint8Array(await body.slice(at, at + 64 * 1024).arrayBuffer()));
  }
}

/**
 * Answers the requests of one stream, one after the other. `handle` is given
 * `{method, target, headers, body}` and returns `{status, headers, body}`; the
 * body is a string, bytes or a Blob.
 */
export async function answer(stream, handle) {
  const source = new Source(stream);
  let request = null;
  try {
    for (let last = false; !last; ) {
      request = null;
      const head = await source.until("\r\n\r\n", HEAD_MOST);
      if (head === null) break;
      request = parse(head);
      last = request.minor === 0 || /(^|,)\s*close\s*(,|$)/i.test(request.headers.get("connection") ?? "");
      request.body = await bodyOf(request, source);
      let answered;
      try {
        answered = await handle(request);
      } catch {
        answered = { status: 500, body: "the page failed\n" };
      }
      await send(stream, request, answered, last);
    }
    stream.finish();
  } catch (trouble) {
    if (!(trouble instanceof Refused)) {
      stream.reset();
      return;
    }
    try {
      await send(stream, request, { status: trouble.status, body: `${trouble.message}\n` }, true);
      stream.finish();
    } catch {
      stream.reset();
    }
  }
}
