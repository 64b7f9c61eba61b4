// The demonstration's section, which is there only if the gateway offers it.

import { check } from "./tunnel.js";

const PROTOCOL = "rvpn.demo.1";
const BEARER = "rvpn.bearer.";

const utf8 = new TextEncoder();

/** Brings the section to life. `token` gives the one that was entered. */
export function begin(the, token) {
  let socket = null;
  let read = 0;
  let written = 0;

  const show = (state, words) => {
    the("demo-status").dataset.state = state;
    the("demo-status").textContent = words;
    the("listen").disabled = state === "on" || state === "connecting";
    the("leave").disabled = !the("listen").disabled;
    the("send").disabled = state !== "on";
  };
  const count = () => {
    the("demo-read").textContent = String(read);
    the("demo-written").textContent = String(written);
  };

  const listen = async () => {
    const protocols = [PROTOCOL];
    show("connecting", "Connecting …");
    if (the("demo").dataset.token === "needed") {
      const presented = token();
      if (presented === "") {
        show("failed", "Enter a token above first.");
        return;
      }
      try {
        await check(presented);
        protocols.push(BEARER + presented);
      } catch (trouble) {
        show("failed", trouble.message);
        return;
      }
    }
    [read, written] = [0, 0];
    count();
    // The page is one level below the gateway's root.
    const url = new URL("../ws/client", location.href);
    url.protocol = url.protocol === "http:" ? "ws:" : "wss:";
    socket = new WebSocket(url, protocols);
    socket.onopen = () => show("on", "Listening.");
    socket.onmessage = ({ data }) => {
      read += utf8.encode(String(data)).length;
      the("demo-text").textContent = String(data);
      count();
    };
    socket.onclose = ({ code, reason }) => {
      socket = null;
      const words = reason ? ` (${code}: ${reason})` : ` (${code})`;
      show(code === 1000 ? "off" : "failed", `Not listening${words}.`);
    };
  };

  the("listen").addEventListener("click", () => listen());
  the("leave").addEventListener("click", () => socket?.close(1000));
  the("say").addEventListener("submit", (event) => {
    event.preventDefault();
    if (socket?.readyState !== WebSocket.OPEN) return;
    const words = the("words").value;
    socket.send(words);
    written += utf8.encode(words).length;
    count();
    the("words").value = "";
  });
  window.addEventListener("pagehide", () => socket?.close(1000));
}
