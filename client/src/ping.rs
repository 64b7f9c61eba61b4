//! `rvpn ping`: echo requests made here, carried by the tunnel, without root.

use std::collections::HashMap;
use std::net::IpAddr;
use std::process::ExitCode;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use rvpn_proto::control::{Message as Control, Policy, Resolve, Stage, Welcome, close};
use rvpn_proto::record::{Offload, Reader, append};
use serde_json::json;
use tokio::net::TcpStream;
use tokio::time::{Instant, interval_at, sleep_until, timeout};
use tokio_tungstenite::tungstenite::Message;

use crate::cli::Ping;
use crate::echo::{Heard, Pinger};
use crate::fail::{Failure, Outcome};
use crate::link::{Ask, Socket, goodbye, open, sent_away};
use crate::profile::{self, Address, Profile};
use crate::text::shown;
use crate::{reach, tls};

/// Largest payload: more would not fit a packet of the tunnel.
const MOST: u16 = 65_000;

/// A session that this program speaks on by itself.
pub(crate) struct Talk {
    pub(crate) to: Address,
    pub(crate) socket: Socket<TcpStream>,
    pub(crate) welcome: Box<Welcome>,
}

/// Opens a session of its own, beside whatever else this installation does.
pub(crate) async fn talk(profile: &Profile) -> Outcome<Talk> {
    let to = profile.address()?;
    let token = profile.token()?;
    let connector = tls::connector(&profile.trust, tls::authorities(&profile.trust)?.as_deref())?;
    let tcp = reach::connect(&to).await?;
    let instance = profile::new_instance()?;
    let ask = Ask {
        to: &to,
        token: &token,
        instance: &instance,
        offload: false,
        mtu: None,
        ticket: None,
        policy: Policy::default(),
    };
    let (socket, welcome) = open(&connector, ask, tcp).await.map_err(|d| d.failure)?;
    Ok(Talk {
        to,
        socket,
        welcome,
    })
}

impl Talk {
    /// The next message of the session; its end is a failure.
    async fn next(&mut self) -> Outcome<Message> {
        let mut said = None;
        loop {
            match self.socket.next().await {
                Some(Ok(Message::Text(text))) => match Control::parse(&text, Stage::Session) {
                    Ok(Control::Goodbye(goodbye)) => said = Some(goodbye),
                    _ => return Ok(Message::Text(text)),
                },
                Some(Ok(Message::Close(frame))) => {
                    return Err(sent_away(&self.to, said, frame).failure);
                }
                Some(Ok(message)) => return Ok(message),
                Some(Err(error)) => return Err(lost(&self.to, &error)),
                None => return Err(lost(&self.to, &"it closed")),
            }
        }
    }

    async fn send(&mut self, message: Message) -> Outcome {
        let sent = self.socket.send(message).await;
        sent.map_err(|error| lost(&self.to, &error))
    }

    /// Sends one packet.
    pub(crate) async fn packet(&mut self, packet: &[u8]) -> Outcome {
        let mut message = Vec::with_capacity(packet.len() + 8);
        append(&mut message, packet, Offload::NONE)
            .map_err(|e| Failure::internal(format!("cannot send a packet: {e}")))?;
        self.send(Message::binary(message)).await
    }

    /// Looks a name up where the packets leave.
    pub(crate) async fn resolve(&mut self, host: &str) -> Outcome<Vec<IpAddr>> {
        if let Ok(address) = host.parse::<IpAddr>() {
            return Ok(vec![address]);
        }
        let wrong = || Failure::usage(format!("'{host}' is neither an address nor a host's name"));
        let fits = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
        if host.is_empty() || !host.bytes().all(fits) {
            return Err(wrong());
        }
        let question = Control::Resolve(Resolve {
            id: 1,
            name: host.to_owned(),
        });
        let text = question.to_text(Stage::Session).map_err(|_| wrong())?;
        self.send(Message::text(text)).await?;
        let answer = async {
            loop {
                if let Message::Text(text) = self.next().await?
                    && let Ok(Control::Resolved(found)) = Control::parse(&text, Stage::Session)
                {
                    return Ok(found);
                }
            }
        };
        let found = timeout(Duration::from_secs(10), answer)
            .await
            .map_err(|_| Failure::unavailable(format!("no answer about the name {host}")))??;
        match found.error {
            Some(error) => Err(Failure::unavailable(format!(
                "{host}: {} (asked at the gateway)",
                shown(&error)
            ))),
            None => Ok(found.addresses),
        }
    }

    /// Our address for talking to that one.
    pub(crate) fn source(&self, to: IpAddr) -> Outcome<IpAddr> {
        match (to, self.welcome.v6) {
            (IpAddr::V4(_), _) => Ok(self.welcome.v4.address.into()),
            (IpAddr::V6(_), Some(pair)) => Ok(pair.address.into()),
            (IpAddr::V6(_), None) => Err(Failure::unavailable("this gateway has no IPv6")),
        }
    }

    /// One echo; how long it took, or why there was no answer.
    pub(crate) async fn echo(
        &mut self,
        to: IpAddr,
        limit: Duration,
    ) -> Outcome<Result<Duration, String>> {
        let us = Pinger {
            from: self.source(to)?,
            to,
            id: std::process::id() as u16,
        };
        let start = Instant::now();
        self.packet(&us.request(1, 56)).await?;
        loop {
            let Ok(message) = timeout(limit.saturating_sub(start.elapsed()), self.next()).await
            else {
                return Ok(Err(format!("no answer in {limit:?}")));
            };
            match heard(&us, &message?).into_iter().next() {
                Some(Heard::Reply { .. }) => return Ok(Ok(start.elapsed())),
                Some(Heard::Failed { by, why, .. }) => return Ok(Err(format!("{by} says: {why}"))),
                None => {}
            }
        }
    }

    /// Leaves; the lease is free at once.
    pub(crate) async fn leave(mut self) {
        let parting = goodbye(&mut self.socket, close::NORMAL, "");
        let _late = timeout(Duration::from_secs(2), parting).await;
    }
}

fn lost(to: &Address, why: &dyn std::fmt::Display) -> Failure {
    Failure::unavailable(format!("the connection to {to} broke: {why}"))
}

fn heard(us: &Pinger, message: &Message) -> Vec<Heard> {
    match message {
        Message::Binary(data) => {
            let records = Reader::new(data).map_while(Result::ok);
            records.filter_map(|r| us.hear(r.packet)).collect()
        }
        _ => Vec::new(),
    }
}

/// What happened so far.
#[derive(Default)]
struct Tally {
    sent: u64,
    answered: u64,
    twice: u64,
    failed: u64,
    times: Vec<f64>,
    waiting: HashMap<u16, Instant>,
    done: HashMap<u16, ()>,
}

/// Pings; the status is that of ping.
pub(crate) async fn run(args: Ping) -> ExitCode {
    match ping(&args).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(failure) => {
            eprintln!("rvpn ping: {failure}");
            ExitCode::from(2)
        }
    }
}

async fn ping(args: &Ping) -> Outcome<bool> {
    let fits = |s: f64| (0.002..=3600.0).contains(&s);
    if !fits(args.interval) || !fits(args.timeout) {
        return Err(Failure::usage(format!(
            "'{}' and '{}': interval and timeout are between 0.002 and 3600 seconds",
            args.interval, args.timeout
        )));
    }
    if args.size > MOST {
        return Err(Failure::usage(format!(
            "a size of {} is over {MOST}",
            args.size
        )));
    }
    let (_, profile) = profile::choose(&args.choice)?;
    let mut talk = talk(&profile).await?;
    let to = target(&mut talk, args).await?;
    let from = talk.source(to)?;
    let header = if to.is_ipv6() { 48 } else { 28 };
    if u32::from(args.size) + header > talk.welcome.mtu {
        return Err(Failure::usage(format!(
            "a size of {} does not fit the tunnel's packets of {} bytes: at most {}",
            args.size,
            talk.welcome.mtu,
            talk.welcome.mtu - header
        )));
    }
    if !args.json {
        println!(
            "PING {} ({to}) from {from} through {}: {} bytes of data",
            args.host, talk.to, args.size
        );
    }
    let mut id = [0; 2];
    aws_lc_rs::rand::fill(&mut id).map_err(|_| Failure::internal("no random bytes"))?;
    let us = Pinger {
        from,
        to,
        id: u16::from_ne_bytes(id),
    };
    let mut tally = Tally::default();
    let begun = Instant::now();
    let result = exchange(args, &mut talk, &us, &mut tally).await;
    summary(args, &us, &tally, begun.elapsed());
    result?;
    talk.leave().await;
    Ok(tally.answered > 0)
}

async fn target(talk: &mut Talk, args: &Ping) -> Outcome<IpAddr> {
    let found = talk.resolve(&args.host).await?;
    let has_six = talk.welcome.v6.is_some();
    let fits = |a: &&IpAddr| match a {
        IpAddr::V4(_) => !args.six,
        IpAddr::V6(_) => !args.four && (args.six || has_six),
    };
    let mut fitting = found.iter().filter(fits);
    fitting.next().copied().ok_or_else(|| {
        let wanted = match (args.four, args.six) {
            (true, _) => "IPv4",
            (_, true) => "IPv6",
            _ => "usable",
        };
        Failure::unavailable(format!("{} has no {wanted} address", args.host))
    })
}

async fn exchange(args: &Ping, talk: &mut Talk, us: &Pinger, tally: &mut Tally) -> Outcome {
    let limit = Duration::from_secs_f64(args.timeout);
    let mut ticks = interval_at(Instant::now(), Duration::from_secs_f64(args.interval));
    // Nobody hears a client that never pings the connection itself.
    let keepalive = Duration::from_secs(talk.welcome.keepalive_s.into());
    let mut alive = interval_at(Instant::now() + keepalive, keepalive);
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    let mut last = Instant::now();
    loop {
        let all_sent = args.count > 0 && tally.sent >= args.count;
        if all_sent && tally.waiting.is_empty() {
            return Ok(());
        }
        tokio::select! {
            _ = &mut interrupted => return Ok(()),
            _ = ticks.tick(), if !all_sent => {
                let seq = (tally.sent + 1) as u16;
                tally.sent += 1;
                last = Instant::now();
                tally.done.remove(&seq);
                tally.waiting.insert(seq, last);
                talk.packet(&us.request(seq, args.size.into())).await?;
            }
            () = sleep_until(last + limit), if all_sent => return Ok(()),
            _ = alive.tick() => talk.send(Message::Ping(Vec::new().into())).await?,
            message = talk.next() => {
                for heard in heard(us, &message?) {
                    tally.note(args, us, heard);
                }
            }
        }
        // What is answered later than this does not count.
        tally
            .waiting
            .retain(|_, at| at.elapsed() < limit.max(Duration::from_secs(10)));
    }
}

impl Tally {
    fn note(&mut self, args: &Ping, us: &Pinger, heard: Heard) {
        match heard {
            Heard::Reply { seq, hops, bytes } => {
                let twice = self.done.insert(seq, ()).is_some();
                let Some(at) = self.waiting.remove(&seq) else {
                    self.twice += u64::from(twice);
                    return;
                };
                let ms = at.elapsed().as_secs_f64() * 1000.0;
                self.answered += 1;
                self.times.push(ms);
                if args.quiet {
                } else if args.json {
                    println!(
                        "{}",
                        json!({"seq": seq, "bytes": bytes, "hops": hops, "ms": ms})
                    );
                } else {
                    println!(
                        "{bytes} bytes from {}: icmp_seq={seq} ttl={hops} time={ms:.2} ms",
                        us.to
                    );
                }
            }
            Heard::Failed { by, seq, why } => {
                if self.waiting.remove(&seq).is_none() {
                    return;
                }
                self.failed += 1;
                if args.quiet {
                } else if args.json {
                    println!("{}", json!({"seq": seq, "from": by, "error": why}));
                } else {
                    println!("from {by}: icmp_seq={seq} {why}");
                }
            }
        }
    }
}

fn summary(args: &Ping, us: &Pinger, tally: &Tally, took: Duration) {
    let loss = match tally.sent {
        0 => 0.0,
        sent => 100.0 * (sent - tally.answered) as f64 / sent as f64,
    };
    let n = tally.times.len() as f64;
    let least = tally.times.iter().copied().fold(f64::INFINITY, f64::min);
    let most = tally.times.iter().copied().fold(0.0, f64::max);
    let mean = tally.times.iter().sum::<f64>() / n;
    let spread = (tally.times.iter().map(|t| (t - mean).powi(2)).sum::<f64>() / n).sqrt();
    if args.json {
        let times =
            (n > 0.0).then(|| json!({"min": least, "avg": mean, "max": most, "mdev": spread}));
        let line = json!({
            "summary": true,
            "host": args.host,
            "address": us.to,
            "sent": tally.sent,
            "received": tally.answered,
            "duplicates": tally.twice,
            "errors": tally.failed,
            "loss": loss,
            "seconds": took.as_secs_f64(),
            "ms": times,
        });
        println!("{line}");
        return;
    }
    println!("\n--- {} ping statistics ---", args.host);
    let mut also = String::new();
    if tally.twice > 0 {
        also.push_str(&format!(" +{} duplicates,", tally.twice));
    }
    if tally.failed > 0 {
        also.push_str(&format!(" +{} errors,", tally.failed));
    }
    println!(
        "{} packets transmitted, {} received,{also} {loss:.0}% packet loss, time {}ms",
        tally.sent,
        tally.answered,
        took.as_millis()
    );
    if n > 0.0 {
        println!("rtt min/avg/max/mdev = {least:.3}/{mean:.3}/{most:.3}/{spread:.3} ms");
    }
}
