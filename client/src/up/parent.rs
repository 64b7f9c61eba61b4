//! The half of `up` with rights.

mod follow;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rvpn_proto::control::{Prefix, Welcome};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};

use super::control::{self, Asked, Question};
use super::dial::dial;
use super::fd::{go_far, stay_near};
use super::half::{Half, Signals};
use super::journal::Journal;
use super::mend::Mender;
use super::net::Net;
use super::plan::{self, Terms};
use super::rules::Plan;
use super::wire::{Order, Report, Way};
use super::{device, dns};
use crate::cli::Up;
use crate::fail::{Failure, Outcome, While as _};
use crate::profile::{self, Address, Profile};
use crate::reach;

/// How often the other half may die in a row.
const RESTARTS: u32 = 8;
/// How long it may take to say goodbye.
const GOODBYE: Duration = Duration::from_secs(3);
/// Whether programs may bind to the tunnel's address.
const BIND: &str = "/proc/sys/net/ipv4/ip_nonlocal_bind";
/// A session that lasts so long was a success.
pub(super) const STEADY: Duration = Duration::from_secs(10);
/// Changes of the network come in swarms.
const SETTLE: Duration = Duration::from_millis(50);

struct Parent {
    args: Up,
    name: String,
    profile: Profile,
    authorities: Option<String>,
    to: Address,
    addresses: Vec<SocketAddr>,
    /// Where newer ones go.
    found: mpsc::Sender<Vec<SocketAddr>>,
    turn: usize,
    net: Net,
    plan: Plan,
    local: Vec<Prefix>,
    seen: String,
    journal: Journal,
    device: Option<(OwnedFd, bool, Terms)>,
    captured: bool,
    half: Half,
    restarts: u32,
    /// The connection that the other half has, until it is let in.
    dialled: Option<OwnedFd>,
    /// For `status`.
    state: &'static str,
    begun: Instant,
    /// The session that is, or the one that was.
    since: Instant,
    connected: u64,
    trouble: Option<String>,
    counted: (Way, Way, Option<f64>),
}

/// What strangers said, fit for a terminal.
fn shown(text: &str) -> String {
    let fit = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().take(500).map(fit).collect()
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

/// Why the loop ended.
enum End {
    Asked(Option<oneshot::Sender<Value>>),
    Failed(Failure),
}

/// Runs until told to end.
pub(crate) async fn run(args: Up) -> Outcome {
    let (name, profile) = profile::choose(&args.choice)?;
    let to = profile.address()?;
    // Wrong files are to be known before anything is changed.
    let authorities = crate::tls::authorities(&profile.trust)?;
    crate::tls::connector(&profile.trust, authorities.as_deref())?;
    profile.token()?;
    // Nobody reads the key from a process that died, or out of this one.
    nix::sys::prctl::set_dumpable(false).while_doing("hide this process's memory")?;
    plan::check_name(&args.interface)?;
    let lock = control::alone().await?;
    let mut journal = Journal {
        interface: args.interface.clone(),
        pid: std::process::id(),
        blocks: args.kill_switch,
        ..Journal::default()
    };
    let left = Journal::read()?;
    let blocked = args.kill_switch && left.as_ref().is_some_and(|left| left.blocks);
    match left {
        Some(left) if blocked => {
            eprintln!("taking over from a killed 'rvpn up'; what it blocked stays blocked");
            journal.take_over(left).await?;
        }
        Some(left) if left.blocks => {
            return Err(Failure::usage(
                "what a killed 'rvpn up --kill-switch' blocked is still blocked: go on with \
                 --kill-switch, or open it first with 'sudo rvpn down --repair'",
            ));
        }
        Some(left) => {
            eprintln!("putting back what a killed 'rvpn up' had left");
            left.undo().await?;
        }
        None => {}
    }
    let addresses = match (reach::resolve(&to).await, journal.gateway.take()) {
        (Ok(found), _) => found,
        // What is blocked may be the way to the resolver.
        (Err(_), Some((known, addresses))) if known == to.to_string() => addresses,
        (Err(failure), _) => return Err(failure),
    };
    journal.gateway = Some((to.to_string(), addresses.clone()));
    let net = Net::open().while_doing("talk to the kernel")?;
    if net.index(&args.interface).await.is_ok() {
        return Err(Failure::usage(format!(
            "an interface {} exists already: choose another name with --interface",
            args.interface
        )));
    }
    let local = net.local(&args.interface).await?;
    let plan = plan::plan(&args, &local);
    let seen = net.snapshot(&args.interface).await?;
    journal.write()?;
    let questions = control::listen()?;
    let mender = match args.kill_switch {
        // What is blocked stays blocked, that is what it is for.
        true => None,
        false => Some(Mender::start()?),
    };
    let half = Half::start()?;
    let blocks = args.kill_switch;
    let (find, found) = mpsc::channel(1);
    let mut parent = Parent {
        args,
        name,
        profile,
        authorities,
        to,
        addresses,
        found: find,
        turn: 0,
        net,
        plan,
        local,
        seen,
        journal,
        device: None,
        captured: false,
        half,
        restarts: 0,
        dialled: None,
        state: "connecting",
        begun: Instant::now(),
        since: Instant::now(),
        connected: 0,
        trouble: None,
        counted: (Way::default(), Way::default(), None),
    };
    let end = match parent.live(questions, found).await {
        Ok(end) => end,
        Err(failure) => End::Failed(failure),
    };
    // A failure must not open what was protected until now.
    let stays = blocks && matches!(end, End::Failed(_)) && (blocked || parent.connected > 0);
    let undone = parent.end(stays).await;
    if stays {
        eprintln!(
            "what the kill switch blocks stays blocked: 'sudo rvpn up --kill-switch' takes \
             over, 'sudo rvpn down --repair' opens it"
        );
    }
    if let Some(mender) = mender {
        mender.dismiss();
    }
    control::close();
    drop(lock);
    match end {
        End::Asked(answer) => {
            if let Some(answer) = answer {
                let said = match &undone {
                    Ok(()) => json!({"state": "down"}),
                    Err(failure) => json!({"failed": failure.to_string()}),
                };
                let _gone = answer.send(said);
                // The answer is written by another task.
                sleep(Duration::from_millis(20)).await;
            }
            undone
        }
        End::Failed(failure) => undone.and(Err(failure)),
    }
}

impl Parent {
    async fn live(
        &mut self,
        mut questions: mpsc::Receiver<Asked>,
        mut found: mpsc::Receiver<Vec<SocketAddr>>,
    ) -> Outcome<End> {
        // Before anything is changed that a signal would leave behind.
        let mut signals = Signals::new()?;
        let mut events = self.events()?;
        if self.args.kill_switch && !self.args.split {
            self.capture().await?;
        }
        self.begin().await?;
        loop {
            tokio::select! {
                report = self.half.wire.receive::<Report>() => {
                    let report = report.while_doing("hear the other half")?;
                    match report {
                        Some((report, _)) => self.heard(report).await?,
                        None => self.again().await?,
                    }
                }
                Some((question, answer)) = questions.recv() => match question {
                    Question::Status => {
                        let _gone = answer.send(self.status());
                    }
                    Question::Down => return Ok(End::Asked(Some(answer))),
                },
                () = signals.any() => return Ok(End::Asked(None)),
                Some(()) = events.recv() => self.look().await?,
                Some(addresses) = found.recv() => {
                    self.addresses = addresses;
                    self.turn = 0;
                }
            }
        }
    }

    async fn begin(&mut self) -> Outcome {
        let order = Order::Begin {
            address: self.profile.address.clone(),
            trust: self.profile.trust.clone(),
            authorities: self.authorities.clone(),
            instance: self.profile.instance.clone(),
            offload: !self.args.no_offload,
            mtu: self.args.mtu,
            welcomed: self.connected > 0,
        };
        self.tell(&order, None).await
    }

    async fn tell(&self, order: &Order, fd: Option<&OwnedFd>) -> Outcome {
        let fd = fd.map(|fd| fd.as_raw_fd());
        match self.half.wire.send(order, fd).await {
            // It has just ended, which is heard next.
            Err(error) if is_gone(&error) => Ok(()),
            done => done.while_doing("tell the other half"),
        }
    }

    async fn heard(&mut self, report: Report) -> Outcome {
        match report {
            Report::Dial => self.dial().await,
            Report::Welcomed { welcome } => self.welcomed(&welcome).await,
            Report::Lost { why, retry_ms } => {
                self.dialled = None;
                let why = shown(&why);
                self.turn += 1;
                let first = self.state != "reconnecting" || self.trouble.as_ref() != Some(&why);
                if first {
                    eprintln!("{why}; trying again in {:.1} s", retry_ms as f64 / 1000.0);
                }
                if self.state == "connected" {
                    self.state = "reconnecting";
                }
                self.trouble = Some(why);
                Ok(())
            }
            Report::Failed { why, grounds } => Err(Failure::new(grounds.into(), shown(&why))),
            Report::Counted {
                outbound,
                inbound,
                rtt_ms,
            } => {
                self.counted = (outbound, inbound, rtt_ms);
                if self.since.elapsed() > STEADY {
                    self.restarts = 0;
                }
                Ok(())
            }
            Report::Left => Ok(()),
        }
    }

    /// The other half died. It held nothing that cannot be had again.
    async fn again(&mut self) -> Outcome {
        let status = self.half.finish()?;
        self.restarts += 1;
        if self.restarts > RESTARTS {
            return Err(Failure::internal(format!(
                "the half that talks to the gateway keeps ending: {status}"
            )));
        }
        eprintln!("the half that talks to the gateway ended ({status}): starting it again");
        self.half = Half::start()?;
        self.dialled = None;
        self.state = "reconnecting";
        self.begin().await
    }

    async fn dial(&mut self) -> Outcome {
        let token = match self.profile.token() {
            Ok(token) => token,
            Err(failure) => {
                let why = failure.to_string();
                // One that is just being replaced is there a moment later.
                let last = self.connected == 0;
                return self.tell(&Order::NotDialled { why, last }, None).await;
            }
        };
        let address = self.addresses[self.turn % self.addresses.len()];
        match dial(address) {
            Ok(fd) => {
                self.tell(&Order::Dialled { token }, Some(&fd)).await?;
                self.dialled = Some(fd);
                Ok(())
            }
            Err(error) => {
                let why = format!("cannot connect to {address}: {}", error.desc());
                self.tell(&Order::NotDialled { why, last: false }, None)
                    .await
            }
        }
    }

    async fn welcomed(&mut self, welcome: &Welcome) -> Outcome {
        if let Some(connection) = self.dialled.take() {
            // The other half may not choose what is not allowed to everybody.
            go_far(connection.as_fd());
            stay_near(connection.as_fd());
        }
        let judged = plan::judge(&self.args, &mut self.plan, welcome, &self.local);
        if let Err(failure) = judged {
            let why = failure.to_string();
            self.tell(&Order::Refuse { why }, None).await?;
            // What was good before is refused because the network here has
            // changed. Whoever changed it must not end what protects from them.
            return match self.connected {
                0 => Err(failure),
                _ => Ok(()),
            };
        }
        let terms = Terms::of(welcome);
        if self
            .device
            .as_ref()
            .is_none_or(|(.., before)| *before != terms)
        {
            self.build(terms, welcome).await?;
        }
        let order = match (self.half.has_device, &self.device) {
            (false, Some((_, datagrams, _))) => Order::Device {
                datagrams: *datagrams,
            },
            _ => Order::Resume,
        };
        let device = self.device.as_ref().map(|(fd, ..)| fd);
        self.tell(&order, device.filter(|_| !self.half.has_device))
            .await?;
        self.half.has_device = true;
        self.state = "connected";
        self.trouble = None;
        self.connected += 1;
        self.since = Instant::now();
        self.say(welcome);
        self.refresh();
        Ok(())
    }

    fn say(&self, welcome: &Welcome) {
        let v6 = welcome
            .v6
            .map(|p| format!(" {}", p.address))
            .unwrap_or_default();
        let what = match (&self.plan.only, welcome.resumed) {
            _ if self.connected > 1 && welcome.resumed => "connected again, on the same lease",
            _ if self.connected > 1 => "connected again, on a new lease",
            (None, _) => "connected; everything goes through the tunnel",
            (Some(_), _) => "connected; the named routes go through the tunnel",
        };
        println!(
            "{what}: {}{v6} on {} by {}",
            welcome.v4.address, self.plan.interface, self.to
        );
    }

    /// A device for these terms, with everything that leads to it.
    async fn build(&mut self, terms: Terms, welcome: &Welcome) -> Outcome {
        if self.device.take().is_some() {
            // Nothing may find its way out while there is none.
            self.net.shut(&self.plan).await?;
            self.net.remove(&self.plan.interface).await?;
            self.half.has_device = false;
        }
        let (fd, datagrams) = device::make(&self.plan.interface)?;
        self.net
            .attach(&self.plan, terms.mtu, terms.v4, terms.v6)
            .await?;
        self.net.open_up(&self.plan).await?;
        self.device = Some((fd, datagrams, terms));
        self.capture().await?;
        let resolvers = plan::resolvers(&self.args, welcome);
        if resolvers.is_empty() && self.plan.only.is_none() && !self.args.no_dns {
            eprintln!(
                "the gateway suggests no resolver, so names are still asked of this machine's \
                 own, which the tunnel may not reach: --dns ADDRESS names one"
            );
        }
        dns::point(&mut self.journal, &resolvers)
    }

    async fn capture(&mut self) -> Outcome {
        self.loosen().await?;
        if !self.captured {
            self.captured = true;
            // Its address is in no table that this is looked up in; what is sent
            // from others than the machine's addresses is refused all the same.
            self.journal.set(PathBuf::from(BIND), "1")?;
            self.net.capture(&self.plan).await?;
        }
        Ok(())
    }

    fn status(&self) -> Value {
        let (outbound, inbound, rtt) = &self.counted;
        let terms = self.device.as_ref().map(|(.., terms)| terms);
        json!({
            "state": self.state,
            "name": self.name,
            "gateway": self.to.to_string(),
            "interface": self.plan.interface,
            "v4": terms.map(|t| t.v4),
            "v6": terms.and_then(|t| t.v6),
            "mtu": terms.map(|t| t.mtu),
            "offload": terms.map(|t| t.offload),
            "full": self.plan.only.is_none(),
            "kill-switch": self.plan.kill_switch,
            "seconds": self.begun.elapsed().as_secs(),
            "reconnects": self.connected.saturating_sub(1),
            "trouble": self.trouble,
            "outbound": outbound,
            "inbound": inbound,
            "rtt-ms": rtt,
            "pid": std::process::id(),
        })
    }

    /// Says goodbye and puts everything back, or leaves it blocked.
    async fn end(mut self, stays: bool) -> Outcome {
        let leave = async {
            self.tell(&Order::Stop, None).await?;
            while let Some((report, _)) = self
                .half
                .wire
                .receive::<Report>()
                .await
                .while_doing("hear the other half")?
            {
                if matches!(report, Report::Left | Report::Failed { .. }) {
                    break;
                }
            }
            Outcome::Ok(())
        };
        // Whether it was polite or not, it goes.
        let _polite = timeout(GOODBYE, leave).await;
        let _status = self.half.finish();
        drop(self.device);
        match stays {
            true => Ok(()),
            false => self.journal.undo().await,
        }
    }
}
