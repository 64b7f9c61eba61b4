//! Takes a lease from a running helper and pings through it, as a gateway would for a client.
//!
//!     lease-ping SOCKET HELPER_UID HOST [COUNT]
//!
//! Runs as the gateway's user. HOST is an IPv4 or IPv6 address.

use std::net::IpAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rvpn_ipc::{Client, Key};
use rvpn_lab::{Tunnel, packet};

const WAIT: Duration = Duration::from_secs(1);

fn run() -> Result<bool, String> {
    let args: Vec<String> = std::env::args().collect();
    let [_, socket, helper, host, rest @ ..] = args.as_slice() else {
        return Err("usage: lease-ping SOCKET HELPER_UID HOST [COUNT]".to_owned());
    };
    let helper = helper
        .parse()
        .map_err(|_| format!("'{helper}' is not the number of a user"))?;
    let host: IpAddr = host
        .parse()
        .map_err(|_| format!("'{host}' is not an address, such as 1.1.1.1"))?;
    let count: u16 = rest
        .first()
        .map_or(Ok(4), |c| c.parse())
        .map_err(|_| "COUNT is not a number".to_owned())?;
    let (mut client, pool) =
        Client::connect(Path::new(socket), helper, false).map_err(|e| e.to_string())?;
    println!("{} of {} slots free", pool.free, pool.slots);
    let mut key = [0; 16];
    key[..4].copy_from_slice(&std::process::id().to_le_bytes());
    key[4] = 1;
    let lease = client
        .acquire(Key(key), rvpn_ipc::Kind::Packets, 0)
        .map_err(|e| e.to_string())?;
    let tunnel = Tunnel::new(Key(key), lease);
    let source = if host.is_ipv4() {
        tunnel.v4(2)
    } else {
        tunnel.v6(1)
    };
    println!("PING {host} from {source} through {}", tunnel.name());
    let id = std::process::id().to_le_bytes();
    let id = u16::from_le_bytes([id[0], id[1]]);
    let mut received = 0;
    for n in 1..=count {
        let sent = Instant::now();
        tunnel.send(&packet::echo(
            &source,
            &host.to_string(),
            id,
            n,
            b"rvpn lease-ping",
        ));
        while let Some(p) = tunnel.recv(WAIT.saturating_sub(sent.elapsed())) {
            let message = p
                .get(if host.is_ipv4() { 20 } else { 40 }..)
                .unwrap_or_default();
            let reply = if host.is_ipv4() { 0 } else { 129 };
            if message.first() == Some(&reply) && message.get(6..8) == Some(&n.to_be_bytes()) {
                received += 1;
                println!(
                    "{} bytes from {host}: seq={n} time={:.3} ms",
                    message.len(),
                    sent.elapsed().as_secs_f64() * 1e3
                );
                break;
            }
        }
    }
    println!("{count} sent, {received} received");
    let (slot, generation) = (tunnel.reply.slot, tunnel.reply.generation);
    drop(tunnel);
    client
        .release(slot, generation)
        .map_err(|e| e.to_string())?;
    Ok(received > 0)
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(e) => {
            eprintln!("lease-ping: {e}");
            ExitCode::from(2)
        }
    }
}
