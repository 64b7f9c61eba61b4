//! Sessions that send back what they get.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use rvpn_gateway::admit::{Admission, Io, Sessions};
use rvpn_gateway::cores::CoreId;
use rvpn_gateway::packer::Arrival;
use rvpn_gateway::serve::table::Table;
use tokio::sync::Notify;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role};

/// What was let in.
#[derive(Default)]
pub(crate) struct Echo {
    inner: Arc<Inner>,
    pub(crate) not_ready: AtomicBool,
}

#[derive(Default)]
struct Inner {
    admitted: Mutex<Vec<Admission>>,
    live: AtomicUsize,
    changed: Notify,
    table: Arc<Table>,
}

impl Echo {
    /// All logins so far.
    pub(crate) fn admitted(&self) -> Vec<Admission> {
        self.inner.admitted.lock().unwrap().clone()
    }

    /// The last one.
    pub(crate) fn last(&self) -> Admission {
        self.admitted().pop().expect("somebody was let in")
    }

    pub(crate) fn count(&self) -> usize {
        self.inner.admitted.lock().unwrap().len()
    }

    /// Waits until so many connections are open.
    pub(crate) async fn until_live(&self, n: usize) {
        let wait = async {
            loop {
                let changed = self.inner.changed.notified();
                if self.inner.live.load(Ordering::SeqCst) == n {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(super::PATIENCE, wait)
            .await
            .expect("the number of connections in time");
    }
}

impl Sessions for Echo {
    fn admit(&self, admission: Admission, mut io: Io, read_ahead: Bytes) {
        let inner = Arc::clone(&self.inner);
        inner.admitted.lock().unwrap().push(admission.clone());
        inner.live.fetch_add(1, Ordering::SeqCst);
        inner.changed.notify_waiters();
        tokio::spawn(async move {
            io.rehome().unwrap();
            let socket =
                WebSocketStream::from_partially_read(io, read_ahead.to_vec(), Role::Server, None);
            run(socket.await, admission).await;
            inner.live.fetch_sub(1, Ordering::SeqCst);
            inner.changed.notify_waiters();
        });
    }

    fn tunnel(&self, _: Arrival, _: Io, _: Bytes) {
        panic!("nobody here has such a client");
    }

    fn table(&self) -> Arc<Table> {
        Arc::clone(&self.inner.table)
    }

    fn run(&self, _: CoreId, task: Pin<Box<dyn Future<Output = ()> + Send>>) {
        tokio::spawn(task);
    }

    fn ready(&self) -> Result<(), String> {
        match self.not_ready.load(Ordering::SeqCst) {
            true => Err("told so".to_owned()),
            false => Ok(()),
        }
    }

    fn drain(&self, _: Duration) -> Pin<Box<dyn Future<Output = usize> + Send + '_>> {
        Box::pin(async { 0 })
    }
}

async fn run(mut socket: WebSocketStream<Io>, mut admission: Admission) {
    loop {
        tokio::select! {
            revoked = async { admission.revoked.wait_for(|r| *r).await.is_ok() } => {
                assert!(revoked, "the front outlives its connections");
                let frame = CloseFrame {
                    code: CloseCode::Policy,
                    reason: "access was revoked".into(),
                };
                let _closed = socket.send(Message::Close(Some(frame))).await;
                return;
            }
            message = socket.next() => match message {
                // A question about the bytes on the wire.
                Some(Ok(Message::Text(text))) if text == "wire?" => {
                    let (read, written) = socket.get_ref().wire();
                    let answer = Message::text(format!("{read} {written}"));
                    if socket.send(answer).await.is_err() {
                        return;
                    }
                }
                Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => {
                    if socket.send(message).await.is_err() {
                        return;
                    }
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                Some(Ok(_)) => {}
            }
        }
    }
}
