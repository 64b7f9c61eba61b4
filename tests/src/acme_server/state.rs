//! Accounts, orders and what is asked of them.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};

use super::jws::{By, Public, Signed};
use super::look::{self, Missing};
use super::{Answer, Asked, Request, Shared};
use crate::token::unbase64url;

#[derive(Default)]
pub(super) struct State {
    last: u64,
    nonces: HashSet<String>,
    /// Whether a first nonce was refused already: they get old now and then.
    refused: bool,
    pub(super) accounts: Vec<(String, Public)>,
    orders: Vec<Order>,
    pub(super) asked: Asked,
}

struct Order {
    account: String,
    name: String,
    token: String,
    challenges: [Challenge; 2],
    chain: Option<String>,
}

struct Challenge {
    kind: &'static str,
    status: &'static str,
    problem: Option<Missing>,
}

impl Order {
    fn proved(&self) -> bool {
        self.challenges.iter().any(|c| c.status == "valid")
    }

    fn failed(&self) -> bool {
        self.challenges.iter().any(|c| c.status == "invalid")
    }

    fn status(&self) -> &'static str {
        match (&self.chain, self.failed(), self.proved()) {
            (Some(_), _, _) => "valid",
            (None, true, _) => "invalid",
            (None, false, true) => "ready",
            (None, false, false) => "pending",
        }
    }

    fn authorization(&self) -> &'static str {
        match (self.failed(), self.proved()) {
            (true, _) => "invalid",
            (false, true) => "valid",
            (false, false) => "pending",
        }
    }

    fn challenge(&self, base: &str, number: usize, which: usize) -> Value {
        let one = &self.challenges[which];
        let mut value = json!({
            "type": one.kind,
            "url": format!("{base}/challenge/{number}/{which}"),
            "token": self.token,
            "status": one.status,
        });
        if let Some((kind, detail)) = &one.problem {
            let kind = format!("urn:ietf:params:acme:error:{kind}");
            value["error"] = json!({"type": kind, "detail": detail, "status": 403});
        }
        value
    }

    fn show(&self, base: &str, number: usize) -> Value {
        let mut value = json!({
            "status": self.status(),
            "identifiers": [{"type": "dns", "value": self.name}],
            "authorizations": [format!("{base}/authorization/{number}")],
            "finalize": format!("{base}/finalize/{number}"),
        });
        if self.chain.is_some() {
            value["certificate"] = format!("{base}/certificate/{number}").into();
        }
        value
    }
}

impl State {
    pub(super) fn nonce(&mut self) -> String {
        self.last += 1;
        let nonce = format!("nonce-{}", self.last);
        self.nonces.insert(nonce.clone());
        nonce
    }
}

pub(super) fn respond(shared: &Arc<Shared>, request: &Request) -> Answer {
    let base = &shared.base;
    match (request.method.as_str(), request.path.as_str()) {
        ("GET", "/directory") => Answer::json(
            200,
            &json!({
                "newNonce": format!("{base}/nonce"),
                "newAccount": format!("{base}/account"),
                "newOrder": format!("{base}/order"),
                "revokeCert": format!("{base}/revoke"),
                "keyChange": format!("{base}/key"),
            }),
        ),
        ("HEAD" | "GET", "/nonce") => Answer::json(200, &Value::Null),
        ("POST", path) => signed(shared, path, &request.body).unwrap_or_else(|problem| problem),
        _ => Answer::problem(405, "malformed", "not like this"),
    }
}

fn signed(shared: &Arc<Shared>, path: &str, body: &[u8]) -> Result<Answer, Answer> {
    let malformed = |why: &str| Answer::problem(400, "malformed", why);
    let signed = Signed::read(body).ok_or_else(|| malformed("not a signed request"))?;
    let mut state = shared.state();
    let fresh = state.nonces.remove(&signed.nonce);
    if !fresh || !std::mem::replace(&mut state.refused, true) {
        return Err(Answer::problem(400, "badNonce", "an old nonce"));
    }
    if signed.url != format!("{}{path}", shared.base) {
        return Err(malformed("signed for another address"));
    }
    let unauthorized = || Answer::problem(403, "unauthorized", "a bad signature");
    let account = match &signed.by {
        By::Key(key) if path == "/account" && signed.is_by(key) => {
            return new_account(shared, &mut state, key, &signed.payload);
        }
        By::Key(_) => return Err(unauthorized()),
        By::Account(id) => {
            let known = state.accounts.iter().find(|(i, _)| i == id);
            let gone = || Answer::problem(400, "accountDoesNotExist", "no such account");
            let (id, key) = known.ok_or_else(gone)?;
            if !signed.is_by(key) {
                return Err(unauthorized());
            }
            (id.clone(), key.clone())
        }
    };
    if path == "/order" {
        return new_order(shared, &mut state, account.0, &signed.payload);
    }
    if path.starts_with("/account/") {
        return Ok(Answer::json(200, &json!({"status": "valid"})));
    }
    let mut parts = path.trim_start_matches('/').split('/');
    let kind = parts.next().unwrap_or_default();
    let mut number = || parts.next().and_then(|n| n.parse::<usize>().ok());
    let (first, second) = (number(), number());
    let missing = || Answer::problem(404, "malformed", "there is no such thing");
    let at = first.ok_or_else(missing)?;
    let order = state.orders.get_mut(at).filter(|o| o.account == account.0);
    let order = order.ok_or_else(missing)?;
    match (kind, second) {
        ("order", None) => Ok(Answer::json(200, &order.show(&shared.base, at))),
        ("authorization", None) => {
            let both = [0, 1].map(|which| order.challenge(&shared.base, at, which));
            let body = json!({
                "status": order.authorization(),
                "identifier": {"type": "dns", "value": order.name},
                "challenges": both,
            });
            Ok(Answer::json(200, &body))
        }
        ("challenge", Some(which @ (0 | 1))) => {
            if order.authorization() == "pending" && signed.payload == json!({}) {
                order.challenges[which].status = "processing";
                let authorization = format!("{}.{}", order.token, account.1.thumbprint());
                tokio::spawn(check(Arc::clone(shared), at, which, authorization));
            }
            Ok(Answer::json(200, &order.challenge(&shared.base, at, which)))
        }
        ("finalize", None) => {
            if order.status() != "ready" {
                return Err(Answer::problem(403, "orderNotReady", "nothing is proved"));
            }
            let request = signed.payload["csr"].as_str().and_then(unbase64url);
            let life = Duration::from_secs(shared.life.load(Ordering::SeqCst).into());
            let chain = request.and_then(|r| shared.issuer.sign(&r, &order.name, life));
            let bad = || Answer::problem(400, "badCSR", "not a request for this name");
            order.chain = Some(chain.ok_or_else(bad)?);
            let (body, name) = (order.show(&shared.base, at), order.name.clone());
            state.asked.signed.push(name);
            Ok(Answer::json(200, &body).at(format!("{}/order/{at}", shared.base)))
        }
        ("certificate", None) => Ok(Answer {
            kind: "application/pem-certificate-chain",
            body: order.chain.clone().ok_or_else(missing)?.into_bytes(),
            ..Answer::json(200, &Value::Null)
        }),
        _ => Err(missing()),
    }
}

fn new_account(
    shared: &Shared,
    state: &mut State,
    key: &Public,
    asked: &Value,
) -> Result<Answer, Answer> {
    if asked["termsOfServiceAgreed"] != true {
        let why = "the terms were not agreed to";
        return Err(Answer::problem(403, "userActionRequired", why));
    }
    let known = state.accounts.iter().position(|(_, k)| k == key);
    let status = if known.is_some() { 200 } else { 201 };
    let at = known.unwrap_or_else(|| {
        state.asked.accounts += 1;
        let id = format!("{}/account/{}", shared.base, state.asked.accounts);
        state.accounts.push((id, key.clone()));
        state.accounts.len() - 1
    });
    let id = state.accounts[at].0.clone();
    Ok(Answer::json(status, &json!({"status": "valid"})).at(id))
}

fn new_order(
    shared: &Shared,
    state: &mut State,
    account: String,
    asked: &Value,
) -> Result<Answer, Answer> {
    let identifiers = asked["identifiers"].as_array();
    let name = match identifiers.map(Vec::as_slice) {
        Some([only]) if only["type"] == "dns" => only["value"].as_str().unwrap_or_default(),
        _ => return Err(Answer::problem(400, "malformed", "one name in one order")),
    };
    state.asked.orders.push(name.to_owned());
    if shared.refusing.load(Ordering::SeqCst) {
        let why = format!("no certificate for {name}: policy forbids");
        return Err(Answer::problem(403, "rejectedIdentifier", &why));
    }
    let at = state.orders.len();
    let challenge = |kind| Challenge {
        kind,
        status: "pending",
        problem: None,
    };
    state.orders.push(Order {
        account,
        name: name.to_owned(),
        token: format!("token-{at}-{}", state.last),
        challenges: [challenge("http-01"), challenge("tls-alpn-01")],
        chain: None,
    });
    let body = state.orders[at].show(&shared.base, at);
    Ok(Answer::json(201, &body).at(format!("{}/order/{at}", shared.base)))
}

/// Looks where the name leads.
async fn check(shared: Arc<Shared>, at: usize, which: usize, authorization: String) {
    let (kind, name, token) = {
        let state = shared.state();
        let order = &state.orders[at];
        let kind = order.challenges[which].kind;
        (kind, order.name.clone(), order.token.clone())
    };
    let found = match kind {
        "tls-alpn-01" => {
            let port = shared.tls_port.load(Ordering::SeqCst);
            look::by_tls(port, &name, &authorization).await
        }
        _ => {
            let port = shared.http_port.load(Ordering::SeqCst);
            look::by_http(port, &name, &token, &authorization).await
        }
    };
    let mut state = shared.state();
    let looked = (kind.to_owned(), name, found.is_ok());
    state.asked.looks.push(looked);
    let challenge = &mut state.orders[at].challenges[which];
    challenge.status = if found.is_ok() { "valid" } else { "invalid" };
    challenge.problem = found.err();
}
