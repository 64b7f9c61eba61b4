'use strict';

// Writes proto/tests/packer/node.txt: frames as the clients' own library makes
// them, one a line, a name and hexadecimal bytes. Run it again after a change
// here:
//
//   npm install && node record.js > ../../proto/tests/packer/node.txt

const Packer = require('proxy-packer');

const visitors = {
	v4: { family: 'IPv4', address: '192.0.2.7', port: 50123 },
	mapped: { family: 'IPv6', address: '::ffff:127.0.0.1', port: 1024 },
	v6: { family: 'IPv6', address: '2001:db8::7', port: 65535 }
};
const served = { serviceport: 443, name: 'app.a.example' };
const body = Buffer.from('GET / HTTP/1.1\r\nHost: app.a.example\r\n\r\n');

function line(name, bytes) {
	console.log(name + ' ' + bytes.toString('hex'));
}

// `pack` writes into what it is given.
function meta(visitor, more) {
	return Object.assign({}, visitor, more);
}

Object.keys(visitors).forEach(function(key) {
	const visitor = visitors[key];
	line(key + '-http', Packer.pack(meta(visitor, { service: 'http' }), body));
	line(key + '-https-named', Packer.pack(meta(visitor, Object.assign({ service: 'https' }, served)), body));
	line(key + '-end-space', Packer.pack(meta(visitor), null, 'end'));
	line(key + '-end-named-space', Packer.pack(meta(visitor, served), null, 'end'));
	line(key + '-end-empty', Packer.packHeader(meta(visitor, served), null, 'end', true));
	line(key + '-error', Packer.pack(meta(visitor), { message: 'no such visitor', code: 'E_NO_CONN' }, 'error'));
	line(key + '-pause', Packer.pack(meta(visitor, served), Buffer.from('1048577'), 'pause'));
	line(key + '-resume', Packer.pack(meta(visitor, served), Buffer.from('2097152'), 'resume'));
	line(
		key + '-connection',
		Packer.packHeader(meta(visitor, Object.assign({ service: 'https' }, served)), null, 'connection', true)
	);
});
line('header-alone', Packer.packHeader(meta(visitors.v4, Object.assign({ service: 'https' }, served)), body, null, false, true));
line('control-hello-answer', Packer.pack({}, [-1, null], 'control'));
line('control-add-token', Packer.pack({}, [7, 'add_token', 'a.b.c'], 'control'));
line('control-delete-token', Packer.pack({}, [8, 'delete_token', '*'], 'control'));
