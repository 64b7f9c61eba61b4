//! A road with holes: a relay for TCP and UDP between two machines that delays,
//! loses, reorders, corrupts, stalls and cuts. This kernel has no netem, and a
//! relay can be told what to do in the middle of a scenario.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use rvpn_proto::packet::grammar::Rng;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use crate::ns::Ns;

/// Chunks of a connection on the way in one direction; together more than any
/// window over the delays of the scenarios.
const ON_THE_WAY: usize = 4096;
/// How much later a datagram comes that others overtake.
const OVERTAKEN: Duration = Duration::from_millis(20);

/// What the road does. Probabilities are in thousandths.
#[derive(Debug, Default)]
struct Knobs {
    delay_us: AtomicU64,
    loss: AtomicU32,
    reorder: AtomicU32,
    corrupt: AtomicU32,
    stalled: AtomicBool,
}

impl Knobs {
    fn delay(&self) -> Duration {
        Duration::from_micros(self.delay_us.load(Ordering::Relaxed))
    }
}

/// How the connections so far end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Fate {
    #[default]
    Carried,
    /// Reset, on both sides.
    Cut,
    /// Open on both sides, and nothing arrives any more.
    Stranded,
}

/// What happened on the road.
#[derive(Debug, Default)]
pub struct Counts {
    pub lost: AtomicU64,
    pub reordered: AtomicU64,
    pub corrupted: AtomicU64,
}

/// A relay that runs as long as it lives.
pub struct Relay {
    /// Where it listens, for TCP and UDP alike.
    pub at: SocketAddr,
    knobs: Arc<Knobs>,
    pub counts: Arc<Counts>,
    fate: Arc<Mutex<watch::Sender<Fate>>>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

/// What every connection's task shares.
#[derive(Clone)]
struct Road {
    to: SocketAddr,
    exit: Arc<File>,
    knobs: Arc<Knobs>,
    counts: Arc<Counts>,
    rng: Arc<Mutex<Rng>>,
}

impl Relay {
    /// From an address of one machine to any that the other reaches. The same
    /// seed loses, reorders and corrupts the same.
    pub fn new(entry: &Ns, at: SocketAddr, exit: &Ns, to: SocketAddr, seed: u64) -> Relay {
        let (tcp, udp) = (entry.tcp(&at.to_string()), entry.udp(&at.to_string()));
        let exit = exit.run(|| File::open("/proc/thread-self/ns/net").expect("namespace"));
        let road = Road {
            to,
            exit: Arc::new(exit),
            knobs: Arc::default(),
            counts: Arc::default(),
            rng: Arc::new(Mutex::new(Rng::new(seed))),
        };
        let (knobs, counts) = (Arc::clone(&road.knobs), Arc::clone(&road.counts));
        let (stop, mut stopped) = watch::channel(false);
        let fate = Arc::new(Mutex::new(watch::channel(Fate::Carried).0));
        let shared = Arc::clone(&fate);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("runtime");
            runtime.block_on(async {
                tcp.set_nonblocking(true).expect("nonblocking");
                udp.set_nonblocking(true).expect("nonblocking");
                let tcp = TcpListener::from_std(tcp).expect("listener");
                let udp = UdpSocket::from_std(udp).expect("socket");
                tokio::select! {
                    () = streams(tcp, &road, &shared) => {}
                    () = datagrams(udp, &road) => {}
                    _ = stopped.wait_for(|stop| *stop) => {}
                }
            });
        });
        Relay {
            at,
            knobs,
            counts,
            fate,
            stop,
            thread: Some(thread),
        }
    }

    /// Everything takes this much longer, each way.
    pub fn delay(&self, delay: Duration) {
        let micros = u64::try_from(delay.as_micros()).expect("a short delay");
        self.knobs.delay_us.store(micros, Ordering::Relaxed);
    }

    /// So many of a thousand datagrams are lost, or overtaken by others, and so
    /// many of a thousand datagrams or pieces of a stream have a wrong byte.
    pub fn impair(&self, loss: u32, reorder: u32, corrupt: u32) {
        self.knobs.loss.store(loss, Ordering::Relaxed);
        self.knobs.reorder.store(reorder, Ordering::Relaxed);
        self.knobs.corrupt.store(corrupt, Ordering::Relaxed);
    }

    /// Connections wait, and datagrams are lost, until this is taken back.
    pub fn stall(&self, stalled: bool) {
        self.knobs.stalled.store(stalled, Ordering::Relaxed);
    }

    /// Resets every connection so far.
    pub fn cut(&self) {
        self.end(Fate::Cut);
    }

    /// Leaves every connection so far open, and carries nothing of it any more,
    /// as when a machine changes its network.
    pub fn strand(&self) {
        self.end(Fate::Stranded);
    }

    fn end(&self, fate: Fate) {
        let mut current = self.fate.lock().expect("the relay goes on");
        // Those that come later have a fate of their own.
        let before = std::mem::replace(&mut *current, watch::channel(Fate::Carried).0);
        // The last word counts, although nobody can say another.
        before.send_replace(fate);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Road {
    fn chance(&self, thousandths: &AtomicU32) -> bool {
        let thousandths = thousandths.load(Ordering::Relaxed);
        let drawn = self.rng.lock().expect("the relay goes on").below(1000);
        drawn < thousandths as usize
    }

    fn corrupt(&self, bytes: &mut [u8]) {
        if !bytes.is_empty() && self.chance(&self.knobs.corrupt) {
            let mut rng = self.rng.lock().expect("the relay goes on");
            let at = rng.below(bytes.len());
            bytes[at] ^= 1 << rng.below(8);
            self.counts.corrupted.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Makes a socket on the other machine.
    async fn beyond<T: Send + 'static>(
        &self,
        make: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let exit = Arc::clone(&self.exit);
        let made = tokio::task::spawn_blocking(move || {
            // These threads do nothing else, so they may stay there.
            setns(&*exit, CloneFlags::CLONE_NEWNET)?;
            make()
        });
        made.await.map_err(io::Error::other)?
    }

    /// Waits while the road is closed.
    async fn passable(&self) {
        while self.knobs.stalled.load(Ordering::Relaxed) {
            sleep_until(Instant::now() + Duration::from_millis(2)).await;
        }
    }
}

async fn streams(listener: TcpListener, road: &Road, fate: &Mutex<watch::Sender<Fate>>) {
    loop {
        let Ok((near, _)) = listener.accept().await else {
            continue;
        };
        let road = road.clone();
        let fate = fate.lock().expect("the scenario goes on").subscribe();
        tokio::spawn(async move {
            let to = road.to;
            let far = road.beyond(move || std::net::TcpStream::connect(to)).await;
            let Ok(far) = far.and_then(|far| {
                far.set_nonblocking(true)?;
                TcpStream::from_std(far)
            }) else {
                return;
            };
            carry(near, far, road, fate).await;
        });
    }
}

async fn carry(near: TcpStream, far: TcpStream, road: Road, mut fate: watch::Receiver<Fate>) {
    for stream in [&near, &far] {
        // A relay that gathers would hide what the ends send when.
        let _ = stream.set_nodelay(true);
        // The end by decree is a reset.
        let _ = nix::sys::socket::setsockopt(
            stream,
            nix::sys::socket::sockopt::Linger,
            &libc::linger {
                l_onoff: 1,
                l_linger: 0,
            },
        );
    }
    let (mut near, mut far) = (near, far);
    let ended = {
        let (near_in, near_out) = near.split();
        let (far_in, far_out) = far.split();
        tokio::select! {
            _ = async { tokio::join!(one_way(near_in, far_out, &road), one_way(far_in, near_out, &road)) } => None,
            decreed = fate.wait_for(|fate| *fate != Fate::Carried) => decreed.ok().map(|fate| *fate),
        }
    };
    match ended {
        // In order, on both sides.
        None => {
            for stream in [&near, &far] {
                let gently = libc::linger {
                    l_onoff: 0,
                    l_linger: 0,
                };
                let linger = nix::sys::socket::sockopt::Linger;
                let _ = nix::sys::socket::setsockopt(stream, linger, &gently);
            }
        }
        Some(Fate::Stranded) => std::future::pending().await,
        Some(Fate::Carried | Fate::Cut) => {}
    }
}

async fn one_way(
    mut from: impl tokio::io::AsyncRead + Unpin,
    mut to: impl tokio::io::AsyncWrite + Unpin,
    road: &Road,
) {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Vec<u8>)>(ON_THE_WAY);
    let reading = async {
        let mut buf = vec![0; 16 * 1024];
        while let Ok(n @ 1..) = from.read(&mut buf).await {
            let mut bytes = buf[..n].to_vec();
            road.corrupt(&mut bytes);
            let due = Instant::now() + road.knobs.delay();
            if sender.send((due, bytes)).await.is_err() {
                break;
            }
        }
        drop(sender);
    };
    let writing = async {
        while let Some((due, bytes)) = receiver.recv().await {
            sleep_until(due).await;
            road.passable().await;
            if to.write_all(&bytes).await.is_err() {
                break;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(reading, writing);
}

async fn datagrams(near: UdpSocket, road: &Road) {
    let near = Arc::new(near);
    let mut far: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut buf = vec![0; 65_536];
    loop {
        let Ok((n, peer)) = near.recv_from(&mut buf).await else {
            continue;
        };
        let bytes = buf[..n].to_vec();
        let socket = match far.get(&peer) {
            Some(socket) => Arc::clone(socket),
            None => {
                let Ok(socket) = beyond(road).await else {
                    continue;
                };
                let socket = Arc::new(socket);
                far.insert(peer, Arc::clone(&socket));
                let answers = answers(Arc::clone(&socket), Arc::clone(&near), peer, road.clone());
                tokio::spawn(answers);
                socket
            }
        };
        forward(bytes, road, async move |bytes| {
            // Nobody may listen there any more.
            let _ = socket.send(&bytes).await;
        });
    }
}

/// A socket on the other machine for one peer of this one.
async fn beyond(road: &Road) -> io::Result<UdpSocket> {
    let to = road.to;
    let socket = road.beyond(move || {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = std::net::UdpSocket::bind(any)?;
        socket.connect(to)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    });
    UdpSocket::from_std(socket.await?)
}

async fn answers(far: Arc<UdpSocket>, near: Arc<UdpSocket>, peer: SocketAddr, road: Road) {
    let mut buf = vec![0; 65_536];
    loop {
        let Ok(n) = far.recv(&mut buf).await else {
            continue;
        };
        let near = Arc::clone(&near);
        forward(buf[..n].to_vec(), &road, async move |bytes| {
            let _ = near.send_to(&bytes, peer).await;
        });
    }
}

fn forward<F>(mut bytes: Vec<u8>, road: &Road, send: impl FnOnce(Vec<u8>) -> F + Send + 'static)
where
    F: Future<Output = ()> + Send + 'static,
{
    if road.knobs.stalled.load(Ordering::Relaxed) || road.chance(&road.knobs.loss) {
        road.counts.lost.fetch_add(1, Ordering::Relaxed);
        return;
    }
    road.corrupt(&mut bytes);
    let mut due = Instant::now() + road.knobs.delay();
    if road.chance(&road.knobs.reorder) {
        due += OVERTAKEN;
        road.counts.reordered.fetch_add(1, Ordering::Relaxed);
    }
    tokio::spawn(async move {
        sleep_until(due).await;
        send(bytes).await;
    });
}
