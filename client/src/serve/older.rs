//! The command line of the older clients, and what they speak: packer v1.
//!
//! `--locals http:a.example:3000,https:a.example:8443 --stunneld wss://host/
//! --secret S`: the names go into a token that the secret signs, and each
//! visitor goes to a port of this machine by what it speaks and the name it
//! asks for; whoever asks for no name of ours gets the last port given for
//! what it speaks, as it always was.

mod visitor;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rvpn_proto::name::Name;
use rvpn_proto::packer::{Decoder, Frame, Limits, Piece, Profile, Word};
use rvpn_proto::streams::{Offered, ServedAs};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::{Instant, interval_at, sleep, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};

use self::visitor::{Guest, Local, Speaks};
use super::args::Serve;
use super::show::Show;
use super::target::Target;
use super::visit::News;
use super::{Calls, LATE, NEWS, PATIENCE, control};
use crate::fail::{Failure, Kind, Outcome, While as _};
use crate::link::{Denied, refused, sent_away};
use crate::profile::{Address, Hidden, Trust};
use crate::text::now;
use crate::up::carry::backoff;
use crate::{reach, tls};

/// Visitors at once.
const VISITORS: usize = 1024;
/// Frames that wait for the connection.
const WAITING: usize = 64;
/// Longest message, and longest word beside visitors' bytes.
const MESSAGE: usize = 4 * 1024 * 1024;
const WORD: usize = 64 * 1024;
/// How often the connection is asked whether it is there, and how long it has.
const PING: Duration = Duration::from_secs(15);
const SILENCE: Duration = Duration::from_secs(40);

trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Where the gateway is, as the older clients write it.
struct Place {
    to: Address,
    path: String,
    tls: bool,
}

fn place(url: &str) -> Outcome<Place> {
    let wrong = || {
        Failure::usage(format!(
            "--stunneld '{url}': write it like wss://gateway.example.org:443/"
        ))
    };
    let (scheme, rest) = url.split_once("://").ok_or_else(wrong)?;
    let (tls, usual) = match scheme {
        "wss" | "https" => (true, 443),
        "ws" | "http" => (false, 80),
        _ => return Err(wrong()),
    };
    let (authority, path) = match rest.find('/') {
        Some(at) => rest.split_at(at),
        None => (rest, "/"),
    };
    if authority.contains('@') || path.contains(['?', '#']) {
        return Err(wrong());
    }
    let mut to: Address = authority.parse().map_err(|_| wrong())?;
    let has_port = authority
        .rsplit_once(':')
        .is_some_and(|(host, _)| !host.contains(':') || host.ends_with(']'));
    if !has_port {
        to.port = usual;
    }
    Ok(Place {
        to,
        path: path.to_owned(),
        tls,
    })
}

/// `http:a.example:3000`, also with slashes.
fn local(text: &str) -> Outcome<Local> {
    let wrong = || {
        Failure::usage(format!(
            "--locals '{text}': write it like http:a.example:3000 or https:a.example:8443"
        ))
    };
    let (scheme, rest) = text.split_once(':').ok_or_else(wrong)?;
    let speaks = match scheme {
        "http" => Speaks::Http,
        "https" => Speaks::Https,
        _ => return Err(wrong()),
    };
    let rest = rest.strip_prefix("//").unwrap_or(rest);
    let (name, port) = rest.rsplit_once(':').ok_or_else(wrong)?;
    let port = port.parse().ok().filter(|p| *p > 0).ok_or_else(wrong)?;
    let name = Name::parse(name).map_err(|_| wrong())?;
    Ok(Local { speaks, name, port })
}

/// What the older clients sign: the names, and when.
fn token(args: &Serve, locals: &[Local]) -> Outcome<Hidden> {
    let said = |text: &str| -> Outcome<String> {
        if text != "-" {
            return Ok(text.to_owned());
        }
        let mut line = String::new();
        std::io::stdin()
            .read_line(&mut line)
            .while_doing("read standard input")?;
        Ok(line.trim_end_matches(['\r', '\n']).to_owned())
    };
    if let Some(token) = &args.token {
        let token = said(token)?;
        let fits = token
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        return match fits && !token.is_empty() {
            true => Ok(Hidden(token)),
            false => Err(Failure::usage(
                "--token is no token: it has letters no token has",
            )),
        };
    }
    let Some(secret) = &args.secret else {
        return Err(Failure::usage("--locals needs --secret or --token"));
    };
    let secret = said(secret)?;
    let mut domains: Vec<&str> = locals.iter().map(|l| l.name.as_str()).collect();
    domains.dedup();
    let claims = json!({"domains": domains, "iat": now()});
    let key = EncodingKey::from_secret(secret.as_bytes());
    let signed = jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &key);
    signed.map(Hidden).while_doing("sign a token")
}

/// Serves as an older client does, until told to end.
pub(super) async fn run(args: &Serve) -> Outcome {
    let locals = args.locals.iter().map(|l| local(l));
    let locals: Vec<Local> = locals.collect::<Outcome<_>>()?;
    let place = place(args.stunneld.as_deref().unwrap_or_default())?;
    if args.bg || args.auth.is_some() || args.proxy_protocol {
        return Err(Failure::usage(
            "--bg, --auth and --proxy-protocol are not for --locals: name the targets instead, \
             like 'rvpn serve 3000'",
        ));
    }
    let token = token(args, &locals)?;
    let trust = Trust {
        fingerprint: args.pin.clone(),
        ca_file: None,
    };
    let targets = (1_u32..).zip(&locals).map(|(id, local)| Target {
        id,
        service: match local.speaks {
            Speaks::Http => Offered::Http,
            Speaks::Https => Offered::Tls,
        },
        host: "127.0.0.1".to_owned(),
        port: local.port,
        name: Some(local.name.to_string()),
        public_port: None,
    });
    let show = Show::new(place.to.to_string(), targets.collect(), args.json);
    let (listening, questions) = control::listen()?;
    let (news, heard) = mpsc::channel(NEWS);
    let mut older = Older {
        place,
        token,
        trust,
        locals: locals.into(),
        show,
        calls: Calls::new(questions)?,
        news,
        heard,
    };
    let served = older.sessions().await;
    drop(listening);
    if served.is_ok() {
        older.show.done();
    }
    served
}

impl Place {
    /// Logs in as the older clients do, by the address.
    async fn open(
        &self,
        token: &Hidden,
        trust: &Trust,
    ) -> Result<WebSocketStream<Box<dyn Duplex>>, Denied> {
        let to = &self.to;
        let tcp = reach::connect(to).await?;
        let io: Box<dyn Duplex> = match self.tls {
            true => {
                let connector = tls::connector(trust, None)?;
                Box::new(tls::handshake(&connector, to, tcp).await?)
            }
            false => Box::new(tcp),
        };
        let scheme = if self.tls { "wss" } else { "ws" };
        let host = match (self.tls, to.port) {
            (false, 80) => to.to_string().trim_end_matches(":80").to_owned(),
            (false, _) => to.to_string(),
            (true, _) => to.authority(),
        };
        let (path, token) = (&self.path, &token.0);
        let url = format!("{scheme}://{host}{path}?access_token={token}");
        // The address holds the token, so its error is not repeated.
        let request = url
            .into_client_request()
            .map_err(|_| Failure::usage("--stunneld cannot be asked: is its address right?"))?;
        let config = WebSocketConfig::default()
            .read_buffer_size(64 * 1024)
            .max_write_buffer_size(MESSAGE)
            .max_message_size(Some(MESSAGE))
            .max_frame_size(Some(MESSAGE));
        let upgraded = tokio_tungstenite::client_async_with_config(request, io, Some(config));
        match timeout(PATIENCE, upgraded).await {
            Err(_) => {
                let text = format!("{to} does not finish the upgrade in {PATIENCE:?}");
                Err(Failure::unavailable(text).into())
            }
            Ok(Ok((socket, _))) => Ok(socket),
            Ok(Err(Error::Http(answer))) => Err(refused(to, "", &answer)),
            Ok(Err(Error::Io(error))) => {
                let text = format!("{to} ended the connection: {error}");
                Err(Failure::unavailable(text).into())
            }
            Ok(Err(error)) => {
                let text = format!("{to} does not speak WebSocket as it should: {error}");
                Err(Failure::new(Kind::Protocol, text).into())
            }
        }
    }
}

struct Older {
    place: Place,
    token: Hidden,
    trust: Trust,
    locals: Arc<[Local]>,
    show: Show,
    calls: Calls,
    news: mpsc::Sender<News>,
    heard: mpsc::Receiver<News>,
}

impl Older {
    async fn sessions(&mut self) -> Outcome {
        let (mut failures, mut welcomed) = (0, false);
        loop {
            let begun = Instant::now();
            let opened = tokio::select! {
                opened = self.place.open(&self.token, &self.trust) => opened,
                () = self.calls.stop(&mut self.show) => return Ok(()),
            };
            let denied = match opened {
                Ok(socket) => {
                    welcomed = true;
                    self.show.serving(self.served());
                    match self.carry(socket).await {
                        Ok(()) => return Ok(()),
                        Err(denied) => denied,
                    }
                }
                Err(denied) => denied,
            };
            if !welcomed || !denied.again {
                return Err(denied.failure);
            }
            if begun.elapsed() > super::STEADY {
                failures = 0;
            }
            let wait = match denied.after {
                Some(after) => after.min(LATE),
                None => backoff(failures),
            };
            failures += 1;
            self.show.lost(&denied.failure.to_string(), wait);
            tokio::select! {
                () = sleep(wait) => {}
                () = self.calls.stop(&mut self.show) => return Ok(()),
            }
        }
    }

    /// The names, as visitors type them: this protocol does not say.
    fn served(&self) -> BTreeMap<u32, ServedAs> {
        let at = |local: &Local| ServedAs {
            name: Some(local.name.to_string()),
            port: None,
            urls: vec![match local.speaks {
                Speaks::Http => format!("http://{}", local.name),
                Speaks::Https => format!("https://{}", local.name),
            }],
        };
        (1..).zip(self.locals.iter().map(at)).collect()
    }

    async fn carry(&mut self, socket: WebSocketStream<Box<dyn Duplex>>) -> Result<(), Denied> {
        let (mut sink, mut source) = socket.split();
        let (out, mut outgoing) = mpsc::channel::<Message>(WAITING);
        // Reading never waits for writing: each side may wait for the other.
        let writing = tokio::spawn(async move {
            while let Some(message) = outgoing.recv().await {
                if sink.send(message).await.is_err() {
                    return;
                }
            }
            let _gone = sink.close().await;
        });
        let mut guests = Guests {
            out: out.clone(),
            locals: Arc::clone(&self.locals),
            news: self.news.clone(),
            by_id: HashMap::new(),
        };
        let mut decoder = Decoder::new(Limits {
            data: MESSAGE,
            word: WORD,
        });
        let mut pings = interval_at(Instant::now() + PING, PING);
        let mut draw = tokio::time::interval(super::DRAW);
        let mut last = Instant::now();
        let to = self.place.to.clone();
        let lost = |why: &str| {
            let text = format!("the connection to {to} broke: {why}");
            Denied::from(Failure::unavailable(text))
        };
        let end = loop {
            tokio::select! {
                message = source.next() => {
                    last = Instant::now();
                    match message {
                        Some(Ok(Message::Binary(data))) => {
                            if let Err(why) = guests.take(&mut decoder, &data) {
                                let text = format!("{to} does not speak packer: {why}");
                                break Err(Failure::new(Kind::Protocol, text).into());
                            }
                        }
                        Some(Ok(Message::Close(frame))) => break Err(sent_away(&to, None, frame)),
                        Some(Ok(_)) => {}
                        Some(Err(error)) => break Err(lost(&error.to_string())),
                        None => break Err(lost("it closed")),
                    }
                }
                Some(news) = self.heard.recv() => self.show.news(&news),
                () = self.calls.stop(&mut self.show) => break Ok(()),
                _ = pings.tick() => {
                    if last.elapsed() > SILENCE {
                        break Err(lost("nothing was heard from it"));
                    }
                    // With a full queue there is life enough.
                    let _full = out.try_send(Message::Ping(Vec::new().into()));
                }
                _ = draw.tick() => self.show.draw(),
            }
        };
        drop((guests, out));
        let _late = timeout(super::PARTING, writing).await;
        end
    }
}

/// Visitors of one connection.
struct Guests {
    out: mpsc::Sender<Message>,
    locals: Arc<[Local]>,
    news: mpsc::Sender<News>,
    by_id: HashMap<String, Guest>,
}

impl Guests {
    fn take(&mut self, decoder: &mut Decoder, mut data: &[u8]) -> Result<(), String> {
        while let Some(piece) = decoder.next(&mut data).map_err(|f| f.to_string())? {
            match piece {
                Piece::Data { head, bytes, .. } => self.data(head.id, head.word, bytes),
                Piece::Word { head, body } => match head.word {
                    Word::Control => self.control(body),
                    Word::End => {
                        if let Some(guest) = self.by_id.get(head.id) {
                            guest.end();
                        }
                    }
                    Word::Error => {
                        self.by_id.remove(head.id);
                    }
                    Word::Pause => self.hold(head.id, true),
                    Word::Resume => self.hold(head.id, false),
                    // Servers that speak first are not for these clients.
                    Word::Connection | Word::Data(_) => {}
                },
            }
        }
        Ok(())
    }

    fn hold(&self, id: &str, on: bool) {
        if let Some(guest) = self.by_id.get(id) {
            guest.hold(on);
        }
    }

    /// Answers what is asked; what is told is of no use here.
    fn control(&self, body: &[u8]) {
        let Ok(Value::Array(said)) = serde_json::from_slice(body) else {
            return;
        };
        let Some(id @ 1..) = said.first().and_then(Value::as_i64) else {
            return;
        };
        let answer = json!([-id, null]).to_string();
        let mut frame = Vec::new();
        if Frame::control(answer.as_bytes())
            .encode(Profile::Node2017, &mut frame)
            .is_ok()
        {
            let _full = self.out.try_send(Message::binary(frame));
        }
    }

    fn data(&mut self, id: &str, word: Word<'_>, bytes: &[u8]) {
        self.by_id.retain(|_, guest| !guest.is_over());
        if let Some(guest) = self.by_id.get(id) {
            if !guest.give(bytes) {
                self.by_id.remove(id);
            }
            return;
        }
        if bytes.is_empty() {
            return;
        }
        let speaks = match word {
            Word::Data("http") => Some(Speaks::Http),
            Word::Data("https") => Some(Speaks::Https),
            _ => None,
        };
        let local = speaks.and_then(|speaks| visitor::choose(&self.locals, speaks, bytes));
        let Some((number, local)) = local.filter(|_| self.by_id.len() < VISITORS) else {
            visitor::turn_away(&self.out, id, word.as_str());
            return;
        };
        let guest = Guest::begin(
            id,
            number,
            local,
            word.as_str(),
            self.out.clone(),
            self.news.clone(),
            peer(id),
        );
        guest.give(bytes);
        self.by_id.insert(id.to_owned(), guest);
    }
}

/// Where a visitor comes from, by its id.
fn peer(id: &str) -> SocketAddr {
    let mut parts = id.splitn(3, ',').skip(1);
    let ip = parts.next().and_then(|t| t.trim().parse().ok());
    let port = parts.next().and_then(|t| t.trim().parse().ok());
    let nowhere = std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
    SocketAddr::new(ip.unwrap_or(nowhere), port.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_words_are_read() {
        for (text, speaks, name, port) in [
            ("http:a.example:3000", Speaks::Http, "a.example", 3000),
            ("https://B.example:8443", Speaks::Https, "b.example", 8443),
            ("http://127.0.0.1:8080", Speaks::Http, "127.0.0.1", 8080),
        ] {
            let read = local(text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(
                (read.speaks, read.name.as_str(), read.port),
                (speaks, name, port)
            );
        }
        for wrong in [
            "",
            "http",
            "ssh:a.example:22",
            "http:a.example",
            "http:a b:1",
            "http:a:0",
        ] {
            assert!(local(wrong).is_err(), "{wrong}");
        }
        for (url, to, tls) in [
            ("wss://gw.example/", "gw.example:443", true),
            ("wss://gw.example:8443", "gw.example:8443", true),
            ("ws://127.0.0.1/", "127.0.0.1:80", false),
            ("ws://[::1]:81/ws", "[::1]:81", false),
        ] {
            let place = place(url).unwrap_or_else(|e| panic!("{url}: {e}"));
            assert_eq!(
                (place.to.to_string().as_str(), place.tls),
                (to, tls),
                "{url}"
            );
        }
        for wrong in [
            "gw.example",
            "ftp://gw",
            "wss://u:p@gw/",
            "wss://gw/?x=1",
            "wss://",
        ] {
            assert!(place(wrong).is_err(), "{wrong}");
        }
        assert_eq!(
            peer("IPv4,198.51.100.7,4711").to_string(),
            "198.51.100.7:4711"
        );
        assert_eq!(peer("nonsense").to_string(), "0.0.0.0:0");
    }
}
