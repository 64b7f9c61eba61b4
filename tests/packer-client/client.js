'use strict';

// The older reverse tunnel clients for Node, as they behave on the wire. They
// are no longer to be had; what they did is done here with the libraries that
// they were made of.
//
//   node client.js KIND URL TOKEN [SERVICE=PORT ...]
//
// KIND is c1 (of February 2017), c2 (of October 2017) or c3 (of 2019). Visitors
// of a service go to that port of 127.0.0.1. What happens is said on the
// standard output, one JSON array a line; `pause` and `resume` on the standard
// input make a reader of its visitors that does not read.

const net = require('net');
const readline = require('readline');
const WebSocket = require('ws');
const Packer = require('proxy-packer');

const kind = process.argv[2];
const url = process.argv[3];
const token = process.argv[4];
const ports = {};
process.argv.slice(5).forEach(function(pair) {
	const parts = pair.split('=');
	ports[parts[0]] = Number(parts[1]);
});

const MANY = 1024 * 1024;
const FEW = 128 * 1024;
const locals = {};
let greeted = false;
let throttled = false;

function say() {
	console.log(JSON.stringify(Array.prototype.slice.call(arguments)));
}

const target = 'c3' === kind ? url : url + '?access_token=' + token;
const ws = new WebSocket(target, { rejectUnauthorized: false });

// The first two wrote five fields, in one message with the body.
function pack5(meta, body, service) {
	if (!body || !body.length) {
		body = Buffer.from(' ');
	}
	const header = [meta.family, meta.address, meta.port, body.length, service || meta.service].join(',');
	return Buffer.concat([Buffer.from([254, header.length]), Buffer.from(header), body]);
}

function send(meta, body, service) {
	if (ws.readyState !== WebSocket.OPEN) {
		return;
	}
	if ('c3' !== kind) {
		ws.send(pack5(meta, body, service));
	} else {
		const copy = Object.assign({}, meta);
		ws.send(Packer.packHeader(copy, body || Buffer.alloc(0), service, false, false));
		if (body && body.length) {
			ws.send(body);
		}
	}
	if (ws.bufferedAmount > MANY && !throttled) {
		throttled = true;
		each(function(local) {
			local.pause();
		});
		drain();
	}
}

function drain() {
	if (ws.readyState !== WebSocket.OPEN) {
		return;
	}
	if (ws.bufferedAmount > FEW) {
		setTimeout(drain, 5);
		return;
	}
	throttled = false;
	each(function(local) {
		if (!local.manualPause) {
			local.resume();
		}
	});
}

function each(what) {
	Object.keys(locals).forEach(function(id) {
		what(locals[id]);
	});
}

function command(array) {
	const body = Buffer.from(JSON.stringify(array));
	ws.send(Packer.packHeader({}, body, 'control', true, false));
}

function sni(hello) {
	if (hello[0] !== 22 || hello.length < 44) {
		return null;
	}
	let at = 43;
	at += 1 + hello[at];
	at += 2 + hello.readUInt16BE(at);
	at += 1 + hello[at];
	const end = at + 2 + hello.readUInt16BE(at);
	at += 2;
	while (at + 4 <= end) {
		const type = hello.readUInt16BE(at);
		const length = hello.readUInt16BE(at + 2);
		if (type === 0) {
			return hello.toString('ascii', at + 9, at + 4 + length);
		}
		at += 4 + length;
	}
	return null;
}

function nameOf(meta) {
	if ('https' === meta.service) {
		return sni(meta.data);
	}
	const found = /(?:^|[\r\n])Host: ([^\r\n]+)[\r\n]*/im.exec(meta.data.toString('latin1'));
	return found && found[1].split(':')[0].toLowerCase();
}

// The first data of a visitor says where it goes; for the first two clients it
// has to hold the whole name.
function begin(id, meta) {
	const port = ports[meta.service];
	let name = meta.name;
	if ('c3' !== kind) {
		name = ('http' === meta.service || 'https' === meta.service) && nameOf(meta);
	}
	if (!port || ('c3' !== kind && !name)) {
		say('refused', id, meta.service);
		send(meta, Buffer.from(JSON.stringify({ message: 'no handler', code: 'E_NO_HANDLER' })), 'error');
		return null;
	}
	say('visitor', id, meta.service, name || '', meta.serviceport || '');
	const own = { family: meta.family, address: meta.address, port: meta.port, service: meta.service };
	if ('c3' === kind) {
		own.serviceport = meta.serviceport;
		own.name = meta.name;
	}
	const local = net.connect({ host: '127.0.0.1', port: port });
	local.tunnelRead = 0;
	locals[id] = local;
	local.on('data', function(chunk) {
		send(own, chunk, null);
	});
	local.on('end', function() {
		gone(id, local, 'end');
	});
	local.on('error', function(err) {
		gone(id, local, 'error', err);
	});
	local.on('close', function() {
		gone(id, local, 'end');
	});
	local.on('drain', function() {
		if (local.remotePaused) {
			local.remotePaused = false;
			send(own, Buffer.from(String(local.tunnelRead)), 'resume');
		}
	});
	local.own = own;
	return local;
}

function gone(id, local, service, err) {
	if (locals[id] !== local) {
		return;
	}
	delete locals[id];
	say(service, id);
	if (!local.tunnelClosing) {
		send(local.own, err && Buffer.from(JSON.stringify({ message: err.message, code: err.code })), service);
	}
}

function close(meta) {
	const id = Packer.addrToId(meta);
	const local = locals[id];
	if (!local) {
		return;
	}
	say('closed', id, meta.service);
	local.tunnelClosing = true;
	local.end();
	setTimeout(function() {
		local.destroy();
	}, 500);
}

const machine = Packer.create({
	oncontrol: function(meta) {
		if ('c1' === kind) {
			// It knows no commands, and says so to nobody in particular.
			ws.send(pack5({ family: '', address: '', port: '' }, Buffer.from('{"message":"unknown service"}'), 'error'));
			say('greeted');
			return;
		}
		const array = JSON.parse(meta.data.toString());
		if (array[0] < 0) {
			say('answered', array[0], array[1]);
			return;
		}
		if ('hello' === array[1]) {
			greeted = true;
			command([-array[0], null]);
			say('greeted');
			if ('c3' === kind) {
				command([Math.ceil(1e9 * Math.random()), 'add_token', token]);
			}
			return;
		}
		say(array[1], array[2]);
	},
	onconnection: function(meta) {
		if ('c3' === kind) {
			const id = Packer.addrToId(meta);
			say('announced', id, meta.service);
			// A server may speak first, so it is asked now.
			if (!locals[id] && 'tcp' === meta.service) {
				begin(id, meta);
			}
		}
	},
	onmessage: function(meta) {
		const id = Packer.addrToId(meta);
		const local = locals[id] || begin(id, meta);
		if (!local) {
			return;
		}
		local.tunnelRead += meta.data.length;
		local.write(meta.data);
		if (local.writableLength > MANY && !local.remotePaused && 'c1' !== kind) {
			local.remotePaused = true;
			send(local.own, Buffer.from(String(local.tunnelRead)), 'pause');
		}
	},
	onpause: function(meta) {
		const local = locals[Packer.addrToId(meta)];
		if (local) {
			say('pause', Packer.addrToId(meta), meta.data.toString());
			local.manualPause = true;
			local.pause();
		}
	},
	onresume: function(meta) {
		const local = locals[Packer.addrToId(meta)];
		if (local) {
			say('resume', Packer.addrToId(meta), meta.data.toString());
			local.manualPause = false;
			if (!throttled) {
				local.resume();
			}
		}
	},
	onend: close,
	onerror: close
});

ws.on('open', function() {
	say('open');
	// The last one is the only one that asks so often.
	if ('c3' === kind) {
		let answered = true;
		setInterval(function() {
			if (!answered) {
				say('no answer');
				process.exit(4);
			}
			answered = false;
			ws.ping();
		}, 6000);
		ws.on('pong', function() {
			answered = true;
			say('pong');
		});
	}
});
ws.on('message', function(message, isBinary) {
	if (!isBinary) {
		say('text', message.toString());
		process.exit(3);
	}
	machine.fns.addChunk(message);
});
ws.on('unexpected-response', function(request, response) {
	say('refused', response.statusCode);
	process.exit(2);
});
ws.on('error', function(err) {
	say('failed', err.message);
	process.exit(2);
});
ws.on('close', function(code, reason) {
	say('close', code, reason.toString(), greeted);
	process.exit(0);
});

readline.createInterface({ input: process.stdin }).on('line', function(line) {
	if ('memory' === line) {
		say('memory', process.memoryUsage().rss);
	}
}).on('close', function() {
	process.exit(0);
});
