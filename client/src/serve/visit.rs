//! One visitor: for which of our servers, and is it there?
//!
//! A gateway may name one of the targets of the command line and nothing else;
//! what it says of addresses and ports is for show.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use rvpn_proto::streams::{Opening, OpeningError, Status, Visit};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional_with_sizes};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::auth::{self, Accounts};
use super::proxy2;
use super::stream::Stream;
use super::target::Target;

/// How long the gateway may take to say whose visitor it is.
const DESCRIBED: Duration = Duration::from_secs(10);
/// How long a server of ours may take to accept.
const DIALLED: Duration = Duration::from_secs(5);
/// Bytes on their way in each direction.
const BUFFER: usize = 64 * 1024;

/// What all visitors have in common.
pub(super) struct House {
    pub(super) targets: Vec<Target>,
    pub(super) accounts: Option<Arc<Accounts>>,
    pub(super) proxy_protocol: bool,
    pub(super) news: mpsc::Sender<News>,
}

/// What happened at the door.
#[derive(Debug)]
pub(super) enum News {
    /// Somebody came.
    Came {
        id: u32,
        peer: SocketAddr,
        name: Option<String>,
    },
    /// And left, after so many bytes in and out.
    Left { id: u32, sent: u64, received: u64 },
    /// Our own server does not answer.
    Unreachable { id: u32, why: String },
    /// The gateway asked for something that is not served.
    Strange { why: String },
    /// A connection beside the first is not there.
    Trouble { why: String },
}

/// Serves one visitor until it has left.
pub(super) async fn welcome(house: Arc<House>, mut stream: Stream) {
    let visit = match timeout(DESCRIBED, describe(&mut stream)).await {
        Ok(Ok(visit)) => visit,
        Ok(Err(why)) => return turn_away(&house, stream, why).await,
        Err(_) => return,
    };
    let known = house.targets.iter().find(|t| t.id == visit.offer);
    let Some(target) = known.filter(|t| t.service == visit.service) else {
        let why = format!(
            "offer {} ({}), which is not served here",
            visit.offer,
            visit.service.as_str()
        );
        return turn_away(&house, stream, why).await;
    };
    let mut local = match dial(target).await {
        Ok(local) => local,
        Err(why) => {
            let news = News::Unreachable { id: target.id, why };
            // Whoever shows it may be behind; visitors do not wait for that.
            let _behind = house.news.try_send(news);
            let _gone = stream.write_all(&[Status::Unreachable as u8]).await;
            let _gone = stream.shutdown().await;
            return;
        }
    };
    let came = News::Came {
        id: target.id,
        peer: visit.peer,
        name: visit.name.clone(),
    };
    let _behind = house.news.try_send(came);
    let moved = stream.moved();
    let carried = async {
        stream.write_all(&[Status::Accepted as u8]).await?;
        if house.proxy_protocol {
            local.write_all(&proxy2::header(&visit, &local)).await?;
        }
        match &house.accounts {
            Some(accounts) if target.service == rvpn_proto::streams::Offered::Http => {
                auth::guard(Arc::clone(accounts), stream, local).await
            }
            _ => splice(stream, local).await,
        }
    };
    // However it ended, what was carried was carried.
    let _cut_off: std::io::Result<()> = carried.await;
    let left = News::Left {
        id: target.id,
        sent: moved.sent.load(Relaxed),
        received: moved.received.load(Relaxed),
    };
    let _behind = house.news.try_send(left);
}

/// Bytes both ways. What was cut off on one side is cut off on the other.
async fn splice(mut stream: Stream, mut local: TcpStream) -> std::io::Result<()> {
    let copied = copy_bidirectional_with_sizes(&mut stream, &mut local, BUFFER, BUFFER).await;
    if copied.is_err() {
        let _gone = local.set_zero_linger();
    }
    copied.map(drop)
}

async fn describe(stream: &mut Stream) -> Result<Visit, String> {
    let broke = |e: std::io::Error| e.to_string();
    let mut prefix = [0; 2];
    stream.read_exact(&mut prefix).await.map_err(broke)?;
    let wrong = |e: OpeningError| e.to_string();
    let mut text = vec![0; Opening::length(prefix).map_err(wrong)?];
    stream.read_exact(&mut text).await.map_err(broke)?;
    let Opening::Visit(visit) = Opening::read(&text).map_err(wrong)?;
    Ok(visit)
}

async fn turn_away(house: &House, mut stream: Stream, why: String) {
    let _behind = house.news.try_send(News::Strange { why });
    let _gone = stream.write_all(&[Status::Refused as u8]).await;
    let _gone = stream.shutdown().await;
}

async fn dial(target: &Target) -> Result<TcpStream, String> {
    let to = (target.host.as_str(), target.port);
    match timeout(DIALLED, TcpStream::connect(to)).await {
        Ok(Ok(local)) => {
            // Without it small answers would wait for each other.
            let _late = local.set_nodelay(true);
            Ok(local)
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer in {DIALLED:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rvpn_proto::streams::Offered;
    use rvpn_proto::streams::mux::{Limits, Mux, Side};
    use std::future::poll_fn;
    use tokio::net::TcpListener;

    /// Carries bytes between two ends for as long as the test runs.
    fn join(from: &Mux, to: &Mux) {
        let (from, to) = (from.clone(), to.clone());
        tokio::spawn(async move {
            loop {
                let mut bytes = Vec::new();
                poll_fn(|cx| from.poll_send(cx, &mut bytes, 65_536)).await;
                to.receive(&bytes).unwrap();
            }
        });
    }

    #[tokio::test]
    async fn rev_11_only_what_the_command_line_has_is_dialled() {
        let served = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = Target {
            id: 1,
            service: Offered::Tcp,
            host: "127.0.0.1".to_owned(),
            port: served.local_addr().unwrap().port(),
            name: None,
            public_port: None,
        };
        let (news, mut heard) = mpsc::channel(16);
        let house = Arc::new(House {
            targets: vec![target],
            accounts: None,
            proxy_protocol: false,
            news,
        });
        let gateway = Mux::new(Side::Gateway, Limits::default());
        let limits = Limits {
            accepted: 16,
            ..Limits::default()
        };
        let client = Mux::new(Side::Client, limits);
        join(&gateway, &client);
        join(&client, &gateway);
        let accepting = client.clone();
        tokio::spawn(async move {
            while let Some(handle) = poll_fn(|cx| accepting.poll_accept(cx)).await {
                tokio::spawn(welcome(Arc::clone(&house), Stream::new(handle)));
            }
        });
        let framed = |text: String| {
            let mut bytes = u16::try_from(text.len()).unwrap().to_be_bytes().to_vec();
            bytes.extend_from_slice(text.as_bytes());
            bytes
        };
        let port = other.local_addr().unwrap().port();
        // Whatever a gateway says of other offers, services, hosts and ports.
        for text in [
            r#"{"kind":"visit","offer":2,"peer":"1.1.1.1:1","port":22,"service":"tcp"}"#.to_owned(),
            r#"{"kind":"visit","offer":1,"peer":"1.1.1.1:1","port":22,"service":"ssh"}"#.to_owned(),
            format!(r#"{{"kind":"connect","host":"127.0.0.1","port":{port}}}"#),
            format!(r#"{{"kind":"open","to":"127.0.0.1:{port}"}}"#),
            "{}".to_owned(),
        ] {
            let mut stream = Stream::new(gateway.open().unwrap());
            stream.write_all(&framed(text.clone())).await.unwrap();
            assert_eq!(
                stream.read_u8().await.unwrap(),
                Status::Refused as u8,
                "{text}"
            );
            assert!(matches!(heard.recv().await, Some(News::Strange { .. })));
        }
        // An address in a description is for show: only the target is dialled.
        let text = format!(
            r#"{{"kind":"visit","offer":1,"peer":"127.0.0.1:{port}","port":{port},"service":"tcp","host":"127.0.0.1:{port}"}}"#
        );
        let mut stream = Stream::new(gateway.open().unwrap());
        stream.write_all(&framed(text)).await.unwrap();
        let (mut local, _) = served.accept().await.unwrap();
        // The server speaks first.
        local.write_all(b"220").await.unwrap();
        let mut got = [0; 4];
        stream.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"\x00220");
        let strange = timeout(Duration::from_millis(100), other.accept()).await;
        assert!(strange.is_err(), "something else was dialled");
    }
}
