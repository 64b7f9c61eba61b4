//! The gateway's end of the helper's socket.
//!
//! One task owns the connection and speaks to the helper one exchange at a
//! time; sessions only hold a sender to it. Nothing on the data path waits
//! here: a session waits for its lease before it has any data, and giving a
//! lease back is a message nobody waits for.
//!
//! The helper may restart at any time. Leases outlive it, so the task
//! reconnects, confirms every lease still in use and passes on what it could
//! not say in between.

mod link;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rvpn_ipc::frame::{FLAG_RESUMED, FLAG_SUCCESSOR};
use rvpn_ipc::{
    Class, EXCHANGE_TIMEOUT, Generation, Key, Kind, Op, Reply, Request, Slot, Status, seqpacket,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{debug, info, warn};

use self::link::{Broken, Link};

/// How long a session waits for its lease, queueing included.
const ACQUIRE_LIMIT: Duration = Duration::from_millis(1500);
/// Requests that may wait for the helper; beyond it clients are told to come back.
const WAITING: usize = 4096;
/// First and last pause between attempts to reach a helper that is away.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// How often a former holder's device is waited for before giving up.
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// Where the helper is and who it must be.
#[derive(Clone, Debug)]
pub struct HelperConfig {
    /// Its socket.
    pub socket: PathBuf,
    /// The user it runs as. Whoever else answers is an impostor.
    pub uid: u32,
    /// Take over from a gateway that still lives.
    pub successor: bool,
}

/// Why there is no lease.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// Every slot is taken.
    #[error("no slot of the pool is free")]
    NoCapacity {
        /// When asking again makes sense.
        retry_after: Duration,
    },
    /// The helper said no for another reason.
    #[error("the helper refused: {0}")]
    Refused(Status),
    /// The helper is not there, or does not answer in time.
    #[error("the helper does not answer; is rvpn-privhelper running?")]
    Away,
}

/// What the helper says about a lease by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseEvent {
    /// The device vanished or was changed by someone else.
    DeviceLost,
    /// Another connection acquired the same key.
    TakenOver,
}

/// The state of the connection, for readiness and the admin view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HelperState {
    /// The pool's constants and figures as of the last hello, while connected.
    pub pool: Option<Reply>,
    /// The packet rules were removed by someone; forwarding is closed until they are back.
    pub rules_lost: bool,
}

/// A slot in our hands. Dropping it means "the session is lost, keep the slot
/// for its key a while"; the TUN must be closed before.
#[derive(Debug)]
pub struct Lease {
    /// Addresses and the rest.
    pub reply: Reply,
    /// Whose it is.
    pub key: Key,
    events: watch::Receiver<Option<LeaseEvent>>,
    ends: mpsc::UnboundedSender<End>,
    ending: Op,
    /// Tells this hold from a later one on the same lease.
    hold: u64,
}

impl Lease {
    /// Whether the key had this slot already.
    pub fn resumed(&self) -> bool {
        self.reply.flags & FLAG_RESUMED != 0
    }

    /// It passes to the next connection of its client, for whom it is the one of before.
    pub fn continued(&mut self) {
        self.reply.flags |= FLAG_RESUMED;
    }

    /// Makes dropping the lease a release: the slot is cleaned at once.
    pub fn release_on_drop(&mut self) {
        self.ending = Op::Release;
    }

    /// The helper's own messages about this lease.
    pub fn events(&self) -> watch::Receiver<Option<LeaseEvent>> {
        self.events.clone()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // The receiver is gone only when the whole gateway ends, and then
        // the helper sees the connection close and lingers by itself.
        drop(self.ends.send(End {
            slot: self.reply.slot,
            generation: self.reply.generation,
            op: self.ending,
            hold: self.hold,
        }));
    }
}

/// A handle on the task that owns the connection.
#[derive(Clone, Debug)]
pub struct Helper {
    acquires: mpsc::Sender<Acquire>,
    state: watch::Receiver<HelperState>,
}

#[derive(Debug)]
struct Acquire {
    key: Key,
    kind: Kind,
    class: Class,
    give_up: Instant,
    answer: oneshot::Sender<Result<(Lease, Option<OwnedFd>), HelperError>>,
}

/// A lease that its session no longer holds.
#[derive(Debug)]
struct End {
    slot: Slot,
    generation: Generation,
    op: Op,
    hold: u64,
}

impl Helper {
    /// Starts the owning task on the current runtime. It connects by itself
    /// and keeps trying; [`Helper::ready`] waits for it.
    pub fn start(config: HelperConfig) -> Helper {
        let (acquires, acquire_rx) = mpsc::channel(WAITING);
        let (ends, end_rx) = mpsc::unbounded_channel();
        let (state_tx, state) = watch::channel(HelperState::default());
        let owner = Owner {
            config,
            seq: 0,
            holds: 0,
            held: BTreeMap::new(),
            owed: VecDeque::new(),
            state: state_tx,
            ends,
        };
        tokio::spawn(owner.run(acquire_rx, end_rx));
        Helper { acquires, state }
    }

    /// The state of the connection, now and as it changes.
    pub fn state(&self) -> watch::Receiver<HelperState> {
        self.state.clone()
    }

    /// Waits until the helper has answered a hello, and returns the pool's constants.
    pub async fn ready(&self) -> Option<Reply> {
        let mut state = self.state.clone();
        state.wait_for(|s| s.pool.is_some()).await.ok()?.pool
    }

    /// A slot for `key`, with its TUN if the kind has one. Answers within two
    /// seconds whatever the helper does.
    pub async fn acquire(
        &self,
        key: Key,
        kind: Kind,
        class: Class,
    ) -> Result<(Lease, Option<OwnedFd>), HelperError> {
        if self.state.borrow().pool.is_none() {
            return Err(HelperError::Away);
        }
        let (answer, got) = oneshot::channel();
        let give_up = Instant::now() + ACQUIRE_LIMIT;
        let acquire = Acquire {
            key,
            kind,
            class,
            give_up,
            answer,
        };
        self.acquires
            .try_send(acquire)
            .map_err(|_| HelperError::Away)?;
        match timeout_at(give_up, got).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) | Err(_) => Err(HelperError::Away),
        }
    }
}

struct Held {
    hold: u64,
    key: Key,
    events: watch::Sender<Option<LeaseEvent>>,
}

/// Owner of the connection and of what must survive its loss.
struct Owner {
    config: HelperConfig,
    seq: u32,
    holds: u64,
    held: BTreeMap<(Slot, Generation), Held>,
    /// Endings not yet said to the helper.
    owed: VecDeque<(Slot, Generation, Key, Op)>,
    state: watch::Sender<HelperState>,
    ends: mpsc::UnboundedSender<End>,
}

impl Owner {
    async fn run(
        mut self,
        mut acquires: mpsc::Receiver<Acquire>,
        mut ends: mpsc::UnboundedReceiver<End>,
    ) {
        let mut pause = BACKOFF.0;
        let mut complained = false;
        loop {
            match self.connect().await {
                Ok(link) => {
                    info!(leases = self.held.len(), "connected to the helper");
                    (pause, complained) = (BACKOFF.0, false);
                    let why = self.serve(&link, &mut acquires, &mut ends).await;
                    self.state.send_modify(|s| s.pool = None);
                    match why {
                        None => return,
                        Some(why) => warn!(%why, "lost the helper; sessions go on, new ones wait"),
                    }
                }
                Err(why) if complained => debug!(%why, "helper still away"),
                Err(why) => {
                    warn!(%why, socket = %self.config.socket.display(), "cannot reach the helper; trying on");
                    complained = true;
                }
            }
            let next = Instant::now() + pause;
            pause = (pause * 2).min(BACKOFF.1);
            // Sessions may end meanwhile, and nobody may wait for a lease.
            loop {
                tokio::select! {
                    () = sleep_until(next) => break,
                    end = ends.recv() => match end {
                        Some(end) => self.note(end),
                        None => return,
                    },
                    acquire = acquires.recv() => match acquire {
                        Some(a) => drop(a.answer.send(Err(HelperError::Away))),
                        None => return,
                    },
                }
            }
        }
    }

    /// Connects, checks who answers, says hello and claims what we hold.
    async fn connect(&mut self) -> Result<Link, Broken> {
        let path = self.config.socket.clone();
        // Connecting blocks while the helper's backlog is full.
        let fd = tokio::task::spawn_blocking(move || seqpacket::connect(&path))
            .await
            .map_err(io::Error::other)??;
        let found = seqpacket::peer_cred(fd.as_fd())?.uid;
        let expected = self.config.uid;
        if found != expected {
            return Err(Broken::Impostor { found, expected });
        }
        let link = Link::new(fd)?;
        let flags = if self.config.successor {
            FLAG_SUCCESSOR
        } else {
            0
        };
        let hello = Request {
            flags,
            ..Request::new(Op::Hello, self.next())
        };
        let (reply, _) = self.exchange(&link, &hello).await?;
        if reply.status != Status::Ok {
            return Err(Broken::Refused(reply.status));
        }
        // A session lost while the helper was away needs no word: an unclaimed
        // lease lingers. One given back is claimed once more, to release it.
        self.owed.retain(|(_, _, _, op)| *op == Op::Release);
        let claims: Vec<_> = self
            .held
            .iter()
            .map(|(id, held)| (*id, held.key))
            .chain(self.owed.iter().map(|&(s, g, key, _)| ((s, g), key)))
            .collect();
        for ((slot, generation), key) in claims {
            let confirm = Request {
                slot,
                generation,
                key,
                ..Request::new(Op::Confirm, self.next())
            };
            let (reply, _) = self.exchange(&link, &confirm).await?;
            if reply.status != Status::Ok {
                warn!(slot, status = %reply.status, "the helper does not know a lease in use");
                self.tell(slot, generation, LeaseEvent::DeviceLost);
            }
        }
        self.state.send_modify(|s| {
            s.pool = Some(reply);
            s.rules_lost = false;
        });
        Ok(link)
    }

    async fn serve(
        &mut self,
        link: &Link,
        acquires: &mut mpsc::Receiver<Acquire>,
        ends: &mut mpsc::UnboundedReceiver<End>,
    ) -> Option<Broken> {
        loop {
            while let Some(&(slot, generation, _, op)) = self.owed.front() {
                let request = Request {
                    slot,
                    generation,
                    ..Request::new(op, self.next())
                };
                match self.exchange(link, &request).await {
                    Ok((reply, _)) => {
                        self.owed.pop_front();
                        if reply.status != Status::Ok {
                            debug!(slot, ?op, status = %reply.status, "ending a lease was refused");
                        }
                    }
                    Err(why) => return Some(why),
                }
            }
            let step = tokio::select! {
                // Endings first: they may free what a waiting acquire needs.
                biased;
                end = ends.recv() => match end {
                    Some(end) => { self.note(end); Ok(()) }
                    None => return None,
                },
                got = link.receive() => got.and_then(|(reply, fd)| self.unasked(&reply, fd)),
                acquire = acquires.recv() => match acquire {
                    Some(a) => self.acquire(link, a).await,
                    None => return None,
                },
            };
            if let Err(why) = step {
                return Some(why);
            }
        }
    }

    async fn acquire(&mut self, link: &Link, ask: Acquire) -> Result<(), Broken> {
        loop {
            if ask.answer.is_closed() {
                return Ok(());
            }
            let request = Request {
                key: ask.key,
                kind: Some(ask.kind),
                class: ask.class,
                ..Request::new(Op::Acquire, self.next())
            };
            let (reply, tun) = match self.exchange(link, &request).await {
                Ok(got) => got,
                Err(why) => {
                    drop(ask.answer.send(Err(HelperError::Away)));
                    return Err(why);
                }
            };
            let retry_after = Duration::from_millis(reply.retry_after_ms.into());
            let result = match reply.status {
                Status::Ok if tun.is_some() != ask.kind.has_tun() => {
                    return Err(Broken::Garbled(
                        "the descriptor does not fit the kind".into(),
                    ));
                }
                Status::Ok => Ok((self.hold(reply, ask.key), tun)),
                Status::NoCapacity => Err(HelperError::NoCapacity { retry_after }),
                Status::Busy => {
                    let pause = retry_after.clamp(Duration::from_millis(5), BUSY_PAUSE);
                    if Instant::now() + pause < ask.give_up {
                        // Rare, and bounded by the wait of the asking session.
                        tokio::time::sleep(pause).await;
                        continue;
                    }
                    Err(HelperError::Refused(Status::Busy))
                }
                other => Err(HelperError::Refused(other)),
            };
            // A session that gave up meanwhile drops the result: TUN closed, lease lingers.
            if let Err(Ok((lease, tun))) = ask.answer.send(result) {
                drop(tun);
                drop(lease);
            }
            return Ok(());
        }
    }

    fn hold(&mut self, reply: Reply, key: Key) -> Lease {
        let (events, receiver) = watch::channel(None);
        self.holds += 1;
        let hold = self.holds;
        self.held
            .insert((reply.slot, reply.generation), Held { hold, key, events });
        Lease {
            reply,
            key,
            events: receiver,
            ends: self.ends.clone(),
            ending: Op::Linger,
            hold,
        }
    }

    /// Takes note of an ending, unless the lease has a later holder by now.
    fn note(&mut self, end: End) {
        let id = (end.slot, end.generation);
        if self.held.get(&id).is_some_and(|h| h.hold == end.hold)
            && let Some(held) = self.held.remove(&id)
        {
            self.owed
                .push_back((end.slot, end.generation, held.key, end.op));
        }
    }

    fn tell(&self, slot: Slot, generation: Generation, event: LeaseEvent) {
        if let Some(held) = self.held.get(&(slot, generation)) {
            held.events.send_replace(Some(event));
        }
    }

    /// What arrives outside an exchange: notices, and answers that came after
    /// we had given up on them.
    fn unasked(&mut self, reply: &Reply, fd: Option<OwnedFd>) -> Result<(), Broken> {
        if reply.op.is_some() || fd.is_some() {
            return Err(Broken::Garbled("an answer nobody waits for".into()));
        }
        match reply.status {
            Status::DeviceLost => self.tell(reply.slot, reply.generation, LeaseEvent::DeviceLost),
            Status::TakenOver => self.tell(reply.slot, reply.generation, LeaseEvent::TakenOver),
            Status::RulesLost => {
                warn!("the packet rules were removed; the helper has closed forwarding");
                self.state.send_modify(|s| s.rules_lost = true);
            }
            Status::RulesRestored => {
                info!("the packet rules are back");
                self.state.send_modify(|s| s.rules_lost = false);
            }
            Status::Closing => debug!("the helper is shutting down"),
            other => debug!(status = %other, "notice of an unknown kind"),
        }
        Ok(())
    }

    fn next(&mut self) -> u32 {
        self.seq = self.seq.checked_add(1).unwrap_or(1);
        self.seq
    }

    /// One request and its answer. A helper that is silent for a second is
    /// given up and connected to anew, so that a late answer cannot be taken
    /// for a later request's.
    async fn exchange(
        &mut self,
        link: &Link,
        request: &Request,
    ) -> Result<(Reply, Option<OwnedFd>), Broken> {
        let deadline = Instant::now() + EXCHANGE_TIMEOUT;
        timeout_at(deadline, link.send(request))
            .await
            .map_err(|_| Broken::Silent)??;
        loop {
            let (reply, fd) = timeout_at(deadline, link.receive())
                .await
                .map_err(|_| Broken::Silent)??;
            match reply.op {
                None => self.unasked(&reply, fd)?,
                Some(op) if op == request.op && reply.seq == request.seq => {
                    return Ok((reply, fd));
                }
                Some(op) => {
                    return Err(Broken::Garbled(format!(
                        "{op:?} {} in answer to {:?} {}",
                        reply.seq, request.op, request.seq
                    )));
                }
            }
        }
    }
}
