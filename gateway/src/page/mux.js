// Streams that the gateway opens, in the byte stream of the binary messages.
// PROTOCOL.md section 8; the frames are yamux's.

const HEADER = 12;
const FRAME = 16 * 1024;
const WINDOW = 256 * 1024;
const STREAMS_MOST = 256;
const [DATA, GRANT, PING, GONE] = [0, 1, 2, 3];
const [SYN, ACK, FIN, RST] = [1, 2, 4, 8];

/** One stream, as whoever uses it sees it. */
class Stream {
  #mux;
  #id;
  #chunks = [];
  #ended = false;
  #broken = null;
  #readers = [];
  #writers = [];
  #credit = WINDOW;
  #granted = WINDOW;
  #consumed = 0;
  #finished = false;

  constructor(mux, id) {
    this.#mux = mux;
    this.#id = id;
  }

  /** The next bytes; null at the end. Fails if the stream was cut off. */
  async read() {
    for (;;) {
      if (this.#broken) throw this.#broken;
      const chunk = this.#chunks.shift();
      if (chunk) {
        this.#grant(chunk.length);
        return chunk;
      }
      if (this.#ended) return null;
      await new Promise((wake) => this.#readers.push(wake));
    }
  }

  /** Resolves when all of it is on its way. */
  async write(bytes) {
    for (let at = 0; at < bytes.length; ) {
      if (this.#broken) throw this.#broken;
      if (this.#credit === 0) {
        await new Promise((wake) => this.#writers.push(wake));
        continue;
      }
      await this.#mux.room();
      const n = Math.min(bytes.length - at, this.#credit, FRAME);
      if (n === 0 || this.#broken) continue;
      this.#credit -= n;
      this.#mux.frame(DATA, 0, this.#id, n, bytes.subarray(at, at + n));
      at += n;
    }
  }

  /** Nothing more will be written. */
  finish() {
    if (this.#finished || this.#broken) return;
    this.#finished = true;
    this.#mux.frame(DATA, FIN, this.#id, 0);
    this.#over();
  }

  /** Cuts it off. */
  reset() {
    if (this.#broken || (this.#finished && this.#ended)) return;
    this.#mux.frame(DATA, RST, this.#id, 0);
    this.break(new Error("cut off"));
  }

  #grant(n) {
    this.#consumed += n;
    if (this.#ended || this.#consumed < WINDOW / 2) return;
    this.#mux.frame(GRANT, 0, this.#id, this.#consumed);
    this.#granted += this.#consumed;
    this.#consumed = 0;
  }

  /** What the mux says of it. */
  arrived(bytes) {
    if (this.#ended || bytes.length > this.#granted) throw new Error("more than was granted");
    this.#granted -= bytes.length;
    this.#chunks.push(bytes);
    this.#wake();
  }

  credited(n) {
    this.#credit += n;
    this.#wake();
  }

  ended() {
    this.#ended = true;
    this.#wake();
    this.#over();
  }

  break(error) {
    this.#broken = error;
    this.#mux.forget(this.#id);
    this.#wake();
  }

  #over() {
    if (this.#finished && this.#ended) this.#mux.forget(this.#id);
  }

  #wake() {
    for (const wake of this.#readers.splice(0)) wake();
    for (const wake of this.#writers.splice(0)) wake();
  }
}

/** The client's end: `send` takes the bytes of a message, `room` resolves when
 *  there is room for more, `opened` is given every stream. */
export class Mux {
  #send;
  #opened;
  #streams = new Map();
  /** Ended here; what is on its way to them is nobody's. */
  #head = new Uint8Array(HEADER);
  #have = 0;
  #body = null;
  #last = 0;

  constructor(send, room, opened) {
    this.#send = send;
    this.room = room;
    this.#opened = opened;
  }

  /** Takes the bytes of a message. Fails if they are not what they should be. */
  receive(bytes) {
    for (let at = 0; at < bytes.length; ) {
      if (this.#body) {
        const n = Math.min(this.#body.left, bytes.length - at);
        this.#streams.get(this.#body.id)?.arrived(bytes.slice(at, at + n));
        at += n;
        this.#body.left -= n;
        if (this.#body.left === 0) {
          const { id, end } = this.#body;
          this.#body = null;
          if (end) this.#streams.get(id)?.ended();
        }
        continue;
      }
      const n = Math.min(HEADER - this.#have, bytes.length - at);
      this.#head.set(bytes.subarray(at, at + n), this.#have);
      at += n;
      this.#have += n;
      if (this.#have === HEADER) {
        this.#have = 0;
        this.#begun();
      }
    }
  }

  #begun() {
    const view = new DataView(this.#head.buffer);
    const [version, kind] = this.#head;
    const [flags, id, length] = [view.getUint16(2), view.getUint32(4), view.getUint32(8)];
    if (version !== 0 || kind > GONE || flags > 15) throw new Error("no stream frame");
    if (kind === PING) {
      if (flags & SYN) this.frame(PING, ACK, 0, length);
      return;
    }
    if (kind === GONE) return;
    if (flags & SYN) this.#open(id);
    if (id === 0 || id > this.#last) throw new Error("a stream that was never opened");
    const stream = this.#streams.get(id);
    if (flags & RST) {
      stream?.break(new Error("the visitor has gone"));
      return;
    }
    if (kind === GRANT) {
      stream?.credited(length);
      if (flags & FIN) stream?.ended();
      return;
    }
    if (length > WINDOW) throw new Error("more than was granted");
    if (length > 0) this.#body = { id, left: length, end: (flags & FIN) !== 0 };
    else if (flags & FIN) stream?.ended();
  }

  #open(id) {
    if (id % 2 !== 0 || id <= this.#last) throw new Error("a stream of no such number");
    this.#last = id;
    if (this.#streams.size >= STREAMS_MOST) {
      this.frame(DATA, RST, id, 0);
      return;
    }
    const stream = new Stream(this, id);
    this.#streams.set(id, stream);
    this.frame(GRANT, ACK, id, 0);
    this.#opened(stream);
  }

  /** Sends a frame. */
  frame(kind, flags, id, length, body) {
    const bytes = new Uint8Array(HEADER + (body?.length ?? 0));
    const view = new DataView(bytes.buffer);
    bytes[1] = kind;
    view.setUint16(2, flags);
    view.setUint32(4, id);
    view.setUint32(8, length);
    if (body) bytes.set(body, HEADER);
    this.#send(bytes);
  }

  /** A sign of life, which a page cannot give otherwise. */
  ping() {
    this.frame(PING, SYN, 0, 0);
  }

  forget(id) {
    this.#streams.delete(id);
  }

  /** The connection is over. */
  end() {
    for (const stream of [...this.#streams.values()]) stream.break(new Error("the connection is over"));
  }

  get open() {
    return this.#streams.size;
  }
}
