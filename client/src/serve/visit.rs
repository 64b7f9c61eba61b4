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
