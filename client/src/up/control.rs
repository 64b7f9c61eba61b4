//! How `status` and `down` reach the `up` that runs.

use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{sleep, timeout};

use super::already;
use super::journal::{Journal, Lock, dir};
use crate::cli::{Down, Status};
use crate::fail::{Failure, Kind, Outcome, While as _};
use crate::text::{bytes, span, table};

/// How long the other side may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// How often it is asked who else is there.
const LOOKS: u32 = 100;

/// How long a question and its answer may take, and how many may be asked at once.
const QUESTION: Duration = Duration::from_secs(15);
const AT_ONCE: usize = 16;

/// What may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Question {
    /// How things are.
    Status,
    /// To end.
    Down,
}

/// A question and where its answer goes.
pub(crate) type Asked = (Question, oneshot::Sender<Value>);

fn path() -> std::path::PathBuf {
    dir().join("control.sock")
}

/// Answers on the socket from now on; questions come out of the channel.
pub(crate) fn listen() -> Outcome<mpsc::Receiver<Asked>> {
    let path = path();
    // Nobody listens there, or we would not be here.
    let _old = std::fs::remove_file(&path);
    let listener =
        UnixListener::bind(&path).while_doing(format_args!("listen on {}", path.display()))?;
    // Everybody may ask how things are; who may end them is checked.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))
        .while_doing("open the socket to other users")?;
    let (asked, questions) = mpsc::channel(4);
    tokio::spawn(async move {
        let room = Arc::new(Semaphore::new(AT_ONCE));
        // Everybody may come here, so nobody may fill it: neither with
        // connections nor with errors.
        while let Ok(place) = Arc::clone(&room).acquire_owned().await {
            let Ok((stream, _)) = listener.accept().await else {
                sleep(Duration::from_millis(100)).await;
                continue;
            };
            let asked = asked.clone();
            tokio::spawn(async move {
                let _late = timeout(QUESTION, serve(stream, asked)).await;
                drop(place);
            });
        }
    });
    Ok(questions)
}

/// Nobody listens any more.
pub(crate) fn close() {
    // It may be gone already, with the directory.
    let _gone = std::fs::remove_file(path());
}

async fn serve(mut stream: UnixStream, asked: mpsc::Sender<Asked>) -> std::io::Result<()> {
    let root = stream.peer_cred()?.uid() == 0;
    let mut line = String::new();
    BufReader::new((&mut stream).take(64))
        .read_line(&mut line)
        .await?;
    let question = match line.trim() {
        "status" => Question::Status,
        "down" if root => Question::Down,
        _ => return stream.write_all(b"{\"error\": \"not allowed\"}\n").await,
    };
    let (answer, heard) = oneshot::channel();
    if asked.send((question, answer)).await.is_ok()
        && let Ok(value) = heard.await
    {
        stream.write_all(format!("{value}\n").as_bytes()).await?;
    }
    Ok(())
}

/// Asks the `up` that runs; nothing if none does.
pub(crate) async fn ask(question: &str) -> Outcome<Option<Value>> {
    let Ok(mut stream) = UnixStream::connect(path()).await else {
        return Ok(None);
    };
    let talk = async {
        stream.write_all(format!("{question}\n").as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok::<_, std::io::Error>(text)
    };
    let Ok(answer) = timeout(PATIENCE, talk).await else {
        return Err(Failure::unavailable("'rvpn up' runs but does not answer"));
    };
    let answer = answer.while_doing("ask the running 'rvpn up'")?;
    if answer.is_empty() {
        return Ok(None);
    }
    let value: Value = serde_json::from_str(&answer).while_doing("read its answer")?;
    match value["error"].as_str() {
        Some(_) => Err(Failure::new(
            Kind::Refused,
            "only root may end a tunnel: run 'sudo rvpn down'",
        )),
        None => Ok(Some(value)),
    }
}

/// The lock, or why not: somebody may have begun at the same time.
pub(crate) async fn alone() -> Outcome<Lock> {
    for _ in 0..LOOKS {
        if let Some(lock) = Lock::take_within(Duration::from_millis(100)).await? {
            return Ok(lock);
        }
        if let Some(state) = ask("status").await? {
            return Err(already(&state));
        }
    }
    Err(Failure::unavailable(
        "another 'rvpn up' or 'rvpn down' is at work: see 'rvpn status', or try again",
    ))
}

/// `rvpn status`.
pub(crate) async fn status(args: Status) -> Outcome {
    let Some(state) = ask("status").await? else {
        // Whether one is there, not what it says, is everybody's to know.
        let left = Journal::is_left();
        if args.json {
            println!(
                "{}",
                serde_json::json!({"state": "down", "left-behind": left})
            );
        } else if left {
            println!("down; a killed 'rvpn up' left changes behind: sudo rvpn down --repair");
        } else {
            println!("down");
        }
        return Ok(());
    };
    if args.json {
        println!("{state}");
        return Ok(());
    }
    let text = |key: &str| match &state[key] {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    let way = |key: &str| {
        let n = |field: &str| state[key][field].as_u64().unwrap_or(0);
        format!("{} in {} packets", bytes(n("payload")), n("packets"))
    };
    let mut rows = vec![
        vec!["state".to_owned(), text("state")],
        vec!["gateway".to_owned(), text("gateway")],
        vec![
            "address".to_owned(),
            format!("{} {}", text("v4"), text("v6")),
        ],
        vec![
            "up for".to_owned(),
            span(state["seconds"].as_u64().unwrap_or(0)),
        ],
        vec!["sent".to_owned(), way("outbound")],
        vec!["received".to_owned(), way("inbound")],
        vec!["reconnects".to_owned(), text("reconnects")],
    ];
    if let Some(ms) = state["rtt-ms"].as_f64() {
        rows.push(vec![
            "round trip".to_owned(),
            format!("{ms:.1} ms to the gateway"),
        ]);
    }
    if !state["trouble"].is_null() {
        rows.push(vec!["trouble".to_owned(), text("trouble")]);
    }
    print!("{}", table(&rows));
    Ok(())
}

/// `rvpn down`.
pub(crate) async fn down(args: Down) -> Outcome {
    match ask("down").await? {
        Some(done) => match done["failed"].as_str() {
            None => {
                println!("down");
                Ok(())
            }
            Some(why) => Err(Failure::internal(why)),
        },
        None => match Journal::read()? {
            None => {
                println!("nothing was up");
                Ok(())
            }
            Some(_) if args.repair => {
                let _lock = Lock::take().await?;
                // Somebody may have done it while we waited.
                if let Some(journal) = Journal::read()? {
                    journal.undo().await?;
                }
                println!("put back what a killed 'rvpn up' had left");
                Ok(())
            }
            Some(_) => Err(Failure::unavailable(
                "no 'rvpn up' runs, but one was killed and left its changes: \
                 'sudo rvpn down --repair' puts everything back",
            )),
        },
    }
}
