//! `rvpn serve status` and `stop`, and going on in the background.
//!
//! Every `serve` listens on a socket file of its own, which says all that is
//! known of it; the file goes with the process, and one that was left behind by
//! a killed process goes with the next question.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::unistd::{Pid, geteuid, setsid};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};

use crate::fail::{Failure, Kind, Outcome, While as _};
use crate::text::{bytes, shown, span, table};

/// Tells the background process that it is one.
const BACKGROUND: &str = "RVPN_SERVE_BACKGROUND";
/// How long the background process may take to serve.
const READY: Duration = Duration::from_secs(60);
/// How long a question and its answer may take.
const QUESTION: Duration = Duration::from_secs(5);
/// How long one may take to end.
const ENDS: Duration = Duration::from_secs(5);

/// What may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Question {
    Status,
    Stop,
}

/// A question and where its answer goes.
pub(super) type Asked = (Question, oneshot::Sender<Value>);

/// Where socket files are.
fn dir() -> Outcome<PathBuf> {
    let named = |name| std::env::var_os(name).filter(|d| !d.is_empty());
    let path = match (named("RVPN_RUN"), named("XDG_RUNTIME_DIR")) {
        (Some(run), _) => PathBuf::from(run).join("serve"),
        (None, Some(run)) => PathBuf::from(run).join("rvpn-serve"),
        (None, None) if geteuid().is_root() => PathBuf::from("/run/rvpn-client/serve"),
        (None, None) => std::env::temp_dir().join(format!("rvpn-serve-{}", geteuid())),
    };
    let shown = path.display();
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&path)
        .while_doing(format_args!("make the directory {shown}"))?;
    // Somebody else may have made one of this name where all may write.
    let meta = fs::symlink_metadata(&path).while_doing(format_args!("look at {shown}"))?;
    if !meta.is_dir() || meta.uid() != geteuid().as_raw() || meta.permissions().mode() & 0o022 != 0
    {
        return Err(Failure::new(
            Kind::Config,
            format!("{shown} is not a directory of yours alone: remove it, or set XDG_RUNTIME_DIR"),
        ));
    }
    Ok(path)
}

fn path_of(dir: &Path, pid: u32, kind: &str) -> PathBuf {
    dir.join(format!("{pid}.{kind}"))
}

/// The socket file of this process; gone when dropped.
pub(super) struct Listening {
    files: Vec<PathBuf>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        for file in &self.files {
            // It may be gone already, with the directory.
            let _gone = fs::remove_file(file);
        }
    }
}

/// Answers from now on; questions come out of the channel.
pub(super) fn listen() -> Outcome<(Listening, mpsc::Receiver<Asked>)> {
    let dir = dir()?;
    let pid = std::process::id();
    let path = path_of(&dir, pid, "sock");
    // A former process may have had our number.
    let _old = fs::remove_file(&path);
    let listener =
        UnixListener::bind(&path).while_doing(format_args!("listen on {}", path.display()))?;
    let files = vec![path, path_of(&dir, pid, "log")];
    let (asked, questions) = mpsc::channel(4);
    tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                sleep(Duration::from_millis(100)).await;
                continue;
            };
            // One after the other: only this user gets here at all.
            let _late = timeout(QUESTION, answer(stream, &asked)).await;
        }
    });
    Ok((Listening { files }, questions))
}

async fn answer(mut stream: UnixStream, asked: &mpsc::Sender<Asked>) -> std::io::Result<()> {
    let mut line = String::new();
    BufReader::new((&mut stream).take(64))
        .read_line(&mut line)
        .await?;
    let question = match line.trim() {
        "status" => Question::Status,
        "stop" => Question::Stop,
        _ => return Ok(()),
    };
    let (answer, heard) = oneshot::channel();
    if asked.send((question, answer)).await.is_ok()
        && let Ok(value) = heard.await
    {
        stream.write_all(format!("{value}\n").as_bytes()).await?;
    }
    Ok(())
}

/// Asks one; nothing if it is not there.
async fn ask(path: &Path, question: &str) -> Option<Value> {
    let talk = async {
        let mut stream = UnixStream::connect(path).await?;
        stream.write_all(format!("{question}\n").as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok::<_, std::io::Error>(text)
    };
    let text = timeout(QUESTION, talk).await.ok()?;
    match text {
        Ok(text) => serde_json::from_str(&text).ok(),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            // Its process was killed.
            for kind in ["sock", "log"] {
                let _gone = fs::remove_file(path.with_extension(kind));
            }
            None
        }
        Err(_) => None,
    }
}

/// All that run, by their socket files.
async fn all(question: &str) -> Outcome<Vec<(PathBuf, Value)>> {
    let dir = dir()?;
    let entries = fs::read_dir(&dir).while_doing(format_args!("read {}", dir.display()))?;
    let mut sockets: Vec<PathBuf> = entries
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "sock"))
        .collect();
    sockets.sort();
    let mut found = Vec::new();
    for path in sockets {
        if let Some(value) = ask(&path, question).await {
            found.push((path, value));
        }
    }
    Ok(found)
}

/// `rvpn serve status`.
pub(super) async fn status(as_json: bool) -> Outcome {
    let found = all("status").await?;
    if as_json {
        for (_, one) in &found {
            println!("{one}");
        }
        return Ok(());
    }
    if found.is_empty() {
        println!("nothing is served");
        return Ok(());
    }
    let mut rows = Vec::new();
    for (_, one) in &found {
        let text = |key: &str| shown(one[key].as_str().unwrap_or("-"));
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        let served = one["served"].as_array().cloned().unwrap_or_default();
        for line in served {
            let url = line["urls"][0].as_str().unwrap_or("-");
            rows.push(vec![
                one["pid"].to_string(),
                text("state"),
                shown(url),
                shown(line["target"].as_str().unwrap_or("-")),
                format!(
                    "{} there, {} in all",
                    number(&one["visitors"]["open"]),
                    number(&one["visitors"]["total"])
                ),
                bytes(number(&one["sent"])),
                span(number(&one["seconds"])),
            ]);
        }
    }
    let head = ["pid", "state", "at", "what", "visitors", "sent", "for"];
    rows.insert(0, head.map(str::to_owned).to_vec());
    print!("{}", table(&rows));
    Ok(())
}

/// `rvpn serve stop`: all of them, or one by its number.
pub(super) async fn stop(which: Option<&str>) -> Outcome {
    let pid = match which {
        None => None,
        Some(text) => Some(text.parse::<u32>().map_err(|_| {
            Failure::usage(format!(
                "'{text}' is not the number of a process: 'rvpn serve status' shows it"
            ))
        })?),
    };
    let found = match pid {
        None => all("stop").await?,
        Some(pid) => {
            let path = path_of(&dir()?, pid, "sock");
            let one = ask(&path, "stop").await;
            let one = one.ok_or_else(|| {
                Failure::unavailable(format!(
                    "no 'rvpn serve' has the number {pid}: 'rvpn serve status' shows all"
                ))
            })?;
            vec![(path, one)]
        }
    };
    let until = Instant::now() + ENDS;
    for (path, _) in &found {
        while path.exists() && Instant::now() < until {
            sleep(Duration::from_millis(20)).await;
        }
    }
    match found.len() {
        0 => println!("nothing was served"),
        n => println!("stopped {n}"),
    }
    Ok(())
}

/// Whether this process is the one in the background.
pub(super) fn is_background() -> bool {
    std::env::var_os(BACKGROUND).is_some()
}

/// Leaves the terminal behind, and takes what only the first process could ask for.
pub(super) fn settle_in_background() -> Outcome<String> {
    // It fails only for one who has left it already.
    let _left: nix::Result<Pid> = setsid();
    let mut secrets = String::new();
    std::io::stdin()
        .read_to_string(&mut secrets)
        .while_doing("hear the process that began")?;
    Ok(secrets)
}

/// Starts the same in the background and waits until everything is served.
pub(super) async fn detach(secrets: &str) -> Outcome {
    let dir = dir()?;
    let log = dir.join(format!("{}.begin", std::process::id()));
    let out = fs::File::create(&log).while_doing(format_args!("write {}", log.display()))?;
    let again = out.try_clone().while_doing("write the log")?;
    let exe = std::env::current_exe().while_doing("find this program")?;
    let mut child = Command::new(exe)
        .args(std::env::args_os().skip(1))
        .env(BACKGROUND, "1")
        .stdin(Stdio::piped())
        .stdout(out)
        .stderr(again)
        .spawn()
        .while_doing("start in the background")?;
    if let Some(mut pipe) = child.stdin.take() {
        pipe.write_all(secrets.as_bytes())
            .while_doing("tell the background process")?;
    }
    let socket = path_of(&dir, child.id(), "sock");
    let begun = Instant::now();
    let result = loop {
        sleep(Duration::from_millis(50)).await;
        let ended = child
            .try_wait()
            .while_doing("watch the background process")?;
        if let Some(status) = ended {
            eprint!("{}", fs::read_to_string(&log).unwrap_or_default());
            let _shown = fs::remove_file(&log);
            std::process::exit(status.code().unwrap_or(70));
        }
        if socket.exists()
            && let Some(state) = ask(&socket, "status").await
            && state["state"] == "connected"
        {
            break Ok(());
        }
        if begun.elapsed() > READY {
            break Err(Failure::unavailable(format!(
                "nothing is served after {} s; it goes on trying, 'rvpn serve stop {}' ends it",
                READY.as_secs(),
                child.id()
            )));
        }
    };
    print!("{}", fs::read_to_string(&log).unwrap_or_default());
    let kept = path_of(&dir, child.id(), "log");
    fs::rename(&log, &kept).while_doing(format_args!("write {}", kept.display()))?;
    println!(
        "going on in the background as {}; 'rvpn serve status' shows it, 'rvpn serve stop' ends it",
        child.id()
    );
    result
}
