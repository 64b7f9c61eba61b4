//! Clients as strict as those in Go: one whole frame a message, exactly so many
//! fields, and nothing but visitors.

use std::collections::HashMap;
use std::net::SocketAddr;

use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Bytes, Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use super::{Lab, NAME, PATIENCE};

/// A frame taken apart by hand, so that the tests do not rely on the codec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) fields: Vec<String>,
    pub(crate) body: Bytes,
}

impl Seen {
    pub(crate) fn id(&self) -> String {
        self.fields[..3].join(",")
    }

    pub(crate) fn service(&self) -> &str {
        &self.fields[4]
    }
}

pub(crate) fn parse(message: &Bytes) -> Seen {
    assert_eq!(message[0], 0xfe, "a frame begins with its version");
    let end = 2 + usize::from(message[1]);
    let header = std::str::from_utf8(&message[2..end]).unwrap();
    let fields: Vec<String> = header.split(',').map(str::to_owned).collect();
    let length: usize = fields[3].parse().unwrap();
    assert_eq!(length, message.len() - end, "one whole frame a message");
    Seen {
        fields,
        body: message.slice(end..),
    }
}

pub(crate) fn frame(id: &str, service: &str, body: &[u8]) -> Vec<u8> {
    raw(&format!("{id},{},{service}", body.len()), body)
}

pub(crate) fn raw(header: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0xfe, u8::try_from(header.len()).unwrap()];
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// A connected client.
pub(crate) struct Client {
    pub(crate) socket: WebSocketStream<TcpStream>,
    fields: Option<usize>,
}

/// Connects; the refusal's status if it is refused.
pub(crate) async fn connect(
    lab: &Lab,
    target: &str,
    headers: &[(&str, &str)],
) -> Result<Client, u16> {
    connect_to(lab.at, target, headers).await
}

async fn connect_to(at: SocketAddr, target: &str, headers: &[(&str, &str)]) -> Result<Client, u16> {
    let tcp = TcpStream::connect(at).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    let mut request = format!("ws://{NAME}{target}")
        .into_client_request()
        .unwrap();
    for (name, value) in headers {
        let name: tokio_tungstenite::tungstenite::http::HeaderName = name.parse().unwrap();
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    match timeout(PATIENCE, client_async(request, tcp)).await.unwrap() {
        Ok((socket, _)) => Ok(Client {
            socket,
            fields: None,
        }),
        Err(Error::Http(response)) => Err(response.status().as_u16()),
        Err(other) => panic!("{other}"),
    }
}

/// The one of 2017: a sixth field kills it, and so does a command.
pub(crate) async fn of_2017(lab: &Lab, token: &str) -> Client {
    of_2017_at(lab.at, token).await
}

pub(crate) async fn of_2017_at(at: SocketAddr, token: &str) -> Client {
    let target = format!("/?access_token={token}");
    let agent = ("User-Agent", "Go-http-client/1.1");
    let mut client = connect_to(at, &target, &[agent]).await.unwrap();
    client.fields = Some(5);
    client
}

/// The one of 2020: it wants all seven, and no commands.
pub(crate) async fn of_2020(lab: &Lab, token: &str) -> Client {
    of_2020_at(lab.at, token).await
}

pub(crate) async fn of_2020_at(at: SocketAddr, token: &str) -> Client {
    let target = format!("/ws?access_token={token}&versions=v1");
    let bearer = format!("Bearer {token}");
    let headers = [
        ("User-Agent", "Go-http-client/1.1"),
        ("Authorization", &*bearer),
    ];
    let mut client = connect_to(at, &target, &headers).await.unwrap();
    client.fields = Some(7);
    client
}

/// The one of 2018 and later, before it has logged in.
pub(crate) async fn stranger(lab: &Lab) -> Client {
    connect(lab, "/", &[]).await.unwrap()
}

impl Client {
    pub(crate) async fn message(&mut self) -> Option<Message> {
        loop {
            let next = timeout(PATIENCE, self.socket.next()).await;
            let message = next.expect("a message in time")?.ok()?;
            if !matches!(message, Message::Ping(_) | Message::Pong(_)) {
                return Some(message);
            }
        }
    }

    /// The next frame, which must be as this client wants it.
    pub(crate) async fn next(&mut self) -> Seen {
        match self.message().await {
            Some(Message::Binary(data)) => {
                let seen = parse(&data);
                if let Some(fields) = self.fields {
                    assert_eq!(seen.fields.len(), fields, "{seen:?}");
                    assert_ne!(seen.service(), "control", "a command kills this client");
                    assert_ne!(seen.service(), "connection");
                }
                seen
            }
            other => panic!("{other:?} in place of a frame"),
        }
    }

    /// The next frame, which must be a command.
    pub(crate) async fn command(&mut self) -> serde_json::Value {
        let seen = self.next().await;
        assert_eq!(seen.service(), "control", "{seen:?}");
        assert_eq!(seen.id(), ",,");
        serde_json::from_slice(&seen.body).unwrap()
    }

    pub(crate) async fn send(&mut self, bytes: Vec<u8>) {
        self.socket.send(Message::binary(bytes)).await.unwrap();
    }

    /// Says something that may not arrive any more.
    pub(crate) async fn try_send(&mut self, bytes: Vec<u8>) {
        drop(self.socket.send(Message::binary(bytes)).await);
    }

    pub(crate) async fn say(&mut self, command: &serde_json::Value) {
        let text = command.to_string();
        self.send(frame(",,", "control", text.as_bytes())).await;
    }

    /// The close frame, whatever comes before it.
    pub(crate) async fn closed(&mut self) -> (u16, String) {
        loop {
            match self.message().await {
                Some(Message::Close(Some(close))) => {
                    return (close.code.into(), close.reason.to_string());
                }
                Some(_) => {}
                None => panic!("closed without a word"),
            }
        }
    }

    /// Serves what a strict client in Go has behind it: a TCP connection for each
    /// visitor it has not seen.
    pub(crate) async fn serve(mut self, target: SocketAddr) {
        let (to_tunnel, mut from_local) = mpsc::channel::<Vec<u8>>(64);
        let mut locals: HashMap<String, mpsc::Sender<Bytes>> = HashMap::new();
        loop {
            tokio::select! {
                message = self.socket.next() => {
                    let Some(Ok(message)) = message else { return };
                    let Message::Binary(data) = message else { continue };
                    let seen = parse(&data);
                    let id = seen.id();
                    match seen.service() {
                        "end" | "error" => { locals.remove(&id); }
                        "https" | "http" | "tcp" => {
                            let service = seen.service().to_owned();
                            let local = locals.entry(id.clone()).or_insert_with(|| {
                                let (sender, mut bytes) = mpsc::channel::<Bytes>(1024);
                                let to_tunnel = to_tunnel.clone();
                                tokio::spawn(async move {
                                    let tcp = TcpStream::connect(target).await.unwrap();
                                    let (mut reader, mut writer) = tcp.into_split();
                                    tokio::spawn(async move {
                                        while let Some(bytes) = bytes.recv().await {
                                            if writer.write_all(&bytes).await.is_err() { return }
                                        }
                                        drop(writer.shutdown().await);
                                    });
                                    let mut buf = vec![0; 32 * 1024];
                                    while let Ok(n) = reader.read(&mut buf).await {
                                        let said = match n {
                                            0 => frame(&id, "end", b""),
                                            n => frame(&id, &service, &buf[..n]),
                                        };
                                        if to_tunnel.send(said).await.is_err() || n == 0 { return }
                                    }
                                });
                                sender
                            });
                            drop(local.send(seen.body).await);
                        }
                        other => panic!("{other} kills this client"),
                    }
                }
                Some(bytes) = from_local.recv() => self.send(bytes).await,
            }
        }
    }
}
