// Packets and the records that carry them, as PROTOCOL.md section 3 has them.
// Nothing here knows of sockets or of the page.

const RECORD = 8;
const V4_HEADER = 20;
const V6_HEADER = 40;
const ECHO = 8;

const ICMP = 1;
const ICMP6 = 58;
const HOPS = 64;

/** An address as its 4 or 16 bytes; null if the text is none. */
export function parseAddress(text) {
  return text.includes(":") ? parseV6(text) : parseV4(text);
}

function parseV4(text) {
  const parts = text.split(".");
  const fits = (part) => /^(0|[1-9][0-9]{0,2})$/.test(part) && Number(part) <= 255;
  return parts.length === 4 && parts.every(fits) ? Uint8Array.from(parts, Number) : null;
}

function parseV6(text) {
  let rest = text;
  const tail = [];
  // The last four bytes may be written as IPv4.
  const dotted = rest.slice(rest.lastIndexOf(":") + 1);
  if (dotted.includes(".")) {
    const v4 = parseV4(dotted);
    if (!v4) return null;
    tail.push((v4[0] << 8) | v4[1], (v4[2] << 8) | v4[3]);
    rest = rest.slice(0, -dotted.length);
    // The colon in front of it belongs to it, unless it is half of "::".
    if (!rest.endsWith("::")) rest = rest.slice(0, -1);
  }
  const halves = rest.split("::");
  if (halves.length > 2) return null;
  const groups = (half) => (half === "" ? [] : half.split(":"));
  const front = groups(halves[0]);
  const back = halves.length === 2 ? groups(halves[1]) : [];
  if (![...front, ...back].every((group) => /^[0-9a-fA-F]{1,4}$/.test(group))) return null;
  const hex = (group) => parseInt(group, 16);
  const missing = 8 - front.length - back.length - tail.length;
  if (halves.length === 2 ? missing < 1 : missing !== 0) return null;
  const words = [...front.map(hex), ...Array(missing).fill(0), ...back.map(hex), ...tail];
  return Uint8Array.from(words.flatMap((word) => [word >> 8, word & 255]));
}

/** An address as people write it. */
export function showAddress(bytes) {
  if (bytes.length === 4) return bytes.join(".");
  const words = Array.from({ length: 8 }, (_, i) => (bytes[2 * i] << 8) | bytes[2 * i + 1]);
  // The longest run of zeros, the first of equals, is left out.
  let best = { start: 0, length: 1 };
  for (let start = 0; start < 8; start += 1) {
    let length = 0;
    while (start + length < 8 && words[start + length] === 0) length += 1;
    if (length > best.length) best = { start, length };
  }
  const hex = (list) => list.map((word) => word.toString(16)).join(":");
  if (best.length < 2) return hex(words);
  return `${hex(words.slice(0, best.start))}::${hex(words.slice(best.start + best.length))}`;
}

/** The Internet checksum of these pieces, each but the last of even length. */
function checksum(...pieces) {
  let sum = 0;
  for (const piece of pieces) {
    for (let i = 0; i < piece.length; i += 2) {
      sum += (piece[i] << 8) | (piece[i + 1] ?? 0);
    }
  }
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  return ~sum & 0xffff;
}

function pseudoHeader(source, target, length) {
  return Uint8Array.of(...source, ...target, 0, 0, length >> 8, length & 255, 0, 0, 0, ICMP6);
}

/** A finished ICMP or ICMPv6 echo request; both addresses of one family. */
export function echoRequest(source, target, id, sequence, data) {
  const v6 = target.length === 16;
  const start = v6 ? V6_HEADER : V4_HEADER;
  const packet = new Uint8Array(start + ECHO + data.length);
  const view = new DataView(packet.buffer);
  const echo = packet.subarray(start);
  view.setUint8(start, v6 ? 128 : 8);
  view.setUint16(start + 4, id);
  view.setUint16(start + 6, sequence);
  echo.set(data, ECHO);
  if (v6) {
    view.setUint8(0, 0x60);
    view.setUint16(4, echo.length);
    view.setUint8(6, ICMP6);
    view.setUint8(7, HOPS);
    packet.set(source, 8);
    packet.set(target, 24);
    view.setUint16(start + 2, checksum(pseudoHeader(source, target, echo.length), echo));
  } else {
    view.setUint8(0, 0x45);
    view.setUint16(2, packet.length);
    view.setUint16(4, sequence);
    // Not to be fragmented: it fits, and a piece would help nobody.
    view.setUint16(6, 0x4000);
    view.setUint8(8, HOPS);
    view.setUint8(9, ICMP);
    packet.set(source, 12);
    packet.set(target, 16);
    view.setUint16(10, checksum(packet.subarray(0, V4_HEADER)));
    view.setUint16(start + 2, checksum(echo));
  }
  return packet;
}

/** What a packet answers of an echo request, or null if it answers none.
 *  `trouble` says in words what came instead of a reply. */
export function readAnswer(packet) {
  const outer = header(packet);
  if (!outer || !whole(outer)) return null;
  const { v6, source, payload } = outer;
  const [type, code] = payload;
  if (type === (v6 ? 129 : 0) && code === 0) {
    const at = view(payload);
    const [id, sequence] = [at.getUint16(4), at.getUint16(6)];
    return { from: source, target: source, id, sequence, data: payload.subarray(ECHO) };
  }
  const trouble = v6 ? trouble6(type, code) : trouble4(type, code);
  const inner = trouble && header(payload.subarray(ECHO));
  // What it is about: the beginning of our own request.
  if (!inner || inner.payload.length < ECHO || inner.payload[0] !== (v6 ? 128 : 8)) return null;
  const at = view(inner.payload);
  const [id, sequence] = [at.getUint16(4), at.getUint16(6)];
  return { from: source, target: inner.target, id, sequence, trouble };
}

function view(bytes) {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** The IP header of a packet of ICMP, first or only fragment; null otherwise. */
function header(packet) {
  if (packet.length < V4_HEADER) return null;
  const at = view(packet);
  if (packet[0] >> 4 === 4) {
    const start = (packet[0] & 15) * 4;
    const pieces = at.getUint16(6) & 0x3fff;
    if (start < V4_HEADER || packet.length < start || packet[9] !== ICMP || pieces) return null;
    return {
      v6: false,
      source: packet.slice(12, 16),
      target: packet.slice(16, 20),
      payload: packet.subarray(start, at.getUint16(2)),
    };
  }
  if (packet[0] >> 4 !== 6 || packet.length < V6_HEADER || packet[6] !== ICMP6) return null;
  return {
    v6: true,
    source: packet.slice(8, 24),
    target: packet.slice(24, 40),
    payload: packet.subarray(V6_HEADER, V6_HEADER + at.getUint16(4)),
  };
}

/** Whether the message is long enough and its checksum right. */
function whole({ v6, source, target, payload }) {
  if (payload.length < ECHO) return false;
  const pieces = v6 ? [pseudoHeader(source, target, payload.length), payload] : [payload];
  return checksum(...pieces) === 0;
}

function trouble4(type, code) {
  const unreachable = { 0: "the network cannot be reached", 1: "the host cannot be reached" };
  if (type === 3) return unreachable[code] ?? "refused on the way";
  return type === 11 ? "too many hops" : null;
}

function trouble6(type, code) {
  const unreachable = { 0: "there is no route", 3: "the host cannot be reached" };
  if (type === 1) return unreachable[code] ?? "refused on the way";
  return type === 3 ? "too many hops" : null;
}

/** One packet as a binary message. */
export function record(packet) {
  const message = new Uint8Array(RECORD + packet.length);
  const at = new DataView(message.buffer);
  at.setUint16(0, packet.length, true);
  at.setUint8(2, 1);
  message.set(packet, RECORD);
  return message;
}

/** The packets of a binary message; throws an Error if it is malformed. Without
 *  the capability `offload` there are only finished ones. */
export function packetsOf(buffer) {
  const at = new DataView(buffer);
  const packets = [];
  let offset = 0;
  do {
    if (offset + RECORD > at.byteLength) throw new Error("a record is cut off");
    const length = at.getUint16(offset, true);
    const finished = at.getUint8(offset + 3) === 0 && at.getUint32(offset + 4) === 0;
    const end = offset + RECORD + length;
    if (at.getUint8(offset + 2) !== 1 || length === 0 || !finished || end > at.byteLength) {
      throw new Error("a record is malformed");
    }
    packets.push(new Uint8Array(buffer, offset + RECORD, length));
    offset = end;
  } while (offset < at.byteLength);
  return packets;
}
