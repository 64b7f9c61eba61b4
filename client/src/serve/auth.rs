//! A password before a web server: asked for here, so that nothing of a visitor
//! without one reaches the server, whatever it sends.

use std::convert::Infallible;
use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::header::{AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HeaderMap, WWW_AUTHENTICATE};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
use tokio::io::copy_bidirectional;
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::sleep;

use super::stream::Stream;
use crate::fail::{Failure, Kind, Outcome, While as _};
use crate::home::read_private;

/// Where a user and password may stand instead of a file.
pub(super) const VARIABLE: &str = "RVPN_SERVE_AUTH";
/// How long a wrong password takes.
const WRONG: Duration = Duration::from_millis(500);
/// How long a visitor may take over the head of a request.
const HEAD: Duration = Duration::from_secs(120);

/// Who is let through: hashes of `user:password`.
pub(super) struct Accounts(Vec<[u8; 32]>);

fn hash(text: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, text).as_ref());
    hash
}

impl Accounts {
    /// Of lines `user:password`.
    pub(super) fn read(text: &str) -> Outcome<Accounts> {
        let lines = text.lines().map(str::trim_end);
        let lines = lines.filter(|l| !l.is_empty() && !l.starts_with('#'));
        let mut accounts = Vec::new();
        for line in lines {
            match line.split_once(':') {
                Some((user, password)) if !user.is_empty() && !password.is_empty() => {
                    accounts.push(hash(line.as_bytes()));
                }
                // The line itself may be a secret.
                _ => {
                    return Err(Failure::new(
                        Kind::Config,
                        "--auth: a line is not USER:PASSWORD",
                    ));
                }
            }
        }
        match accounts.is_empty() {
            true => Err(Failure::new(
                Kind::Config,
                "--auth: there is no USER:PASSWORD, so nobody could come in",
            )),
            false => Ok(Accounts(accounts)),
        }
    }

    /// Whether a request says one of them. All are compared, always.
    fn admit(&self, headers: &HeaderMap) -> Option<bool> {
        let mut said = headers.get_all(AUTHORIZATION).iter();
        let (Some(one), None) = (said.next(), said.next()) else {
            return None;
        };
        let (scheme, credentials) = one.to_str().ok()?.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("basic") {
            return None;
        }
        let said = from_standard(credentials.trim()).map(|c| hash(&c))?;
        let equal = |known: &[u8; 32]| verify_slices_are_equal(known, &said).is_ok();
        Some(self.0.iter().fold(false, |any, known| any | equal(known)))
    }
}

/// From base64 with the usual alphabet.
fn from_standard(text: &str) -> Option<Vec<u8>> {
    let url: String = text
        .trim_end_matches('=')
        .chars()
        .map(|c| match c {
            '+' => '-',
            '/' => '_',
            c => c,
        })
        .collect();
    crate::text::from_base64(&url)
}

/// The lines of a file, of the environment, or of whoever sits at the terminal.
pub(super) fn ask(file: Option<&Path>) -> Outcome<String> {
    if let Some(path) = file {
        return read_private(path);
    }
    if let Ok(text) = std::env::var(VARIABLE) {
        return Ok(text);
    }
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return Err(Failure::usage(format!(
            "--auth needs a user and password: name a file with --auth-file, or set {VARIABLE}"
        )));
    }
    let line = |words: &str| -> std::io::Result<String> {
        eprint!("{words}");
        std::io::stderr().flush()?;
        let mut line = String::new();
        stdin.lock().read_line(&mut line)?;
        Ok(line.trim_end_matches(['\r', '\n']).to_owned())
    };
    let user = line("User for visitors: ").while_doing("ask for a user")?;
    let before = tcgetattr(&stdin).while_doing("ask for a password")?;
    let mut silent = before.clone();
    silent.local_flags.remove(LocalFlags::ECHO);
    tcsetattr(&stdin, SetArg::TCSAFLUSH, &silent).while_doing("hide a password")?;
    let password = line("Password: ");
    // Whatever happened: the terminal is the user's.
    let _back = tcsetattr(&stdin, SetArg::TCSAFLUSH, &before);
    eprintln!();
    let password = password.while_doing("ask for a password")?;
    Ok(format!("{user}:{password}"))
}

type Answer = Response<Either<Full<Bytes>, Incoming>>;
type Local = Mutex<SendRequest<Incoming>>;

fn words(status: StatusCode, text: &'static str) -> Answer {
    let body = Either::Left(Full::new(Bytes::from_static(text.as_bytes())));
    let mut answer = Response::new(body);
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    let plain = hyper::header::HeaderValue::from_static("text/plain; charset=utf-8");
    headers.insert(CONTENT_TYPE, plain);
    let never = hyper::header::HeaderValue::from_static("no-store");
    headers.insert(CACHE_CONTROL, never);
    answer
}

/// Carries requests of those who are let through to the server.
pub(super) async fn guard(
    accounts: Arc<Accounts>,
    stream: Stream,
    local: TcpStream,
) -> std::io::Result<()> {
    let (sender, connection) = hyper::client::conn::http1::Builder::new()
        .preserve_header_case(true)
        .handshake(TokioIo::new(local))
        .await
        .map_err(std::io::Error::other)?;
    // Ends when the visitor's side lets go of the sender.
    let connection = tokio::spawn(connection.with_upgrades());
    let local = Arc::new(Mutex::new(sender));
    let service = service_fn(|request| {
        let (accounts, local) = (Arc::clone(&accounts), Arc::clone(&local));
        async move { Ok::<_, Infallible>(respond(&accounts, &local, request).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .preserve_header_case(true)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await;
    drop(local);
    let _ended = connection.await;
    served.map_err(std::io::Error::other)
}

async fn respond(accounts: &Accounts, local: &Local, mut request: Request<Incoming>) -> Answer {
    match accounts.admit(request.headers()) {
        Some(true) => {}
        said => {
            if said == Some(false) {
                sleep(WRONG).await;
            }
            let mut answer = words(StatusCode::UNAUTHORIZED, "a user and password are needed\n");
            let asks = "Basic realm=\"rvpn serve\", charset=\"UTF-8\"";
            let asks = hyper::header::HeaderValue::from_static(asks);
            answer.headers_mut().insert(WWW_AUTHENTICATE, asks);
            return answer;
        }
    }
    // It was for us.
    request.headers_mut().remove(AUTHORIZATION);
    let theirs = hyper::upgrade::on(&mut request);
    let answered = local.lock().await.send_request(request).await;
    let Ok(mut answer) = answered else {
        let text = "what is served here does not answer\n";
        return words(StatusCode::BAD_GATEWAY, text);
    };
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
        let ours = hyper::upgrade::on(&mut answer);
        tokio::spawn(async move {
            if let (Ok(theirs), Ok(ours)) = tokio::join!(theirs, ours) {
                let (mut theirs, mut ours) = (TokioIo::new(theirs), TokioIo::new(ours));
                let _cut_off = copy_bidirectional(&mut theirs, &mut ours).await;
            }
        });
    }
    answer.map(Either::Right)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn passwords_are_compared_whole_and_once() {
        let accounts =
            Accounts::read("# those\nann:secret\nbob:a:b\n").unwrap_or_else(|e| panic!("{e}"));
        let admit = |values: &[&str]| accounts.admit(&headers(values));
        // ann:secret, bob:a:b, ann:wrong
        assert_eq!(admit(&["Basic YW5uOnNlY3JldA=="]), Some(true));
        assert_eq!(admit(&["basic YW5uOnNlY3JldA"]), Some(true));
        assert_eq!(admit(&["Basic Ym9iOmE6Yg=="]), Some(true));
        assert_eq!(admit(&["Basic YW5uOndyb25n"]), Some(false));
        for none in [
            &[][..],
            &["Bearer x"],
            &["Basic !!!"],
            &["Basic"],
            &["Basic YW5uOnNlY3JldA==", "Basic YW5uOnNlY3JldA=="],
        ] {
            assert_eq!(admit(none), None, "{none:?}");
        }
        for wrong in ["", "#x", "nobody", ":x", "x:"] {
            assert!(Accounts::read(wrong).is_err(), "{wrong}");
        }
    }
}
