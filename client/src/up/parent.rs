//! The half of `up` with rights.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use futures_util::StreamExt as _;
use rtnetlink::MulticastGroup;
use rvpn_proto::control::{Prefix, Welcome};
use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};

use super::control::{self, Asked, Question};
use super::dial::dial;
use super::journal::Journal;
use super::mend::Mender;
use super::net::{Net, Plan, many_users};
use super::wire::{Order, Report, Way, Wire, pair};
use super::{device, dns, plan};
use crate::cli::Up;
use crate::fail::{Failure, Kind, Outcome, While as _};
use crate::home::Owner;
use crate::profile::{self, Address, Profile};
use crate::reach;

/// How often the other half may die in a row.
const RESTARTS: u32 = 3;
/// How long it may take to say goodbye.
const GOODBYE: Duration = Duration::from_secs(3);
/// Changes of the network come in swarms.
const SETTLE: Duration = Duration::from_millis(50);
/// Whom the other half becomes when nobody better is known.
const NOBODY: u32 = 65_534;

/// What the tunnel has been told.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Terms {
    v4: Ipv4Addr,
    v6: Option<Ipv6Addr>,
    mtu: u32,
    offload: bool,
}

impl Terms {
    fn of(welcome: &Welcome) -> Terms {
        Terms {
            v4: welcome.v4.address,
            v6: welcome.v6.map(|pair| pair.address),
            mtu: welcome.mtu,
            offload: welcome
                .capabilities
                .iter()
                .any(|c| c == rvpn_proto::control::OFFLOAD),
        }
    }
}

/// The other half.
struct Half {
    wire: Wire,
    process: Child,
    has_device: bool,
}

struct Parent {
    args: Up,
    name: String,
    profile: Profile,
    to: Address,
    addresses: Vec<SocketAddr>,
    turn: usize,
    net: Net,
    plan: Plan,
    local: Vec<Prefix>,
    seen: String,
    journal: Journal,
    device: Option<(OwnedFd, Terms)>,
    captured: bool,
    half: Half,
    restarts: u32,
    /// For `status`.
    state: &'static str,
    begun: Instant,
    connected: u64,
    trouble: Option<String>,
    counted: (Way, Way, Option<f64>),
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
    crate::tls::connector(&profile.trust)?;
    profile.token()?;
    if let Some(left) = Journal::read()? {
        eprintln!("putting back what a killed 'rvpn up' had left");
        left.undo().await?;
    }
    let addresses = reach::resolve(&to).await?;
    let net = Net::open().while_doing("talk to the kernel")?;
    if net.index(&args.interface).await.is_ok() {
        return Err(Failure::usage(format!(
            "an interface {} exists already: choose another name with --interface",
            args.interface
        )));
    }
    let local = net.local(&args.interface).await?;
    let plan = plan::plan(&args, &local)?;
    let seen = net.snapshot(&args.interface).await?;
    let journal = Journal {
        interface: args.interface.clone(),
        pid: std::process::id(),
        ..Journal::default()
    };
    journal.write()?;
    let questions = control::listen()?;
    let mender = match args.kill_switch {
        // What is blocked stays blocked, that is what it is for.
        true => None,
        false => Some(Mender::start()?),
    };
    let half = Half::start()?;
    let mut parent = Parent {
        args,
        name,
        profile,
        to,
        addresses,
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
        state: "connecting",
        begun: Instant::now(),
        connected: 0,
        trouble: None,
        counted: (Way::default(), Way::default(), None),
    };
    let end = match parent.live(questions).await {
        Ok(end) => end,
        Err(failure) => End::Failed(failure),
    };
    let undone = parent.end().await;
    if let Some(mender) = mender {
        mender.dismiss();
    }
    control::close();
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

impl Half {
    fn start() -> Outcome<Half> {
        let (ours, theirs) = pair().while_doing("make a socket")?;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("__carry")
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            // Ctrl-C is for us; we tell it.
            .process_group(0);
        if many_users() {
            let owner = Owner::current()?;
            let (uid, gid) = match owner.uid.is_root() {
                true => (NOBODY, NOBODY),
                false => (owner.uid.as_raw(), owner.gid.as_raw()),
            };
            command.uid(uid).gid(gid);
        }
        let process = command
            .spawn()
            .while_doing("start the half that talks to the gateway")?;
        Ok(Half {
            wire: Wire::new(ours).while_doing("talk to the other half")?,
            process,
            has_device: false,
        })
    }
}

impl Parent {
    async fn live(&mut self, mut questions: mpsc::Receiver<Asked>) -> Outcome<End> {
        if self.args.kill_switch && !self.args.split {
            self.capture().await?;
        }
        self.begin().await?;
        let mut events = self.events()?;
        let mut signals = Signals::new()?;
        loop {
            tokio::select! {
                report = self.half.wire.receive::<Report>() => {
                    let report = report.while_doing("hear the other half")?;
                    match report {
                        Some((report, _)) => self.heard(report).await?,
                        None => self.again().await?,
                    }
                }
                asked = questions.recv() => match asked {
                    Some((Question::Status, answer)) => {
                        let _gone = answer.send(self.status());
                    }
                    Some((Question::Down, answer)) => return Ok(End::Asked(Some(answer))),
                    None => return Err(Failure::internal("nobody can reach this process any more")),
                },
                () = signals.any() => return Ok(End::Asked(None)),
                Some(()) = events.recv() => self.look().await?,
            }
        }
    }

    async fn begin(&mut self) -> Outcome {
        let order = Order::Begin {
            address: self.profile.address.clone(),
            trust: self.profile.trust.clone(),
            instance: self.profile.instance.clone(),
            offload: !self.args.no_offload,
            mtu: self.args.mtu,
        };
        self.tell(&order, None).await
    }

    async fn tell(&self, order: &Order, fd: Option<&OwnedFd>) -> Outcome {
        let fd = fd.map(|fd| fd.as_raw_fd());
        self.half
            .wire
            .send(order, fd)
            .await
            .while_doing("tell the other half")
    }

    async fn heard(&mut self, report: Report) -> Outcome {
        match report {
            Report::Dial => self.dial().await,
            Report::Welcomed { welcome } => self.welcomed(&welcome).await,
            Report::Lost { why, retry_ms } => {
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
            Report::Failed { why, refused } => {
                let kind = if refused {
                    Kind::Refused
                } else {
                    Kind::Protocol
                };
                Err(Failure::new(kind, why))
            }
            Report::Counted {
                outbound,
                inbound,
                rtt_ms,
            } => {
                self.counted = (outbound, inbound, rtt_ms);
                self.restarts = 0;
                Ok(())
            }
            Report::Left => Ok(()),
        }
    }

    /// The other half died. It held nothing that cannot be had again.
    async fn again(&mut self) -> Outcome {
        let status = self
            .half
            .process
            .wait()
            .while_doing("see how the other half ended")?;
        self.restarts += 1;
        if self.restarts > RESTARTS {
            return Err(Failure::internal(format!(
                "the half that talks to the gateway keeps ending: {status}"
            )));
        }
        eprintln!("the half that talks to the gateway ended ({status}): starting it again");
        self.half = Half::start()?;
        self.state = "reconnecting";
        self.begin().await
    }

    async fn dial(&mut self) -> Outcome {
        let token = match self.profile.token() {
            Ok(token) => token,
            Err(failure) => {
                let why = failure.to_string();
                return self
                    .tell(&Order::NotDialled { why, last: true }, None)
                    .await;
            }
        };
        let address = self.addresses[self.turn % self.addresses.len()];
        match dial(address) {
            Ok(fd) => self.tell(&Order::Dialled { token }, Some(&fd)).await,
            Err(error) => {
                let why = format!("cannot connect to {address}: {}", error.desc());
                self.tell(&Order::NotDialled { why, last: false }, None)
                    .await
            }
        }
    }

    async fn welcomed(&mut self, welcome: &Welcome) -> Outcome {
        plan::judge(&self.args, &mut self.plan, welcome, &self.local)?;
        let terms = Terms::of(welcome);
        if self
            .device
            .as_ref()
            .is_none_or(|(_, before)| *before != terms)
        {
            self.build(terms, welcome).await?;
        }
        let order = match self.half.has_device {
            true => Order::Resume,
            false => Order::Device,
        };
        let device = self.device.as_ref().map(|(fd, _)| fd);
        self.tell(&order, device.filter(|_| !self.half.has_device))
            .await?;
        self.half.has_device = true;
        self.state = "connected";
        self.trouble = None;
        self.connected += 1;
        self.say(welcome);
        self.refresh().await;
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
            self.net.remove(&self.plan.interface).await?;
            self.half.has_device = false;
        }
        let fd = device::make(&self.plan.interface, terms.offload)?;
        self.net
            .attach(&self.plan, terms.mtu, terms.v4, terms.v6)
            .await?;
        self.device = Some((fd, terms));
        self.capture().await?;
        let resolvers = plan::resolvers(&self.args, welcome);
        dns::point(&mut self.journal, &resolvers)
    }

    async fn capture(&mut self) -> Outcome {
        self.loosen().await?;
        if !self.captured {
            self.captured = true;
            self.net.capture(&self.plan).await?;
        }
        Ok(())
    }

    /// A strict reverse path check looks answers up as if they had no mark, and
    /// would drop the gateway's. The loose one still drops what has no route.
    async fn loosen(&mut self) -> Outcome {
        for name in self.net.strict(&self.plan.interface).await? {
            let path = PathBuf::from(format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"));
            self.journal.set(path, "2")?;
        }
        Ok(())
    }

    /// The gateway's addresses may change while we are connected.
    async fn refresh(&mut self) {
        if let Ok(Ok(found)) = timeout(Duration::from_secs(5), reach::resolve(&self.to)).await {
            self.addresses = found;
            self.turn = 0;
        }
    }

    /// Tells of changes to the network that are not ours.
    fn events(&self) -> Outcome<mpsc::Receiver<()>> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        let opened = rtnetlink::new_multicast_connection(&groups);
        let (connection, _, mut messages) = opened.while_doing("watch the network")?;
        tokio::spawn(connection);
        let (tell, events) = mpsc::channel(1);
        tokio::spawn(async move {
            while messages.next().await.is_some() {
                sleep(SETTLE).await;
                while let Ok(Some(_)) = timeout(Duration::ZERO, messages.next()).await {}
                // One that waits already is enough.
                let _full = tell.try_send(());
            }
        });
        Ok(events)
    }

    async fn look(&mut self) -> Outcome {
        let seen = self.net.snapshot(&self.plan.interface).await?;
        if seen == self.seen {
            return Ok(());
        }
        self.seen = seen;
        self.local = self.net.local(&self.plan.interface).await?;
        if self.captured {
            self.loosen().await?;
        }
        self.tell(&Order::Changed, None).await
    }

    fn status(&self) -> Value {
        let (outbound, inbound, rtt) = &self.counted;
        let terms = self.device.as_ref().map(|(_, terms)| terms);
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

    /// Says goodbye and puts everything back.
    async fn end(mut self) -> Outcome {
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
        let _dead = self.half.process.kill();
        let _status = self.half.process.wait();
        drop(self.device);
        self.journal.undo().await
    }
}

/// The signals that mean the end.
struct Signals([Signal; 3]);

impl Signals {
    fn new() -> Outcome<Signals> {
        let of = |kind| signal(kind).while_doing("watch for signals");
        Ok(Signals([
            of(SignalKind::interrupt())?,
            of(SignalKind::terminate())?,
            of(SignalKind::hangup())?,
        ]))
    }

    async fn any(&mut self) {
        let [a, b, c] = &mut self.0;
        tokio::select! {
            _ = a.recv() => {}
            _ = b.recv() => {}
            _ = c.recv() => {}
        }
    }
}
