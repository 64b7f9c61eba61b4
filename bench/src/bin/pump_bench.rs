//! How much one session carries: a client that makes super-packets, TLS and
//! WebSocket over loopback, the real session, the real helper's device, rules
//! and translation, and a far end that counts.
//!
//! Datagrams are used, 44 at a time, because their rate is the sender's and not
//! a congestion control's. Both ends drop what is too much, so the figure is
//! what arrived. CPU is that of the data core alone, kernel work in its own
//! calls included. Each direction is measured for a client that takes and gives
//! super-packets and for one that knows datagrams only, one in a message.
//!
//! Needs root and the binaries built: `cargo build --release --bins`, then
//! `target/release/pump_bench [seconds]`.
#![expect(
    clippy::unwrap_used,
    reason = "a benchmark that cannot go on says where by panicking"
)]

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rvpn_gateway::admit::{Admission, Counted, Io, Kind, Prefixed, Sessions as _, TokenId};
use rvpn_gateway::cores::Cores;
use rvpn_gateway::helper::{Helper, HelperConfig};
use rvpn_gateway::meter::Meter;
use rvpn_gateway::session::{Sessions, Settings, Shared};
use rvpn_gateway::ticket::TicketKey;
use rvpn_lab::helper::{as_user, give};
use rvpn_lab::{Lab, packet};
use rvpn_proto::control::{Hello, Message as Control, OFFLOAD, Stage};
use rvpn_proto::record::{Offload, Reader, append, gso_type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{WebSocketStream, accept_async, client_async};

const SEGMENT: usize = 1400;
const SEGMENTS: usize = 44;
const INNER: &str = "10.64.0.2";
const SINK: &str = "1.1.1.1:5353";

type Client = WebSocketStream<tokio_rustls::client::TlsStream<TcpStream>>;

fn main() {
    let seconds = std::env::args()
        .nth(1)
        .map_or(3, |s| s.parse().expect("seconds"));
    let lab = Lab::new();
    let helper = rvpn_lab::Helper::serving(&lab, "");
    let sink = lab.up.udp(SINK);
    let state = lab.dir.join("gateway");
    std::fs::create_dir_all(&state).unwrap();
    give(&state, helper.gateway_uid);
    lab.gw.run(|| {
        as_user(helper.gateway_uid, || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(measure(&helper, &state, sink, seconds));
        });
    });
}

async fn measure(
    helper: &rvpn_lab::Helper,
    state: &std::path::Path,
    sink: UdpSocket,
    seconds: u64,
) {
    let link = Helper::start(HelperConfig {
        socket: helper.socket.clone(),
        uid: helper.uid,
        successor: false,
    });
    link.ready().await.unwrap();
    let settings = Settings {
        ticket_life: Duration::from_secs(60),
        dns: Vec::new(),
        routes: Vec::new(),
    };
    let shared = Shared::new(
        Cores::start(1, false).unwrap(),
        link,
        Arc::new(Meter::create(state, 16).unwrap()),
        TicketKey::load_or_create(&state.join("ticket.key")).unwrap(),
        settings,
    );
    let (revoke, _) = watch::channel(false);
    println!("client   direction  Gbit/s  datagrams/s  data core CPU s/GB");
    let sink = Arc::new(sink);
    let limit = Duration::from_secs(seconds);
    let clients = [
        ("offload", vec![OFFLOAD.to_owned()], vec![super_datagram()]),
        ("plain", Vec::new(), datagrams()),
    ];
    for (name, capabilities, messages) in clients {
        let mut client = connect(&Sessions(Arc::clone(&shared)), &revoke).await;
        let hello = Control::Hello(Hello {
            versions: vec![1],
            name: "pump_bench".to_owned(),
            instance: name.to_owned(),
            capabilities,
            ..Hello::default()
        });
        let text = hello.to_text(Stage::BeforeLogin).unwrap();
        client.send(Message::text(text)).await.unwrap();
        client.next().await.unwrap().unwrap();
        let up = upload(&mut client, &messages, &sink, limit).await;
        print(name, "up", &up);
        let from = up.from.unwrap();
        let down = download(&mut client, &sink, from, limit).await;
        print(name, "down", &down);
    }
}

struct Result {
    bytes: u64,
    elapsed: Duration,
    cpu: f64,
    from: Option<std::net::SocketAddr>,
}

fn print(client: &str, direction: &str, r: &Result) {
    let seconds = r.elapsed.as_secs_f64();
    println!(
        "{client:7}  {direction:9}  {:6.2}  {:11.0}  {:18.3}",
        r.bytes as f64 * 8e-9 / seconds,
        r.bytes as f64 / SEGMENT as f64 / seconds,
        r.cpu / (r.bytes as f64 * 1e-9),
    );
}

/// Client to the far end.
async fn upload(
    client: &mut Client,
    messages: &[Vec<u8>],
    sink: &Arc<UdpSocket>,
    limit: Duration,
) -> Result {
    // What the client before had under way is not this one's.
    sink.set_nonblocking(true).unwrap();
    while sink.recv_from(&mut [0; 1]).is_ok() {}
    sink.set_nonblocking(false).unwrap();
    let counted = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let (seen, first) = mpsc::channel();
    let thread = std::thread::spawn({
        let (counted, stop, sink) = (Arc::clone(&counted), Arc::clone(&stop), Arc::clone(sink));
        move || {
            sink.set_read_timeout(Some(Duration::from_millis(50)))
                .unwrap();
            let mut buf = vec![0; 1 << 16];
            segmented::receive_whole(&sink).unwrap();
            while !stop.load(Relaxed) {
                if let Ok((n, from)) = sink.recv_from(&mut buf) {
                    counted.fetch_add(n as u64, Relaxed);
                    // Only the first is waited for.
                    let _ = seen.send(from);
                }
            }
        }
    });
    let messages: Vec<Bytes> = messages.iter().cloned().map(Bytes::from).collect();
    let (start, cpu) = (Instant::now(), data_cpu());
    while start.elapsed() < limit {
        for message in &messages {
            client.feed(Message::Binary(message.clone())).await.unwrap();
        }
    }
    client.flush().await.unwrap();
    let elapsed = start.elapsed();
    let cpu = data_cpu() - cpu;
    stop.store(true, Relaxed);
    thread.join().unwrap();
    Result {
        bytes: counted.load(Relaxed),
        elapsed,
        cpu,
        from: first.recv().ok(),
    }
}

/// The far end to the client.
async fn download(
    client: &mut Client,
    sink: &Arc<UdpSocket>,
    to: std::net::SocketAddr,
    limit: Duration,
) -> Result {
    let stop = Arc::new(AtomicBool::new(false));
    let thread = std::thread::spawn({
        let (stop, sink) = (Arc::clone(&stop), Arc::clone(sink));
        move || {
            let payload = vec![7; SEGMENT * SEGMENTS];
            while !stop.load(Relaxed) {
                // Refused or too much at the moment: the next one counts.
                drop(segmented::send(&sink, &payload, to, SEGMENT as u16));
            }
        }
    });
    let (start, cpu) = (Instant::now(), data_cpu());
    let mut bytes = 0;
    while start.elapsed() < limit {
        let Some(Ok(Message::Binary(data))) = client.next().await else {
            continue;
        };
        for record in Reader::new(&data) {
            let record = record.unwrap();
            bytes += record.packet.len().saturating_sub(28) as u64;
        }
    }
    let elapsed = start.elapsed();
    let cpu = data_cpu() - cpu;
    stop.store(true, Relaxed);
    thread.join().unwrap();
    Result {
        bytes,
        elapsed,
        cpu,
        from: None,
    }
}

fn super_datagram() -> Vec<u8> {
    let payload = vec![5; SEGMENT * SEGMENTS];
    let mut datagram = packet::udp(INNER, 4000, "1.1.1.1", 5353, &payload);
    let mut pseudo = datagram[12..20].to_vec();
    pseudo.extend([0, 17]);
    pseudo.extend(((datagram.len() - 20) as u16).to_be_bytes());
    let sum = !packet::checksum(&pseudo);
    datagram[26..28].copy_from_slice(&sum.to_be_bytes());
    let offload = Offload {
        partial: true,
        gso_type: gso_type::UDP_L4,
        gso_size: SEGMENT as u16,
    };
    let mut message = Vec::new();
    append(&mut message, &datagram, offload).unwrap();
    message
}

/// The same payload as a client without offload sends it.
fn datagrams() -> Vec<Vec<u8>> {
    let message = |n: usize| {
        let mut datagram = packet::udp(INNER, 4000, "1.1.1.1", 5353, &[5; SEGMENT]);
        datagram[4..6].copy_from_slice(&(n as u16).to_be_bytes());
        packet::fix_header(&mut datagram);
        let mut message = Vec::new();
        append(&mut message, &datagram, Offload::NONE).unwrap();
        message
    };
    (0..SEGMENTS).map(message).collect()
}

/// A TLS and WebSocket connection to a session.
async fn connect(sessions: &Sessions, revoke: &watch::Sender<bool>) -> Client {
    let made = rcgen::generate_simple_self_signed(["gateway".to_owned()]).unwrap();
    let certificate = CertificateDer::from(made.cert.der().to_vec());
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let server = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key)
        .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate).unwrap();
    let client = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let accept = async {
        let (tcp, peer) = listener.accept().await.unwrap();
        let raw = Prefixed::new(Bytes::new(), Counted::new(tcp));
        let tls = TlsAcceptor::from(Arc::new(server)).accept(raw).await;
        let io = Io::tls(tls.unwrap());
        let io = accept_async(io).await.unwrap().into_inner();
        let admission = Admission {
            account: "bench".into(),
            subject: "bench".into(),
            token_id: TokenId([1; 16]),
            expires_at: None,
            kind: Kind::Native,
            anonymous: false,
            class: 0,
            rights: Default::default(),
            peer,
            listener: 0,
            revoked: revoke.subscribe(),
        };
        sessions.admit(admission, io, Bytes::new());
    };
    let join = async {
        let tcp = TcpStream::connect(address).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        let name = ServerName::try_from("gateway").unwrap();
        let connector = TlsConnector::from(Arc::new(client));
        let tls = connector.connect(name, tcp).await.unwrap();
        client_async("wss://gateway/", tls).await.unwrap().0
    };
    tokio::join!(accept, join).1
}

/// Seconds of CPU that the data cores have used.
fn data_cpu() -> f64 {
    let mut ticks = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let dir = task.unwrap().path();
        let Ok(stat) = std::fs::read_to_string(dir.join("stat")) else {
            continue;
        };
        if !stat.contains("(rvpn-data-") {
            continue;
        }
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .collect();
        ticks += fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    }
    ticks as f64 / 100.0
}

mod segmented {
    #![expect(unsafe_code, reason = "UDP_SEGMENT needs a control message")]

    use std::io;
    use std::mem::{size_of, zeroed};
    use std::net::{SocketAddr, UdpSocket};
    use std::os::fd::AsRawFd;

    /// Lets super-packets arrive as they are, or the receiver is the limit.
    pub(crate) fn receive_whole(socket: &UdpSocket) -> io::Result<()> {
        let on: libc::c_int = 1;
        // SAFETY: on is a live int and its size is passed along.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_UDP,
                libc::UDP_GRO,
                (&raw const on).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if set < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Sends many datagrams as one.
    pub(crate) fn send(
        socket: &UdpSocket,
        payload: &[u8],
        to: SocketAddr,
        segment: u16,
    ) -> io::Result<()> {
        let SocketAddr::V4(to) = to else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        // SAFETY: sockaddr_in and msghdr are plain data for which all zero is valid.
        let (mut name, mut msg): (libc::sockaddr_in, libc::msghdr) = unsafe { zeroed() };
        name.sin_family = libc::AF_INET as libc::sa_family_t;
        name.sin_port = to.port().to_be();
        name.sin_addr.s_addr = u32::from_ne_bytes(to.ip().octets());
        let mut iov = libc::iovec {
            iov_base: payload.as_ptr().cast_mut().cast(),
            iov_len: payload.len(),
        };
        let mut control = [0_u64; 3];
        msg.msg_name = (&raw mut name).cast();
        msg.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
        msg.msg_iov = &raw mut iov;
        msg.msg_iovlen = 1;
        msg.msg_control = control.as_mut_ptr().cast();
        msg.msg_controllen = size_of::<[u64; 3]>();
        // SAFETY: the control buffer is aligned and has room for a header and two bytes.
        let sent = unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const msg);
            (*header).cmsg_level = libc::SOL_UDP;
            (*header).cmsg_type = libc::UDP_SEGMENT;
            (*header).cmsg_len = libc::CMSG_LEN(2) as usize;
            libc::CMSG_DATA(header)
                .cast::<u16>()
                .write_unaligned(segment);
            msg.msg_controllen = libc::CMSG_SPACE(2) as usize;
            libc::sendmsg(socket.as_raw_fd(), &raw const msg, 0)
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}
