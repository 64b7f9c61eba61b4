//! Judging the login of a request that is otherwise in order.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::header::{HeaderMap, USER_AGENT};
use hyper::http::request::Parts;
use rvpn_proto::packer::{self, Token};
use tracing::debug;

use super::answer::Refusal;
use super::request::Host;
use super::{Front, Visitor, Way};
use crate::admit::{Admission, Kind};
use crate::auth::credential::Credential;
use crate::auth::live::Pass;
use crate::auth::{Denied, Gate, Grant, Policy};
use crate::config::{Demo, Dialect};
use crate::demo::Guest;
use crate::limits::Place;
use crate::packer::desk::FrontDesk;
use crate::packer::{Arrival, Login, Print, print};

/// Somebody who wants in.
pub(super) struct Asked<'a> {
    pub(super) front: &'a Front,
    pub(super) head: &'a Parts,
    pub(super) visitor: Visitor,
    /// Whom limits and logs are about.
    pub(super) address: IpAddr,
}

impl Asked<'_> {
    /// Into a session of this kind.
    pub(super) async fn session(&self, kind: Kind) -> Result<(Way, Option<Pass>), Refusal> {
        let ready = match kind {
            // These need no lease, so nothing of the helper.
            Kind::Streams(_) if !self.front.stopped() => Ok(()),
            _ => self.front.ready(),
        };
        if let Err(why) = ready {
            debug!(%why, "not ready for a client");
            return Err(Refusal::busy(Duration::from_secs(2)));
        }
        let (policy, dialect) = match &kind {
            Kind::Native | Kind::Streams(_) => (Policy::Strict, None),
            Kind::Dialect(dialect) => (Gate::policy_of(dialect), Some(&**dialect)),
        };
        let anonymous = policy == Policy::Anonymous;
        let grant = self.judge(policy, dialect, dialect.is_some()).await?;
        let Grant {
            account,
            subject,
            token_id,
            expires_at,
            class,
            rights,
            tunnel: _,
            revoked,
            pass,
        } = grant;
        let admission = Admission {
            account,
            subject,
            token_id,
            expires_at,
            kind,
            anonymous,
            class,
            rights,
            peer: SocketAddr::new(self.address, self.visitor.peer.port()),
            listener: self.visitor.listener,
            revoked,
        };
        Ok((Way::Session(Box::new(admission)), Some(pass)))
    }

    /// Into the audience of the demonstration, which needs no tunnel to be ready.
    pub(super) async fn demo(&self, demo: &Demo) -> Result<(Way, Option<Pass>), Refusal> {
        let busy = || Refusal::busy(Duration::from_secs(5));
        if self.front.stopped() {
            return Err(busy());
        }
        let policy = match demo.anonymous {
            true => Policy::Anonymous,
            false => Policy::Strict,
        };
        let grant = self.judge(policy, None, true).await?;
        let chair = self.front.audience.enter(demo.clients).ok_or_else(busy)?;
        let guest = Guest::new(chair, &grant, demo, self.address);
        Ok((Way::Demo(guest), Some(grant.pass)))
    }

    /// Into a tunnel for visitors. Who shows no token now may do so in a moment.
    pub(super) async fn tunnel(
        &self,
        front: &Arc<Front>,
        host: &Host,
    ) -> Result<(Way, Option<Pass>), Refusal> {
        if let Err(why) = self.front.ready() {
            debug!(%why, "not ready for a client");
            return Err(Refusal::busy(Duration::from_secs(2)));
        }
        let head = self.head;
        let shown = Credential::find(&head.headers, None, false);
        let queried = Credential::find(&HeaderMap::new(), head.uri.query(), true);
        let token = match (&shown, &queried) {
            (_, Ok(Some(_)) | Err(_)) => Token::Query,
            (Ok(None), Ok(None)) => Token::None,
            (Ok(Some(_)) | Err(_), Ok(None)) => Token::Header,
        };
        let agent = head.headers.get(USER_AGENT).and_then(|v| v.to_str().ok());
        let asked = packer::Asked {
            path: head.uri.path(),
            query: head.uri.query().unwrap_or(""),
            agent: agent.unwrap_or(""),
            token,
        };
        let mut profile = self
            .front
            .config()
            .packer
            .profile
            .unwrap_or(asked.profile());
        let login = match token {
            Token::None => None,
            Token::Query | Token::Header => {
                let (grant, print) = self.judged(Policy::Tunnel, None, true).await?;
                profile = grant.tunnel.profile.unwrap_or(profile);
                Some(Login { print, grant })
            }
        };
        let arrival = Arrival {
            profile,
            desk: Arc::new(FrontDesk {
                front: Arc::clone(front),
                address: self.address,
            }),
            login,
            pending: None,
            peer: SocketAddr::new(self.address, self.visitor.peer.port()),
            host: host.name.as_str().into(),
            port: host.port.unwrap_or(self.visitor.port),
        };
        Ok((Way::Tunnel(Box::new(arrival)), None))
    }

    /// Judges the token and counts failures.
    async fn judge(
        &self,
        policy: Policy<'_>,
        dialect: Option<&Dialect>,
        query_allowed: bool,
    ) -> Result<Grant, Refusal> {
        let judged = self.judged(policy, dialect, query_allowed).await;
        judged.map(|(grant, _)| grant)
    }

    /// The same, with the print of the token.
    async fn judged(
        &self,
        policy: Policy<'_>,
        dialect: Option<&Dialect>,
        query_allowed: bool,
    ) -> Result<(Grant, Print), Refusal> {
        let (front, head) = (self.front, self.head);
        let limits = front.config().limits;
        let place = Place::of(self.address);
        let now = Instant::now();
        if policy != Policy::Anonymous
            && let Some(wait) = front.failures.blocked(place, limits.login_failures, now)
        {
            return Err(Refusal::slow_down(wait));
        }
        let judged = async {
            let credential = Credential::find(&head.headers, head.uri.query(), query_allowed)?;
            let limit = limits.sessions_per_account;
            let grant = front
                .gate
                .login(credential.as_ref(), policy, dialect, limit)
                .await?;
            let token = credential.as_ref().map_or("", Credential::token);
            Ok((grant, print(token)))
        };
        judged.await.map_err(|why| {
            front.refusals.note(why, self.address, now);
            match why {
                Denied::TooMany => Refusal::slow_down(Duration::from_secs(1)),
                Denied::Missing | Denied::Account => Refusal::forbidden(),
                _ => {
                    front.failures.note(place, limits.login_failures, now);
                    Refusal::forbidden()
                }
            }
        })
    }
}
