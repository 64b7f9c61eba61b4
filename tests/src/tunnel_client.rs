//! A small client of the gateway for tests: the native protocol and the four
//! older dialects behind one interface, and everything a client should not do.
//!
//! What the older dialects put around a packet is written down here once more,
//! so that a test compares two readings of the specification.

mod ends;
mod target;

use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use rvpn_proto::control::{Hello, Message as Control, OFFLOAD, Stage, Welcome};
use tokio::time::sleep;
use tokio_tungstenite::tungstenite::Message;

use crate::PATIENCE;

pub use self::ends::{Event, Receiver, Sender};
pub use self::target::{DIALECTS, Opened, Socket, Speech, Stream, Target};

/// What a client says at first, where it has a choice.
#[derive(Clone, Debug, Default)]
pub struct Login {
    pub instance: String,
    pub ticket: Option<String>,
    pub mtu: Option<u16>,
}

/// A session that is open.
pub struct Session {
    pub tx: Sender,
    pub rx: Receiver,
    /// Its addresses, as it has to use them.
    pub v4: Ipv4Addr,
    pub v6: Option<Ipv6Addr>,
    pub welcome: Option<Welcome>,
    /// The text of the greeting, if there was one.
    pub greeting: Option<String>,
    /// From the answer to the upgrade to the greeting or welcome.
    pub waited: Duration,
    /// The client's end of the TCP connection.
    pub local: SocketAddr,
}

/// How the gateway ended it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Closed {
    pub code: u16,
    pub reason: String,
}

impl Session {
    /// Logs in and waits for the addresses; for a raw client these are
    /// anything it likes, here 127.0.1.2. Told to come again, as on a machine that
    /// is slow to clean a lease, it does.
    pub async fn open(target: &Target, speech: Speech, token: &str) -> Session {
        let begun = Instant::now();
        loop {
            let (path, login) = (speech.path(), Login::default());
            match Session::try_open(target, speech, path, Some(token), login).await {
                Ok(session) => return session,
                Err(again) if again.code == 1013 && begun.elapsed() < PATIENCE => {
                    sleep(Duration::from_millis(200)).await;
                }
                Err(closed) => panic!("{speech:?} was not let in: {closed:?}"),
            }
        }
    }

    /// The same on another path, without a token, or with a ticket. An error is
    /// the close frame, or the status in its place.
    pub async fn try_open(
        target: &Target,
        speech: Speech,
        path: &str,
        token: Option<&str>,
        login: Login,
    ) -> Result<Session, Closed> {
        let opened = target.open(path, token).await.map_err(|answer| Closed {
            code: answer.status().as_u16(),
            reason: String::new(),
        })?;
        let Opened {
            socket,
            local,
            since,
        } = opened;
        let (sink, stream) = socket.split();
        let mut session = Session {
            tx: Sender { speech, sink },
            rx: Receiver {
                speech,
                stream,
                waiting: VecDeque::new(),
                padding: Vec::new(),
                noise: Vec::new(),
            },
            v4: Ipv4Addr::new(127, 0, 1, 2),
            v6: None,
            welcome: None,
            greeting: None,
            waited: Duration::ZERO,
            local,
        };
        match speech {
            Speech::Native { offload } => session.greet(offload, login).await?,
            Speech::Raw => {}
            Speech::Text4 | Speech::Text46 | Speech::Padded => session.greeted().await?,
        }
        session.waited = since.elapsed();
        Ok(session)
    }

    async fn greet(&mut self, offload: bool, login: Login) -> Result<(), Closed> {
        let mut hello = Hello {
            versions: vec![1],
            name: "lab".to_owned(),
            instance: login.instance,
            ticket: login.ticket,
            mtu: login.mtu,
            ..Hello::default()
        };
        if hello.instance.is_empty() {
            hello.instance = "lab".to_owned();
        }
        if offload {
            hello.capabilities.push(OFFLOAD.to_owned());
        }
        let text = Control::Hello(hello)
            .to_text(Stage::BeforeLogin)
            .expect("a hello");
        self.tx.message(Message::text(text)).await;
        loop {
            match self.rx.event().await {
                Event::Text(text) => match Control::parse(&text, Stage::Session) {
                    Ok(Control::Welcome(welcome)) => {
                        self.v4 = welcome.v4.address;
                        self.v6 = welcome.v6.map(|pair| pair.address);
                        self.welcome = Some(*welcome);
                        return Ok(());
                    }
                    // The close frame that follows says the same.
                    Ok(Control::Goodbye(_)) => {}
                    other => panic!("in place of a welcome: {other:?}"),
                },
                Event::Closed(closed) => return Err(closed),
                other => panic!("in place of a welcome: {other:?}"),
            }
        }
    }

    async fn greeted(&mut self) -> Result<(), Closed> {
        let text = loop {
            match self.rx.event().await {
                Event::Text(text) => break text,
                Event::Packet(body, _) if self.rx.speech == Speech::Padded => {
                    break String::from_utf8(body.to_vec()).expect("a greeting in ASCII");
                }
                Event::Noise => {}
                Event::Closed(closed) => return Err(closed),
                other => panic!("in place of a greeting: {other:?}"),
            }
        };
        let mut bases = text.split(',').map(|subnet| {
            let (base, length) = subnet.split_once('/').expect("a subnet");
            assert!(length.parse::<u8>().is_ok(), "{text}");
            base
        });
        let v4: Ipv4Addr = bases.next().and_then(|b| b.parse().ok()).expect("IPv4");
        self.v4 = (u32::from(v4) + 2).into();
        self.v6 = bases.next().map(|base| {
            // Full groups, which old clients split at the colons.
            assert_eq!(
                base.split(':').filter(|g| !g.is_empty()).count(),
                8,
                "{text}"
            );
            let base: Ipv6Addr = base.parse().expect("IPv6");
            (u128::from(base) + 1).into()
        });
        assert_eq!(self.v6.is_some(), self.rx.speech.has_v6(), "{text}");
        self.greeting = Some(text);
        Ok(())
    }

    /// Its address of the family of `like`.
    pub fn source(&self, like: &str) -> String {
        if like.contains(':') {
            self.v6.expect("a client with IPv6").to_string()
        } else {
            self.v4.to_string()
        }
    }

    /// Sends an echo request there and waits for the answer to it.
    pub async fn ping(&mut self, host: &str, id: u16, sequence: u16) {
        let payload = [id.to_be_bytes(), sequence.to_be_bytes()].concat();
        let request = crate::packet::echo(&self.source(host), host, id, sequence, &payload);
        self.tx.send(&request).await;
        loop {
            let packet = self.rx.packet().await;
            // Type, code, checksum, identifier, sequence.
            let (kind, at) = if host.contains(':') {
                (129, 40)
            } else {
                (0, 20)
            };
            let body = packet.get(at..).unwrap_or_default();
            if body.first() == Some(&kind)
                && body.get(4..) == Some([&payload[..], &payload].concat().as_slice())
            {
                return;
            }
        }
    }
}

/// Runs a client's part on its own machine, on one thread.
pub fn on<T: Send, F: Future<Output = T>>(
    machine: &crate::Ns,
    part: impl FnOnce() -> F + Send,
) -> T {
    machine.run(|| {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("runtime")
            .block_on(part())
    })
}
