//! What the gateway does all day works inside the cage, with a list of system
//! calls in which nothing is too much.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use crate::child::{Places, child, errno, ioctl, unshare_network};
use nix::mount::{MsFlags, mount};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mremap, munmap};
use nix::sys::signal::{Signal, raise};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use rvpn_ipc::seqpacket;
use rvpn_sandbox::{Refusal, enter, prove, system_files};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, rustls};

/// Under `Kill`, so that a call missing from the list cannot be overlooked.
#[test]
fn a_gateways_day() {
    assert_eq!(child(day).whole(), "whole");
}

#[test]
fn abort_ends_the_process_and_leaves_no_memory_behind() {
    let places = Places::new();
    let said = child(|| {
        enter(&places.policy(Refusal::Kill)).unwrap();
        std::process::abort()
    });
    assert!(matches!(
        said.status,
        WaitStatus::Signaled(_, Signal::SIGABRT, false)
    ));
}

/// Every call of the list is made by the day above, or stands here with its reason.
#[test]
fn no_call_of_the_list_is_too_much() {
    let other_libc = "of an older or another C library";
    let unseen = [
        ("open", other_libc),
        ("stat", other_libc),
        ("fstat", other_libc),
        ("lstat", other_libc),
        ("access", other_libc),
        ("readlink", other_libc),
        ("restart_syscall", "made by the kernel after a stop"),
        ("sched_yield", "spinning locks, under contention alone"),
        ("clock_gettime", "clocks that the vDSO cannot read"),
        ("mprotect", "heaps that grow, when threads contend"),
        ("readv", "scattered reads, depending on the buffers at hand"),
    ];
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace");
    let out = Command::new("strace")
        .args(["-f", "-qq", "-s", "0", "-o"])
        .arg(&trace)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "workload::a_gateways_day"])
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stdout)
    );
    let seen = calls_after_the_filter(&fs::read_to_string(&trace).unwrap());
    assert!(
        seen.contains("epoll_ctl") && seen.contains("sendmsg"),
        "{seen:?}"
    );
    let names = names();
    let listed: BTreeSet<&str> = rvpn_sandbox::allowed()
        .map(|n| names.get(&n).map_or("?", String::as_str))
        .collect();
    let surplus: Vec<_> = listed
        .iter()
        .filter(|n| !seen.contains(**n) && !unseen.iter().any(|(u, _)| u == *n))
        .collect();
    assert!(surplus.is_empty(), "never used: {surplus:?}");
    // A reason that has become untrue goes too.
    let stale: Vec<_> = unseen.iter().filter(|(u, _)| !listed.contains(u)).collect();
    assert!(stale.is_empty(), "{stale:?}");
    assert!(listed.len() <= 78, "{} calls", listed.len());
}

/// The names of calls made by the caged process, and by threads that did not
/// exist before, from the moment its last filter holds.
fn calls_after_the_filter(trace: &str) -> BTreeSet<String> {
    let lines: Vec<(&str, &str)> = trace
        .lines()
        .filter_map(|l| l.split_once(' '))
        .map(|(pid, call)| (pid, call.trim_start()))
        .collect();
    let last = lines
        .iter()
        .rposition(|(_, call)| call.starts_with("seccomp(") && call.ends_with("= 0"))
        .unwrap();
    let caged = lines[last].0;
    let outside: BTreeSet<&str> = lines[..last].iter().map(|(pid, _)| *pid).collect();
    lines[last + 1..]
        .iter()
        .filter(|(pid, _)| *pid == caged || !outside.contains(pid))
        // What another line interrupted has begun before.
        .filter_map(|(_, call)| Some(call.split_once('(')?.0.to_owned()))
        .filter(|name| !name.starts_with('<'))
        .collect()
}

/// Names of system calls by number, as the C headers have them.
fn names() -> std::collections::BTreeMap<i64, String> {
    let mut compiler = Command::new("cc")
        .args(["-E", "-dM", "-"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = compiler.stdin.take().unwrap();
    input.write_all(b"#include <sys/syscall.h>\n").unwrap();
    drop(input);
    let out = compiler.wait_with_output().unwrap();
    String::from_utf8(out.stdout)
        .unwrap()
        .lines()
        .filter_map(|l| {
            let mut words = l.strip_prefix("#define __NR_")?.split_whitespace();
            let name = words.next()?.to_owned();
            Some((words.next()?.parse().ok()?, name))
        })
        .collect()
}

fn day() -> String {
    unshare_network();
    let places = Places::new();
    let resolver = name_server(&places);
    let tun = device();
    let helper = seqpacket_pair();
    // Wider than the mask of new files, which the database then gives its other files too.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    let db = fs::File::create(places.state.join("gateway.db")).unwrap();
    db.set_permissions(mode).unwrap();
    let mut policy = places.policy(Refusal::Kill);
    policy.read.extend(system_files());
    let report = enter(&policy).unwrap();
    assert!(report.landlock_whole || crate::child::landlock_version() < 7);

    let answering = std::thread::spawn(move || answer_names(&resolver));
    carry_packets(&tun, &helper);
    count(&places.state);
    keep(&places.state);
    pin_to_a_core();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(3)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        tls_and_time(&places.config).await;
        names_are_found().await;
        packets_by_events(&tun).await;
    });
    // Each core's own.
    let alone = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    alone.block_on(tls_and_time(&places.config));
    drop((runtime, alone));
    answering.join().unwrap();
    panics_stay_in_their_thread();
    std::thread::spawn(prove).join().unwrap().unwrap();
    "whole".to_owned()
}

/// A directory for `/etc` of the child's own, and the socket of the server it names.
fn name_server(places: &Places) -> UdpSocket {
    let etc = places.other.join("etc");
    fs::create_dir(&etc).unwrap();
    fs::write(etc.join("resolv.conf"), "nameserver 127.0.0.1\n").unwrap();
    fs::write(etc.join("hosts"), "127.0.0.1 localhost\n").unwrap();
    fs::write(etc.join("nsswitch.conf"), "hosts: files dns\n").unwrap();
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some(&etc), "/etc", none, MsFlags::MS_BIND, none).unwrap();
    let socket = UdpSocket::bind("127.0.0.1:53").unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    socket
}

/// Answers two questions: the IPv4 address, and the IPv6 address.
fn answer_names(socket: &UdpSocket) {
    let mut query = [0; 512];
    for _ in 0..2 {
        let (n, from) = socket.recv_from(&mut query).unwrap();
        let end = 12 + query[12..n].iter().position(|b| *b == 0).unwrap() + 5;
        let four = query[end - 3] == 1;
        let mut answer = query[..2].to_vec();
        answer.extend([0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
        answer.extend(&query[12..end]);
        answer.extend([0xc0, 0x0c, 0, query[end - 3], 0, 1, 0, 0, 0, 60, 0]);
        if four {
            answer.extend([4, 192, 0, 2, 7]);
        } else {
            answer.extend([16, 0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]);
        }
        socket.send_to(&answer, from).unwrap();
    }
}

async fn names_are_found() {
    let mut found: Vec<IpAddr> = tokio::net::lookup_host(("web.example", 80))
        .await
        .unwrap()
        .map(|a| a.ip())
        .collect();
    found.sort();
    assert_eq!(
        found,
        [
            "192.0.2.7".parse::<IpAddr>().unwrap(),
            "2001:db8::7".parse().unwrap()
        ]
    );
}

fn device() -> fs::File {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .unwrap();
    let mut request = [0; 64];
    request[..4].copy_from_slice(b"tun9");
    // IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
    request[16..18].copy_from_slice(&0x5001_u16.to_ne_bytes());
    ioctl(file.as_fd(), 0x4004_54ca, &mut request).unwrap();
    crate::child::ip("link set tun9 addrgenmode none up");
    file
}

type Pair = (std::os::fd::OwnedFd, std::os::fd::OwnedFd);

fn seqpacket_pair() -> Pair {
    let (family, kind) = (AddressFamily::Unix, SockType::SeqPacket);
    socketpair(family, kind, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

/// An IPv4 packet of the discard kind, behind an empty virtio header.
fn packet() -> Vec<u8> {
    let mut p = vec![0; 10];
    p.extend([
        0x45, 0, 0, 20, 0, 0, 0x40, 0, 64, 253, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    p
}

fn carry_packets(tun: &fs::File, helper: &Pair) {
    let packet = packet();
    let (header, rest) = packet.split_at(10);
    let slices = [std::io::IoSlice::new(header), std::io::IoSlice::new(rest)];
    let mut tun = tun;
    assert_eq!(tun.write_vectored(&slices).unwrap(), packet.len());
    let mut buffer = [0; 2000];
    let (head, tail) = buffer.split_at_mut(10);
    let mut slices = [
        std::io::IoSliceMut::new(head),
        std::io::IoSliceMut::new(tail),
    ];
    // The kernel's own first packets, then none.
    while errno(tun.read_vectored(&mut slices)) != libc::EAGAIN {}
    let mut name = [0; 64];
    ioctl(tun.as_fd(), 0x8004_54d2, &mut name).unwrap();
    assert!(name.starts_with(b"tun9"));
    // A frame with a descriptor, as the helper sends it.
    seqpacket::send(helper.0.as_fd(), b"frame", Some(tun.as_fd())).unwrap();
    let got = seqpacket::recv(helper.1.as_fd(), &mut [0; 48], true).unwrap();
    assert!(got.len == 5 && got.fd.is_some());
    // Readiness told to a service manager.
    let (a, b) = UnixDatagram::pair().unwrap();
    a.send(b"READY=1").unwrap();
    assert_eq!(b.recv(&mut [0; 16]).unwrap(), 7);
}

async fn packets_by_events(tun: &fs::File) {
    let device = shared::watched(tun.try_clone().unwrap());
    let mut guard = device.writable().await.unwrap();
    let wrote = guard.try_io(|d| d.get_ref().write(&packet()));
    assert_eq!(wrote.unwrap().unwrap(), 30);
}

/// The counters: a locked file that is mapped and grows, removed at the end.
fn count(state: &Path) {
    let path = state.join("meter");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .unwrap();
    file.try_lock().unwrap();
    file.set_len(8192).unwrap();
    let again = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    assert!(again.try_lock().is_err());
    shared::touch(&file);
    file.sync_all().unwrap();
    fs::rename(&path, state.join("closed")).unwrap();
    assert!(fs::read_dir(state).unwrap().count() >= 2);
    assert_eq!(fs::metadata(state.join("closed")).unwrap().len(), 8192);
    fs::remove_file(state.join("closed")).unwrap();
}

mod shared {
    #![expect(unsafe_code, reason = "a shared mapping, and a descriptor to watch")]
    use super::*;
    use std::num::NonZeroUsize;

    pub(super) fn watched(file: fs::File) -> AsyncFd<fs::File> {
        // SAFETY: a file owns its descriptor, and is handed over to the watch.
        unsafe { AsyncFd::register(file) }.unwrap()
    }

    pub(super) fn touch(file: &fs::File) {
        let len = NonZeroUsize::new(4096).unwrap();
        let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping of a file of two pages that only this function touches.
        let one = unsafe { mmap(None, len, both, MapFlags::MAP_SHARED, file, 0) }.unwrap();
        let grow = nix::sys::mman::MRemapFlags::MREMAP_MAYMOVE;
        // SAFETY: the mapping just made, one page long.
        let two = unsafe { mremap(one, 4096, 8192, grow, None) }.unwrap();
        // SAFETY: inside the mapping of two pages.
        unsafe { two.cast::<u8>().add(5000).write(7) };
        // SAFETY: the mapping is not used any more.
        unsafe { munmap(two, 8192) }.unwrap();
    }
}

/// The database, as the gateway opens it.
fn keep(state: &Path) {
    let path = state.join("gateway.db");
    let open = || {
        let db = rusqlite::Connection::open(&path).unwrap();
        db.pragma_update(None, "journal_mode", "WAL").unwrap();
        db.pragma_update(None, "synchronous", "FULL").unwrap();
        db.busy_timeout(Duration::from_millis(200)).unwrap();
        db
    };
    let mut db = open();
    db.execute_batch("create table usage (account text, bytes integer)")
        .unwrap();
    let tx = db.transaction().unwrap();
    for n in 0..5000 {
        tx.execute("insert into usage values ('alice', ?1)", [n])
            .unwrap();
    }
    tx.commit().unwrap();
    // One more connection at the same time, which finds the first one's lock.
    let other = open();
    db.execute_batch("begin immediate").unwrap();
    assert!(other.execute("delete from usage", []).is_err());
    db.execute_batch("rollback").unwrap();
    drop(other);
    db.execute_batch("delete from usage where bytes > 10; pragma wal_checkpoint(truncate); vacuum")
        .unwrap();
    let sum: i64 = db
        .query_row("select sum(bytes) from usage", [], |r| r.get(0))
        .unwrap();
    assert_eq!(sum, 55);
    db.close().unwrap();
    let again: i64 = open()
        .query_row("select count(*) from usage", [], |r| r.get(0))
        .unwrap();
    assert_eq!(again, 11);
}

fn pin_to_a_core() {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this).unwrap();
    let first = (0..CpuSet::count())
        .find(|c| allowed.is_set(*c).unwrap())
        .unwrap();
    let mut one = CpuSet::new();
    one.set(first).unwrap();
    std::thread::spawn(move || sched_setaffinity(this, &one).unwrap())
        .join()
        .unwrap();
    assert!(std::thread::available_parallelism().unwrap().get() >= 1);
}

/// A TLS conversation through a real socket, timers, a signal, a Unix socket.
async fn tls_and_time(config: &Path) {
    // As after a renewal: read again from where it lies.
    let file = config.join("file");
    let read = tokio::task::spawn_blocking(move || fs::read(file));
    assert_eq!(read.await.unwrap().unwrap(), b"as it was");
    let made = rcgen::generate_simple_self_signed(["web.example".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let server = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let client = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let (tcp, peer) = listener.accept().await.unwrap();
        tcp.set_nodelay(true).unwrap();
        assert_eq!(tcp.peer_addr().unwrap(), peer);
        let mut tls = TlsAcceptor::from(Arc::new(server))
            .accept(tcp)
            .await
            .unwrap();
        let mut all = vec![0; 100_000];
        tls.read_exact(&mut all).await.unwrap();
        tls.write_all(&all).await.unwrap();
        tls.shutdown().await.unwrap();
    });
    let tcp = TcpStream::connect(address).await.unwrap();
    let name = "web.example".try_into().unwrap();
    let mut tls = TlsConnector::from(Arc::new(client))
        .connect(name, tcp)
        .await
        .unwrap();
    tls.write_all(&vec![7; 100_000]).await.unwrap();
    let mut back = Vec::new();
    tls.read_to_end(&mut back).await.unwrap();
    assert_eq!(back.len(), 100_000);
    serving.await.unwrap();

    let udp = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    udp.send_to(b"echo", udp.local_addr().unwrap())
        .await
        .unwrap();
    assert_eq!(udp.recv(&mut [0; 16]).await.unwrap(), 4);

    let (mut a, mut b) = tokio::net::UnixStream::pair().unwrap();
    a.write_all(b"x").await.unwrap();
    assert_eq!(b.read_u8().await.unwrap(), b'x');

    let mut ticks = tokio::time::interval(Duration::from_millis(1));
    for _ in 0..3 {
        ticks.tick().await;
    }
    let late = tokio::time::timeout(Duration::from_millis(1), std::future::pending::<()>());
    assert!(late.await.is_err());

    let kind = tokio::signal::unix::SignalKind::hangup();
    let mut hangups = tokio::signal::unix::signal(kind).unwrap();
    raise(Signal::SIGHUP).unwrap();
    hangups.recv().await.unwrap();
}

fn panics_stay_in_their_thread() {
    let broken = std::thread::Builder::new().name("worker".into()).spawn(|| {
        let trace = std::backtrace::Backtrace::force_capture();
        panic!("{}", trace.to_string().lines().count());
    });
    let why = broken.unwrap().join().unwrap_err();
    let lines: usize = why.downcast_ref::<String>().unwrap().parse().unwrap();
    assert!(lines > 0);
    // A pause of the kind the C library makes.
    std::thread::park_timeout(Duration::from_millis(1));
    std::thread::sleep(Duration::from_micros(1));
    assert_eq!(
        fs::File::open("/etc/shadow").unwrap_err().kind(),
        ErrorKind::NotFound
    );
}
