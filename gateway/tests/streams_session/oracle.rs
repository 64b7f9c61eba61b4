//! Another implementation of yamux at the other end.

use std::task::Context;

use futures_util::StreamExt as _;
use rvpn_proto::streams::{Offered, Opening, Status};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message as Frame;
use tokio_util::compat::{FuturesAsyncReadCompatExt as _, TokioAsyncReadCompatExt as _};

use crate::session_support::fake_helper::PATIENCE;
use crate::session_support::lab::Lab;
use crate::session_support::wire::Client;
use crate::{carrier, guest, join, serve, visit};

/// Messages as the byte stream that they are, through a pipe.
fn bytes_of(client: Client) -> tokio::io::DuplexStream {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (mut sink, mut source) = client.socket.split();
    let (mut from, mut to) = tokio::io::split(far);
    tokio::spawn(async move {
        while let Some(Ok(message)) = source.next().await {
            if let Frame::Binary(data) = message
                && to.write_all(&data).await.is_err()
            {
                return;
            }
        }
    });
    tokio::spawn(async move {
        let mut buffer = vec![0; 10_000];
        while let Ok(n @ 1..) = from.read(&mut buffer).await {
            let message = Frame::binary(buffer[..n].to_vec());
            if futures_util::SinkExt::send(&mut sink, message)
                .await
                .is_err()
            {
                return;
            }
        }
    });
    near
}

#[tokio::test(flavor = "multi_thread")]
async fn another_yamux_serves_as_well() {
    let lab = Lab::new(1).await;
    let (mut client, _) = join(&lab, guest(&lab, "alice", &["a.ex"]), "x").await;
    serve(&mut client, 1, Offered::Tls, None).await;
    let io = bytes_of(client).compat();
    let mut theirs = yamux::Connection::new(io, yamux::Config::default(), yamux::Mode::Client);
    tokio::spawn(async move {
        let next = |cx: &mut Context<'_>| theirs.poll_next_inbound(cx);
        let mut inbound = futures_util::stream::poll_fn(next);
        while let Some(Ok(stream)) = inbound.next().await {
            tokio::spawn(async move {
                let mut stream = stream.compat();
                let length = stream.read_u16().await.unwrap();
                let mut text = vec![0; length.into()];
                stream.read_exact(&mut text).await.unwrap();
                assert!(matches!(Opening::read(&text), Ok(Opening::Visit(_))));
                stream.write_all(&[Status::Accepted as u8]).await.unwrap();
                // Everything back, to the end.
                let (mut from, mut to) = tokio::io::split(stream);
                tokio::io::copy(&mut from, &mut to).await.unwrap();
                to.shutdown().await.unwrap();
            });
        }
    });
    let mut visitors = Vec::new();
    for n in 0..20_u8 {
        let carrier = carrier(&lab, "a.ex").unwrap();
        visitors.push(tokio::spawn(async move {
            let stream = carrier.open(visit("a.ex")).await.unwrap();
            let (mut from, mut to) = tokio::io::split(stream);
            let sent: Vec<u8> = (0..3_000_000_u32).map(|i| (i / 7) as u8 ^ n).collect();
            let copy = sent.clone();
            let writing = tokio::spawn(async move {
                to.write_all(&copy).await.unwrap();
                to.shutdown().await.unwrap();
                to
            });
            let mut got = Vec::new();
            from.read_to_end(&mut got).await.unwrap();
            assert!(got == sent, "visitor {n}");
            drop(writing.await.unwrap());
        }));
    }
    for visitor in visitors {
        timeout(PATIENCE, visitor).await.unwrap().unwrap();
    }
}
