//! One visitor of an older protocol's connection.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rvpn_proto::name::Name;
use rvpn_proto::packer::{Frame, Gauge, Profile, Turn, Word};
use rvpn_proto::sniff::{HelloReader, Reading};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;

use super::News;

/// Bytes of one frame.
const PIECE: usize = 16 * 1024;
/// How long a server of ours may take to accept, and its end once the visitor
/// has ended.
const DIALLED: Duration = Duration::from_secs(5);
const ENDING: Duration = Duration::from_secs(60);

/// What a visitor speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Speaks {
    Http,
    Https,
}

/// A server of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Local {
    pub(super) speaks: Speaks,
    pub(super) name: Name,
    pub(super) port: u16,
}

/// The server for a visitor, with its number: by the name in its first bytes,
/// else the last one of what it speaks.
pub(super) fn choose<'a>(
    locals: &'a [Local],
    speaks: Speaks,
    first: &[u8],
) -> Option<(u32, &'a Local)> {
    let name = match speaks {
        Speaks::Http => host(first),
        Speaks::Https => match HelloReader::new().read(first) {
            Reading::Hello(hello) => hello.name,
            Reading::More | Reading::Bad(_) => None,
        },
    };
    let mut fitting = (1_u32..).zip(locals).filter(|(_, l)| l.speaks == speaks);
    let named = fitting
        .clone()
        .find(|(_, l)| Some(&l.name) == name.as_ref());
    named.or_else(|| fitting.by_ref().last())
}

/// The name that an HTTP request is for.
fn host(first: &[u8]) -> Option<Name> {
    let text = std::str::from_utf8(first).ok().or_else(|| {
        // A body behind the head may be anything.
        let end = first.windows(4).position(|w| w == b"\r\n\r\n")?;
        std::str::from_utf8(&first[..end]).ok()
    })?;
    let fields = text.lines().skip(1).take_while(|l| !l.is_empty());
    let mut hosts = fields.filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("host").then(|| value.trim())
    });
    Name::with_port(hosts.next()?).ok().map(|(name, _)| name)
}

/// Tells the gateway that nothing of ours is for this visitor.
pub(super) fn turn_away(out: &mpsc::Sender<Message>, id: &str, speaks: &str) {
    if let Some(message) = frame(id, Word::Error, speaks, b" ") {
        let _full = out.try_send(message);
    }
}

fn frame(id: &str, word: Word<'_>, speaks: &str, body: &[u8]) -> Option<Message> {
    let mut bytes = Vec::new();
    let frame = Frame {
        id,
        word,
        service_port: 0,
        name: "",
        speaks,
        body,
    };
    frame.encode(Profile::Node2017, &mut bytes).ok()?;
    Some(Message::binary(bytes))
}

enum Event {
    Bytes(Vec<u8>),
    End,
}

/// A visitor, as its connection knows it. Dropping it cuts it off.
pub(super) struct Guest {
    to: mpsc::UnboundedSender<Event>,
    gauge: Arc<Mutex<Gauge>>,
    held: watch::Sender<bool>,
    out: mpsc::Sender<Message>,
    id: Arc<str>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Guest {
    /// Connects to the server and carries until both have ended.
    pub(super) fn begin(
        id: &str,
        number: u32,
        local: &Local,
        speaks: &str,
        out: mpsc::Sender<Message>,
        news: mpsc::Sender<News>,
        peer: SocketAddr,
    ) -> Guest {
        let (to, from) = mpsc::unbounded_channel();
        let (held, hold) = watch::channel(false);
        let gauge = Arc::new(Mutex::new(Gauge::default()));
        let id: Arc<str> = id.into();
        let carried = Carried {
            id: Arc::clone(&id),
            speaks: speaks.to_owned(),
            number,
            port: local.port,
            name: local.name.to_string(),
            out: out.clone(),
            news,
            peer,
            gauge: Arc::clone(&gauge),
        };
        let task = tokio::spawn(carried.run(from, hold));
        Guest {
            to,
            gauge,
            held,
            out,
            id,
            task,
        }
    }

    /// Gives it bytes; false if it has too many already.
    pub(super) fn give(&self, bytes: &[u8]) -> bool {
        let mut gauge = self.gauge.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes.len() > gauge.room() {
            // A gateway that does not pause when it is told to.
            if let Some(message) = frame(&self.id, Word::Error, "", b" ") {
                let _full = self.out.try_send(message);
            }
            return false;
        }
        gauge.fill(bytes.len());
        if let Some(message) = turn(&self.id, &mut gauge) {
            let _full = self.out.try_send(message);
        }
        drop(gauge);
        self.to.send(Event::Bytes(bytes.to_vec())).is_ok()
    }

    /// The visitor has ended in order.
    pub(super) fn end(&self) {
        let _over = self.to.send(Event::End);
    }

    /// Whether the gateway has enough for now.
    pub(super) fn hold(&self, on: bool) {
        self.held.send_replace(on);
    }

    pub(super) fn is_over(&self) -> bool {
        self.task.is_finished()
    }
}

fn turn(id: &str, gauge: &mut Gauge) -> Option<Message> {
    let (word, read) = match gauge.turn()? {
        Turn::Pause(read) => (Word::Pause, read),
        Turn::Resume(read) => (Word::Resume, read),
    };
    frame(id, word, "", read.to_string().as_bytes())
}

struct Carried {
    id: Arc<str>,
    speaks: String,
    number: u32,
    port: u16,
    name: String,
    out: mpsc::Sender<Message>,
    news: mpsc::Sender<News>,
    peer: SocketAddr,
    gauge: Arc<Mutex<Gauge>>,
}

impl Carried {
    async fn run(self, from: mpsc::UnboundedReceiver<Event>, hold: watch::Receiver<bool>) {
        let id = self.number;
        let dialled = timeout(DIALLED, TcpStream::connect(("127.0.0.1", self.port))).await;
        let local = match dialled {
            Ok(Ok(local)) => local,
            failed => {
                let why = match failed {
                    Ok(Err(error)) => error.to_string(),
                    _ => format!("no answer in {DIALLED:?}"),
                };
                let _behind = self.news.try_send(News::Unreachable { id, why });
                self.say(Word::Error, b" ").await;
                return;
            }
        };
        let _late = local.set_nodelay(true);
        let came = News::Came {
            id,
            peer: self.peer,
            name: Some(self.name.clone()),
        };
        let _behind = self.news.try_send(came);
        let (sent, received) = (AtomicU64::new(0), AtomicU64::new(0));
        let (reader, writer) = local.into_split();
        let carried = async {
            let mut reading = std::pin::pin!(self.read(reader, hold, &sent));
            let mut writing = std::pin::pin!(self.write(writer, from, &received));
            tokio::select! {
                read = &mut reading => {
                    read?;
                    writing.await
                }
                written = &mut writing => {
                    written?;
                    timeout(ENDING, reading).await.unwrap_or(Ok(()))
                }
            }
        };
        if carried.await.is_err() {
            self.say(Word::Error, b" ").await;
        }
        let left = News::Left {
            id,
            sent: sent.load(Relaxed),
            received: received.load(Relaxed),
        };
        let _behind = self.news.try_send(left);
    }

    async fn say(&self, word: Word<'_>, body: &[u8]) {
        if let Some(message) = frame(&self.id, word, &self.speaks, body) {
            let _gone = self.out.send(message).await;
        }
    }

    /// From the server to the visitor.
    async fn read(
        &self,
        mut local: OwnedReadHalf,
        mut hold: watch::Receiver<bool>,
        sent: &AtomicU64,
    ) -> std::io::Result<()> {
        let mut piece = vec![0; PIECE];
        loop {
            // Its end is that of the visitor.
            if hold.wait_for(|held| !held).await.is_err() {
                return Ok(());
            }
            let n = local.read(&mut piece).await?;
            if n == 0 {
                self.say(Word::End, b" ").await;
                return Ok(());
            }
            sent.fetch_add(n as u64, Relaxed);
            self.say(Word::Data(&self.speaks), &piece[..n]).await;
        }
    }

    /// From the visitor to the server.
    async fn write(
        &self,
        mut local: OwnedWriteHalf,
        mut from: mpsc::UnboundedReceiver<Event>,
        received: &AtomicU64,
    ) -> std::io::Result<()> {
        while let Some(Event::Bytes(bytes)) = from.recv().await {
            local.write_all(&bytes).await?;
            received.fetch_add(bytes.len() as u64, Relaxed);
            let told = {
                let mut gauge = self.gauge.lock().unwrap_or_else(PoisonError::into_inner);
                gauge.drain(bytes.len());
                turn(&self.id, &mut gauge)
            };
            if let Some(message) = told {
                let _gone = self.out.send(message).await;
            }
        }
        local.shutdown().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visitors_go_by_name_and_else_to_the_last_of_what_they_speak() {
        let local = |speaks, name: &str, port| Local {
            speaks,
            name: name.parse().unwrap(),
            port,
        };
        let locals = [
            local(Speaks::Http, "a.example", 3000),
            local(Speaks::Http, "b.example", 3001),
            local(Speaks::Https, "a.example", 8443),
        ];
        let port = |speaks, first: &[u8]| choose(&locals, speaks, first).map(|(_, l)| l.port);
        let ask = |host: &str| format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes();
        assert_eq!(port(Speaks::Http, &ask("A.example:80")), Some(3000));
        assert_eq!(port(Speaks::Http, &ask("b.example")), Some(3001));
        assert_eq!(port(Speaks::Http, &ask("c.example")), Some(3001));
        assert_eq!(port(Speaks::Http, b"\xff\xfe"), Some(3001));
        assert_eq!(port(Speaks::Https, b"\x16\x03\x01"), Some(8443));
        assert_eq!(choose(&locals[..2], Speaks::Https, b"\x16"), None);
    }
}
