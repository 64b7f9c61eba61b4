//! A gateway that has been taken over: it runs as the gateway's user, inside
//! the gateway's cage, and tries one thing at a time.
//!
//!     evil-gw SOCKET HELPER_UID UID ATTACK [NUMBER]
//!
//! Prints one line of JSON that says what happened; judging is the tests' work.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;

use rvpn_ipc::frame::{REPLY_LEN, REQUEST_LEN};
use rvpn_ipc::{Client, Key, Kind, Op, Reply, Request, seqpacket};
use rvpn_lab::raw;
use serde_json::{Map, Value, json};

/// `TUNSET*` and their kin, by name and number.
const TUN_IOCTLS: [(&str, u32); 16] = [
    ("TUNSETNOCSUM", 0x4004_54c8),
    ("TUNSETDEBUG", 0x4004_54c9),
    ("TUNSETIFF", 0x4004_54ca),
    ("TUNSETPERSIST", 0x4004_54cb),
    ("TUNSETOWNER", 0x4004_54cc),
    ("TUNSETLINK", 0x4004_54cd),
    ("TUNSETGROUP", 0x4004_54ce),
    ("TUNSETOFFLOAD", 0x4004_54d0),
    ("TUNSETTXFILTER", 0x4004_54d1),
    ("TUNSETSNDBUF", 0x4004_54d4),
    ("TUNATTACHFILTER", 0x4010_54d5),
    ("TUNSETVNETHDRSZ", 0x4004_54d8),
    ("TUNSETQUEUE", 0x4004_54d9),
    ("TUNSETIFINDEX", 0x4004_54da),
    ("TUNSETVNETLE", 0x4004_54dc),
    ("TUNSETCARRIER", 0x4004_54e2),
];

/// Calls a gateway never needs, with arguments that do no harm where they are let through.
const CALLS: [(&str, i64, [u64; 5]); 24] = [
    ("execve", libc::SYS_execve, [0; 5]),
    ("execveat", libc::SYS_execveat, [0; 5]),
    ("fork", libc::SYS_fork, [0; 5]),
    ("ptrace", libc::SYS_ptrace, [16, 1, 0, 0, 0]),
    ("bpf", libc::SYS_bpf, [99, 0, 0, 0, 0]),
    ("mount", libc::SYS_mount, [0; 5]),
    ("umount2", libc::SYS_umount2, [0; 5]),
    ("unshare", libc::SYS_unshare, [0x1000_0000, 0, 0, 0, 0]),
    ("setns", libc::SYS_setns, [u64::MAX, 0, 0, 0, 0]),
    ("keyctl", libc::SYS_keyctl, [0, 0, 0, 0, 0]),
    ("add_key", libc::SYS_add_key, [0; 5]),
    ("io_uring_setup", libc::SYS_io_uring_setup, [1, 0, 0, 0, 0]),
    ("userfaultfd", libc::SYS_userfaultfd, [0; 5]),
    (
        "process_vm_readv",
        libc::SYS_process_vm_readv,
        [1, 0, 0, 0, 0],
    ),
    ("pidfd_open", libc::SYS_pidfd_open, [1, 0, 0, 0, 0]),
    ("pidfd_getfd", libc::SYS_pidfd_getfd, [0; 5]),
    ("perf_event_open", libc::SYS_perf_event_open, [0; 5]),
    ("kexec_load", libc::SYS_kexec_load, [0; 5]),
    ("init_module", libc::SYS_init_module, [0; 5]),
    ("setuid", libc::SYS_setuid, [0; 5]),
    (
        "personality",
        libc::SYS_personality,
        [0x0040_0000, 0, 0, 0, 0],
    ),
    ("AF_PACKET", libc::SYS_socket, [17, 3, 0, 0, 0]),
    ("AF_NETLINK", libc::SYS_socket, [16, 3, 0, 0, 0]),
    ("SOCK_RAW", libc::SYS_socket, [2, 3, 1, 0, 0]),
];

fn outcome<T>(r: std::io::Result<T>) -> Value {
    match r {
        Ok(_) => json!("done"),
        Err(e) => json!(e.raw_os_error().unwrap_or(-1)),
    }
}

struct Evil {
    socket: String,
    helper: u32,
}

impl Evil {
    fn client(&self) -> Result<Client, String> {
        Client::connect(Path::new(&self.socket), self.helper, false)
            .map(|c| c.0)
            .map_err(|e| e.to_string())
    }

    /// A connection that has said nothing yet.
    fn bare(&self) -> Result<OwnedFd, String> {
        let s = seqpacket::connect(Path::new(&self.socket)).map_err(|e| e.to_string())?;
        seqpacket::set_timeout(s.as_fd(), rvpn_lab::PATIENCE).map_err(|e| e.to_string())?;
        Ok(s)
    }

    /// Everything a caged process is not to do.
    fn cage(&self, helper_pid: i32) -> Value {
        let mut all = Map::new();
        for (name, number, args) in CALLS {
            all.insert(name.to_owned(), outcome(raw::syscall(number, args)));
        }
        let pid = u64::from(helper_pid.cast_unsigned());
        all.insert(
            "kill".to_owned(),
            outcome(raw::syscall(libc::SYS_kill, [pid, 0, 0, 0, 0])),
        );
        all.insert(
            "attach".to_owned(),
            outcome(raw::syscall(libc::SYS_ptrace, [16, pid, 0, 0, 0])),
        );
        let files = [
            "/dev/net/tun",
            "/etc/shadow",
            "/proc/sys/net/ipv4/ip_forward",
            "/proc/1/mem",
            "/sys/class/net",
        ];
        for f in files
            .map(str::to_owned)
            .into_iter()
            .chain([format!("/proc/{helper_pid}/mem")])
        {
            all.insert(f.clone(), outcome(OpenOptions::new().read(true).open(&f)));
        }
        let threads = std::thread::spawn(rvpn_sandbox::prove).join();
        let proven = threads.is_ok_and(|r| r.is_ok()) && rvpn_sandbox::prove().is_ok();
        json!({ "tried": all, "proven": proven })
    }

    fn tun_ioctls(&self) -> Result<Value, String> {
        let mut client = self.client()?;
        let lease = client
            .acquire(Key([9; 16]), Kind::Packets, 0)
            .map_err(|e| e.to_string())?;
        let tun = lease.tun.ok_or("no TUN")?;
        let mut all = Map::new();
        for (name, request) in TUN_IOCTLS {
            all.insert(
                name.to_owned(),
                outcome(raw::ioctl_buffer(tun.as_fd(), request, &mut [0; 64])),
            );
        }
        let mut name = [0; 64];
        let looked = raw::ioctl_buffer(tun.as_fd(), 0x8004_54d2, &mut name);
        let mut file = File::from(tun);
        let wrote = outcome(file.write(&[0; 11]));
        Ok(
            json!({ "tried": all, "TUNGETIFF": outcome(looked), "wrote": wrote, "read": outcome(file.read(&mut [0; 2000])) }),
        )
    }

    /// Messages of every wrong shape, each on a connection of its own; then whether the helper still answers.
    fn shapes(&self, times: u64) -> Result<Value, String> {
        let hello = Request::new(Op::Hello, 1).encode();
        let mut answers = Map::new();
        let shapes: [(&str, Vec<u8>); 7] = [
            ("empty", Vec::new()),
            ("one byte", vec![0x52]),
            ("short", hello[..REQUEST_LEN - 1].to_vec()),
            ("long", [&hello[..], &[0]].concat()),
            ("64 KiB", vec![0x52; 65_536]),
            ("zeros", vec![0; REQUEST_LEN]),
            (
                "describe before hello",
                Request::new(Op::Describe, 1).encode().to_vec(),
            ),
        ];
        for (name, bytes) in shapes {
            for _ in 0..times {
                let s = self.bare()?;
                seqpacket::send(s.as_fd(), &bytes, None).map_err(|e| format!("{name}: {e}"))?;
                let mut buf = [0; REPLY_LEN];
                let mut got = seqpacket::recv(s.as_fd(), &mut buf, true);
                let answered = matches!(&got, Ok(r) if r.len == REPLY_LEN);
                if answered {
                    got = seqpacket::recv(s.as_fd(), &mut buf, true);
                }
                let closed = matches!(&got, Ok(r) if r.len == 0)
                    || matches!(&got, Err(e) if e.raw_os_error() == Some(libc::ECONNRESET));
                answers.insert(
                    name.to_owned(),
                    json!({ "answered": answered, "closed": closed }),
                );
            }
        }
        self.client()?.describe().map_err(|e| e.to_string())?;
        Ok(Value::Object(answers))
    }

    /// A thousand requests at once, none of whose answers is read until all are sent.
    fn pipeline(&self, times: u64) -> Result<Value, String> {
        let s = self.bare()?;
        let mut sent = 0;
        for seq in 1..=u32::try_from(times).unwrap_or(1000) {
            let op = if seq == 1 { Op::Hello } else { Op::Describe };
            if seqpacket::send(s.as_fd(), &Request::new(op, seq).encode(), None).is_err() {
                break;
            }
            sent += 1;
        }
        let (mut answered, mut reset) = (0, false);
        let mut buf = [0; REPLY_LEN];
        while answered < sent {
            match seqpacket::recv(s.as_fd(), &mut buf, true) {
                Ok(r) if r.len == REPLY_LEN => answered += 1,
                // Told once, and before the answers that lie there, where our last call to send did not say it.
                Err(e) if e.raw_os_error() == Some(libc::ECONNRESET) && !reset => reset = true,
                _ => break,
            }
        }
        Ok(json!({ "sent": sent, "answered": answered }))
    }

    /// Random and mutated frames by the million, on connections that last as long as they are let.
    fn frames(&self, wanted: u64) -> Result<Value, String> {
        let mut random = Random(0x5256_504e_0000_0001);
        let (mut sent, mut answered, mut connections) = (0_u64, 0_u64, 0_u64);
        let mut late = 0_u64;
        while sent < wanted {
            let client = match self.client() {
                Ok(client) => client,
                // A busy machine may be a second late once in a while; a helper that hangs is late for ever.
                Err(_) if late < 10 => {
                    late += 1;
                    continue;
                }
                Err(e) => return Err(format!("after {sent} frames: {e}")),
            };
            connections += 1;
            let mut alive = true;
            while alive && sent < wanted {
                let burst = 1 + random.next() % 32;
                let mut due = 0;
                for _ in 0..burst {
                    let frame = random.frame();
                    due += u64::from(Request::decode(&frame).is_ok());
                    if seqpacket::send(client.socket(), &frame, None).is_err() {
                        alive = false;
                        break;
                    }
                    sent += 1;
                    // Whatever follows a frame that is none is not read any more.
                    if Request::decode(&frame).is_err() {
                        alive = false;
                        break;
                    }
                }
                let mut buf = [0; REPLY_LEN];
                while due > 0 {
                    match seqpacket::recv(client.socket(), &mut buf, true) {
                        Ok(r) if r.len == REPLY_LEN => match Reply::decode(&buf) {
                            Ok(reply) => {
                                due -= u64::from(reply.op.is_some());
                                answered += u64::from(reply.op.is_some());
                            }
                            Err(e) => return Err(format!("an answer that is none: {e}")),
                        },
                        _ => {
                            alive = false;
                            break;
                        }
                    }
                }
            }
        }
        Ok(json!({ "sent": sent, "answered": answered, "connections": connections, "late": late }))
    }

    /// Takes every slot there is and dies without a word.
    fn hoard(&self) -> Result<Value, String> {
        let mut client = self.client()?;
        let mut held = Vec::new();
        for n in 1..=u8::MAX {
            match client.acquire(Key([n; 16]), Kind::Both, 0) {
                Ok(lease) => held.push(lease),
                Err(_) => break,
            }
        }
        Ok(json!({ "held": held.len() }))
    }
}

/// A small generator: reproducible, and good enough to hit every branch.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn small(&mut self, n: u64) -> u32 {
        u32::try_from(self.next() % n).unwrap_or(0)
    }

    /// Mostly requests the helper must think about, some with wrong bytes, few of wrong length.
    fn frame(&mut self) -> Vec<u8> {
        let seq = self.small(u64::from(u32::MAX) - 1) + 1;
        let (slot, generation) = (self.small(8), self.small(6) + 1);
        let key = Key([u8::try_from(self.small(7) + 1).unwrap_or(1); 16]);
        let request = match self.next() % 400 {
            0 => Request::new(Op::Hello, seq),
            1..=195 => Request::new(Op::Describe, seq),
            196..=199 => Request {
                key,
                kind: Some([Kind::Packets, Kind::Streams, Kind::Both][self.small(3) as usize]),
                class: u8::try_from(self.small(20)).unwrap_or(0),
                ..Request::new(Op::Acquire, seq)
            },
            200..=239 => Request {
                slot,
                generation,
                key,
                ..Request::new(Op::Confirm, seq)
            },
            240..=279 => Request {
                slot,
                generation,
                ..Request::new(Op::Linger, seq)
            },
            280..=319 => Request {
                slot: self.small(u64::from(u32::MAX)),
                generation,
                ..Request::new(Op::Release, seq)
            },
            _ => Request {
                slot,
                generation,
                ..Request::new(Op::Release, seq)
            },
        };
        let mut frame = request.encode().to_vec();
        match self.next() % 256 {
            0 => {
                let n = self.small(4) as usize + 1;
                for _ in 0..n {
                    let at = self.small(REQUEST_LEN as u64) as usize;
                    frame[at] = self.next().to_le_bytes()[0];
                }
            }
            1 => frame.truncate(self.small(REQUEST_LEN as u64) as usize + 1),
            2 => frame.extend(vec![0; self.small(100) as usize + 1]),
            _ => {}
        }
        frame
    }
}

fn run() -> Result<Value, String> {
    let args: Vec<String> = std::env::args().collect();
    let [_, socket, helper, uid, attack, rest @ ..] = args.as_slice() else {
        return Err("usage: evil-gw SOCKET HELPER_UID UID ATTACK [NUMBER]".to_owned());
    };
    let number: u64 = rest.first().and_then(|n| n.parse().ok()).unwrap_or(1);
    let (helper, uid): (u32, u32) = match (helper.parse(), uid.parse()) {
        (Ok(h), Ok(u)) => (h, u),
        _ => return Err("uids are numbers".to_owned()),
    };
    let evil = Evil {
        socket: socket.clone(),
        helper,
    };
    let policy = rvpn_sandbox::Policy {
        sockets: Path::new(socket)
            .parent()
            .map(Path::to_owned)
            .into_iter()
            .collect(),
        user: Some((uid, uid)),
        ..rvpn_sandbox::Policy::default()
    };
    rvpn_sandbox::enter(&policy).map_err(|e| e.to_string())?;
    match attack.as_str() {
        "cage" => Ok(evil.cage(i32::try_from(number).unwrap_or(0))),
        "tun-ioctls" => evil.tun_ioctls(),
        "shapes" => evil.shapes(number),
        "pipeline" => evil.pipeline(number),
        "frames" => evil.frames(number),
        "hoard" => evil.hoard(),
        other => Err(format!("no attack '{other}'")),
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(value) => {
            println!("{value}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("evil-gw: {e}");
            ExitCode::FAILURE
        }
    }
}
