//! The half of `up` without rights: TLS, the session, the packets.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use caps::CapSet;
use rvpn_proto::control::{Policy, Welcome, close};
use tokio::net::TcpStream;
use tokio::time::{Instant, interval, sleep, timeout};
use tokio_rustls::TlsConnector;

use super::apart::Apart;
use super::fd::tune;
use super::parent::STEADY;
use super::pump::{Carrier, Device, End, Session};
use super::wire::{Order, Report, Wire};
use crate::fail::{Failure, Kind, Outcome, While as _};
use crate::link::{Ask, Denied, Socket, goodbye, open, sent_away};
use crate::profile::{Address, Hidden};
use crate::tls;

/// The first wait between attempts that follow each other, and the longest.
const SOON: Duration = Duration::from_millis(500);
const LATE: Duration = Duration::from_secs(30);
/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(6);

/// How long a goodbye may take.
const PARTING: Duration = Duration::from_secs(2);

/// What the other half says to a welcome.
enum Verdict {
    Accepted,
    Refused(String),
    Stop,
}

/// Everything the child knows.
struct Child {
    wire: Wire,
    to: Address,
    instance: String,
    offload: bool,
    mtu: Option<u16>,
    connector: TlsConnector,
    ticket: Option<String>,
    carrier: Option<Carrier>,
    /// Attempts that failed since the last success.
    failures: u32,
    /// A gateway was there once.
    welcomed: bool,
}

/// What interrupts whatever is being done.
enum Called {
    Changed,
    Stop,
}

/// Runs as a child of `up`, which is at the other end of standard input.
pub(crate) async fn run() -> Outcome {
    give_up_rights()?;
    // The crypto library's first random bytes take tens of milliseconds, which
    // pass while the connection is being made.
    std::thread::spawn(|| aws_lc_rs::rand::fill(&mut [0]));
    let socket = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .while_doing("find the other half of 'rvpn up'")?;
    let wire = Wire::new(socket).while_doing("talk to the other half of 'rvpn up'")?;
    let Some((
        Order::Begin {
            address,
            trust,
            authorities,
            instance,
            offload,
            mtu,
            welcomed,
        },
        _,
    )) = receive(&wire).await?
    else {
        return Err(Failure::usage("this is a part of 'rvpn up': run that"));
    };
    let to: Address = address.parse().map_err(Failure::usage)?;
    let mut child = Child {
        wire,
        to,
        instance,
        offload,
        mtu,
        connector: tls::connector(&trust, authorities.as_deref())?,
        ticket: None,
        carrier: None,
        failures: 0,
        welcomed,
    };
    match child.sessions().await {
        Ok(()) => child.report(&Report::Left).await,
        Err(failure) => {
            let report = Report::Failed {
                why: failure.to_string(),
                grounds: failure.kind.into(),
            };
            child.report(&report).await
        }
    }
}

/// Nothing this process starts, or is made to start, gets rights back; nobody
/// but root reads its memory.
fn give_up_rights() -> Outcome {
    // Where there is only one user, or the file has capabilities, they would stay.
    for set in [CapSet::Inheritable, CapSet::Permitted, CapSet::Effective] {
        caps::clear(None, set).while_doing("give up rights")?;
    }
    nix::sys::prctl::set_no_new_privs().while_doing("give up rights")?;
    nix::sys::prctl::set_dumpable(false).while_doing("hide this process's memory")
}

async fn receive(wire: &Wire) -> Outcome<Option<(Order, Option<OwnedFd>)>> {
    wire.receive()
        .await
        .while_doing("hear the other half of 'rvpn up'")
}

impl Child {
    async fn report(&self, report: &Report) -> Outcome {
        self.wire
            .send(report, None)
            .await
            .while_doing("tell the other half of 'rvpn up'")
    }

    /// One session after another, until told to stop or refused for good.
    async fn sessions(&mut self) -> Outcome {
        loop {
            let denied = match self.session().await {
                Ok(None) => return Ok(()),
                Ok(Some(denied)) | Err(denied) => denied,
            };
            // Whoever is in between could else end the tunnel, and with it what it
            // protects, by answering in the gateway's place.
            let between = self.welcomed && denied.failure.kind == Kind::Protocol;
            if !denied.again && !between {
                return Err(denied.failure);
            }
            let wait = match denied.after {
                Some(after) if self.failures > 0 => after.clamp(SOON, LATE * 4),
                Some(after) => after.min(LATE * 4),
                None => backoff(self.failures),
            };
            self.failures += 1;
            let report = Report::Lost {
                why: denied.failure.to_string(),
                retry_ms: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
            };
            self.report(&report).await?;
            tokio::select! {
                () = sleep(wait) => {}
                called = called(&self.wire) => match called? {
                    Called::Stop => return Ok(()),
                    // What failed before may work now.
                    Called::Changed => self.failures = 0,
                }
            }
        }
    }

    /// One session; nothing if told to stop.
    async fn session(&mut self) -> Result<Option<Denied>, Denied> {
        let Some((tcp, token)) = self.dial().await? else {
            return Ok(None);
        };
        let ask = Ask {
            to: &self.to,
            token: &token,
            instance: &self.instance,
            offload: self.offload,
            mtu: self.mtu,
            ticket: self.ticket.as_deref(),
            // The other half judges the welcome; it knows the networks here.
            policy: Policy::default(),
        };
        let opened = tokio::select! {
            opened = open(&self.connector, ask, tcp) => opened?,
            called = stop(&self.wire) => return called.map(|()| None).map_err(Denied::from),
        };
        let (mut socket, welcome) = opened;
        match self.accepted(&welcome).await? {
            Verdict::Accepted => {}
            Verdict::Stop => {
                let parting = goodbye(&mut socket, close::NORMAL, "");
                let _late = timeout(PARTING, parting).await;
                return Ok(None);
            }
            Verdict::Refused(why) => {
                let parting = goodbye(&mut socket, close::POLICY, &why);
                let _late = timeout(PARTING, parting).await;
                return Err(Failure::new(Kind::Protocol, why).into());
            }
        }
        self.welcomed = true;
        let begun = Instant::now();
        let end = self.carry(&mut socket, &welcome).await;
        // One that welcomes and closes at once is not met at full speed.
        if begun.elapsed() > STEADY {
            self.failures = 0;
        }
        let to = &self.to;
        match end? {
            None => {
                let parting = goodbye(&mut socket, close::NORMAL, "");
                let _late = timeout(PARTING, parting).await;
                Ok(None)
            }
            Some(End::Lost(why)) => Ok(Some(
                Failure::unavailable(format!("the connection to {to} broke: {why}")).into(),
            )),
            Some(End::SentAway(said, frame)) => Ok(Some(sent_away(to, said, frame))),
            Some(End::Device(error)) => {
                Err(Failure::internal(format!("the tunnel's device failed: {error}")).into())
            }
        }
    }

    /// A connection made by the other half, and a token.
    async fn dial(&mut self) -> Result<Option<(Apart, Hidden)>, Denied> {
        self.report(&Report::Dial).await?;
        let (fd, token) = loop {
            match receive(&self.wire).await? {
                None | Some((Order::Stop, _)) => return Ok(None),
                Some((Order::Dialled { token }, Some(fd))) => break (fd, token),
                Some((Order::NotDialled { why, last }, _)) => {
                    let kind = if last {
                        Kind::Config
                    } else {
                        Kind::Unavailable
                    };
                    return Err(Failure::new(kind, why).into());
                }
                Some(_) => {}
            }
        };
        let tcp = TcpStream::from_std(fd.into()).while_doing("use a connection")?;
        // Without it the kernel would hold packets that could still be put in order here.
        tune(tcp.as_fd()).while_doing("prepare a connection")?;
        let connected = async {
            tcp.writable().await?;
            match tcp.take_error()? {
                Some(error) => Err(error),
                None => tcp.peer_addr().map(drop),
            }
        };
        tokio::select! {
            connected = timeout(CONNECT, connected) => match connected {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    let text = format!("cannot connect to {}: {error}", self.to);
                    return Err(Failure::unavailable(text).into());
                }
                Err(_) => {
                    let text = format!("{} does not answer in {CONNECT:?}", self.to);
                    return Err(Failure::unavailable(text).into());
                }
            },
            called = called(&self.wire) => match called? {
                Called::Stop => return Ok(None),
                Called::Changed => {
                    let mut denied = Denied::from(Failure::unavailable("the network changed"));
                    denied.after = Some(Duration::ZERO);
                    return Err(denied);
                }
            },
        }
        Ok(Some((Apart::new(tcp), token)))
    }

    /// Whether the other half accepts the welcome, and has a device for it.
    async fn accepted(&mut self, welcome: &Welcome) -> Result<Verdict, Denied> {
        let report = Report::Welcomed {
            welcome: Box::new(welcome.clone()),
        };
        self.report(&report).await?;
        loop {
            match receive(&self.wire).await? {
                None | Some((Order::Stop, _)) => return Ok(Verdict::Stop),
                Some((Order::Refuse { why }, _)) => return Ok(Verdict::Refused(why)),
                Some((Order::Device { datagrams }, Some(fd))) => {
                    let mut key = [0; 16];
                    aws_lc_rs::rand::fill(&mut key).while_doing("get random bytes")?;
                    let (a, b) = key.split_at(8);
                    let half = |h: &[u8]| h.try_into().map(u64::from_ne_bytes).unwrap_or(0);
                    let device = Device::new(fd).while_doing("use the tunnel's device")?;
                    self.carrier = Some(Carrier::new(device, datagrams, [half(a), half(b)]));
                    return Ok(Verdict::Accepted);
                }
                Some((Order::Resume, _)) if self.carrier.is_some() => {
                    return Ok(Verdict::Accepted);
                }
                Some(_) => {}
            }
        }
    }

    /// Packets, until there is an end; nothing if told to stop.
    async fn carry(
        &mut self,
        socket: &mut Socket<Apart>,
        welcome: &Welcome,
    ) -> Result<Option<End>, Denied> {
        let Some(carrier) = &mut self.carrier else {
            return Ok(None);
        };
        let mut session = Session::new(socket, &mut self.ticket, welcome, carrier.datagrams);
        let mut second = interval(Duration::from_secs(1));
        loop {
            tokio::select! {
                end = session.run(carrier) => return Ok(Some(end)),
                called = called(&self.wire) => match called? {
                    Called::Stop => return Ok(None),
                    Called::Changed => session.probe(),
                },
                _ = second.tick() => {
                    let report = Report::Counted {
                        outbound: carrier.outbound,
                        inbound: carrier.inbound,
                        rtt_ms: carrier.rtt.map(|d| d.as_secs_f64() * 1000.0),
                    };
                    self.wire.send(&report, None).await.while_doing("tell the other half")?;
                }
            }
        }
    }
}

async fn called(wire: &Wire) -> Outcome<Called> {
    loop {
        match receive(wire).await? {
            None | Some((Order::Stop, _)) => return Ok(Called::Stop),
            Some((Order::Changed, _)) => return Ok(Called::Changed),
            Some(_) => {}
        }
    }
}

async fn stop(wire: &Wire) -> Outcome {
    while !matches!(called(wire).await?, Called::Stop) {}
    Ok(())
}

/// Twice as long each time, and never the same for two clients.
pub(crate) fn backoff(failures: u32) -> Duration {
    if failures == 0 {
        return Duration::ZERO;
    }
    let whole = SOON.saturating_mul(1 << (failures - 1).min(10)).min(LATE);
    let mut random = [0; 4];
    // Without randomness it is only less fair.
    let _filled = aws_lc_rs::rand::fill(&mut random);
    let part = f64::from(u32::from_ne_bytes(random)) / f64::from(u32::MAX);
    whole.mul_f64(0.5 + part / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_end_growing() {
        assert_eq!(backoff(0), Duration::ZERO);
        for (failures, most) in [(1, SOON), (2, SOON * 2), (30, LATE)] {
            for _ in 0..50 {
                let wait = backoff(failures);
                assert!(wait >= most / 2 && wait <= most, "{failures}: {wait:?}");
            }
        }
    }
}
