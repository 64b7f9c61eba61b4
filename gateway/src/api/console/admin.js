"use strict";
// The list of serving clients, from /api/v1/servers. Texts of others are only
// ever set as text, never as markup.

const at = (id) => document.getElementById(id);
let token = "";
let servers = [];
let order = { key: "id", up: true };

async function call(method, path) {
  const answer = await fetch(path, {
    method,
    headers: { Authorization: "Bearer " + token },
    cache: "no-store",
    credentials: "omit",
  });
  if (answer.status === 204) return null;
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.detail || "status " + answer.status);
  return body;
}

function row(server) {
  return {
    id: server.id,
    account: server.account,
    names: server.offers.map((o) => o.name || "port " + o.port).join(", "),
    peer: server.peer,
    started: server["started-ms"],
    visitors: server.visitors,
    inbound: server.inbound,
    outbound: server.outbound,
    state: server.live ? "here" : "gone",
  };
}

function shown(key, value) {
  return key === "started" ? new Date(value).toLocaleString() : String(value);
}

function draw() {
  const wanted = at("search").value.toLowerCase();
  const fits = (one) => Object.entries(one).some(([k, v]) => shown(k, v).toLowerCase().includes(wanted));
  const rows = servers.map(row).filter(fits);
  rows.sort((a, b) => {
    const [x, y] = [a[order.key], b[order.key]];
    const less = typeof x === "number" ? x - y : x.localeCompare(y);
    return order.up ? less : -less;
  });
  const lines = rows.map((one) => {
    const line = document.createElement("tr");
    if (one.state === "gone") line.className = "gone";
    for (const [key, value] of Object.entries(one)) {
      const cell = document.createElement("td");
      cell.textContent = shown(key, value);
      line.append(cell);
    }
    const last = document.createElement("td");
    if (one.state === "here") {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = "End";
      button.addEventListener("click", () => end(one));
      last.append(button);
    }
    line.append(last);
    return line;
  });
  at("rows").replaceChildren(...lines);
  at("state").textContent = rows.length + " of " + servers.length + " servers, as of " + new Date().toLocaleTimeString();
}

async function refresh() {
  try {
    servers = (await call("GET", "/api/v1/servers")).servers;
    at("view").hidden = false;
    draw();
  } catch (error) {
    at("state").textContent = "Not shown: " + error.message;
  }
}

async function end(one) {
  if (!confirm("End the connection of " + one.account + " that serves " + one.names + "?")) return;
  try {
    await call("DELETE", "/api/v1/servers/" + one.id);
    await refresh();
  } catch (error) {
    at("state").textContent = "Not ended: " + error.message;
  }
}

at("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = at("token").value.trim();
  at("token").value = "";
  refresh();
});
at("refresh").addEventListener("click", refresh);
at("search").addEventListener("input", draw);
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const key = button.dataset.key;
    order = { key, up: order.key === key ? !order.up : true };
    draw();
  });
}
