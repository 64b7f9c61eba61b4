//! Everything the helper says to the kernel, and every call it makes, while a
//! taken-over gateway sends it what it likes: each byte is of the model.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use rvpn_ipc::{Client, ClientError, Key, Kind, Lease};
use rvpn_lab::attack::evil;
use rvpn_lab::attack::netlink::{Message, attributes, messages, number32, text, value};
use rvpn_lab::attack::trace::{self, Call, Sent, To};
use rvpn_lab::read_back::ip_json;
use rvpn_lab::{Helper, Lab, wait_until};

const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NFTABLES: u16 = 10 << 8;
const NEW_ELEMENT: u16 = NFTABLES | 12;
const DELETE_ELEMENT: u16 = NFTABLES | 14;
const CONNTRACK_GET: u16 = (1 << 8) | 1;
const CONNTRACK_DELETE: u16 = (1 << 8) | 2;

const DUMP: u16 = libc::NLM_F_DUMP as u16;
const LOOPBACK: u32 = 1;
/// The tag of every connection mark of ours, and the bits it occupies.
const MARK: (u32, u32) = (0x5200_0000, 0xff00_0000);

/// What a helper under load said and did, and what was in the namespace before it came.
struct Observed {
    calls: Vec<Call>,
    sent: Vec<Sent>,
    /// Where in `sent` and `calls` the first connection was accepted.
    serving: (usize, usize),
    /// Interfaces that are not the pool's, by index.
    foreign: BTreeSet<u32>,
    /// Names of every link there was at any time.
    links: BTreeSet<String>,
}

fn when_free(client: &mut Client, key: u8, kind: Kind) -> Lease {
    let mut got = None;
    wait_until("a slot is free", || {
        match client.acquire(Key([key; 16]), kind, 0) {
            Ok(lease) => got = Some(lease),
            Err(ClientError::Refused(_)) => {}
            Err(e) => panic!("{e}"),
        }
        got.is_some()
    });
    got.unwrap()
}

fn observe() -> Observed {
    let lab = Lab::new();
    let foreign = ip_json(&lab.gw, "link show")
        .as_array()
        .unwrap()
        .iter()
        .map(|l| u32::try_from(l["ifindex"].as_u64().unwrap()).unwrap())
        .collect();
    let monitor = lab.dir.join("links");
    let mut watch = Command::new("ip");
    watch.args(["-o", "monitor", "link"]).stdin(Stdio::null());
    watch.stdout(File::create(&monitor).unwrap());
    let watch = lab.gw.daemon(&mut watch);

    let mut helper = Helper::prepared(&lab, "slots = 3\nmax-slots = 6\ngrow = 3\n");
    let file = lab.dir.join("trace").display().to_string();
    helper.wrapped_in(&trace::strace(&file));
    helper.start(&lab.gw);
    let said = evil(&lab, &helper, "frames", 3_000);
    assert!(said["answered"].as_u64() > Some(1_000), "{said}");
    let mut client = helper.connect();
    let kinds = [Kind::Packets, Kind::Streams, Kind::Both];
    let mut kept = Vec::new();
    for n in 0..40_u8 {
        let lease = when_free(&mut client, n % 5 + 1, kinds[usize::from(n % 3)]);
        // Every now and then a copy is kept, so that the device has to be made anew.
        if let Some(tun) = lease.tun.as_ref().filter(|_| n % 8 == 0) {
            kept.push(tun.as_fd().try_clone_to_owned().unwrap());
        }
        let (slot, generation) = (lease.reply.slot, lease.reply.generation);
        drop(lease);
        client.release(slot, generation).unwrap();
    }
    wait_until("every slot is free", || {
        client.describe().is_ok_and(|d| d.free == d.slots)
    });
    drop(client);
    // The monitor has caught up when it has seen what was made last.
    lab.gw.ip("link add last0 type veth peer name last1");
    wait_until("the monitor caught up", || {
        fs::read_to_string(&monitor).is_ok_and(|t| t.contains("last0"))
    });
    helper.kill();
    drop(watch);

    let links = fs::read_to_string(&monitor)
        .unwrap()
        .lines()
        .filter_map(|l| {
            let mut words = l.split(": ").skip(1);
            Some(words.next()?.split('@').next()?.to_owned())
        })
        .collect();
    let (calls, sent) = trace::read(&fs::read_to_string(&file).unwrap());
    let call = calls.iter().position(|c| c.name == "accept4").unwrap();
    let serving = (calls[call].sent_before, call);
    Observed {
        calls,
        sent,
        serving,
        foreign,
        links,
    }
}

impl Observed {
    /// An interface of the pool: none that was there before.
    fn ours(&self, index: u32) -> bool {
        index != 0 && !self.foreign.contains(&index)
    }

    fn route(&self, m: &Message<'_>) -> Option<bool> {
        let index = number32(m.body, 4);
        Some(match m.kind {
            libc::RTM_GETLINK => {
                let a = m.attributes(16)?;
                let name = value(&a, libc::IFLA_IFNAME).map(text);
                name.is_none_or(|n| is_pool_name(&n))
            }
            libc::RTM_NEWLINK | libc::RTM_DELLINK => {
                let a = m.attributes(16)?;
                let known = [
                    libc::IFLA_IFALIAS,
                    libc::IFLA_GROUP,
                    libc::IFLA_MTU,
                    libc::IFLA_TXQLEN,
                    libc::IFLA_AF_SPEC,
                ];
                let alias = value(&a, libc::IFLA_IFALIAS).map(text);
                a.iter().all(|(k, _)| known.contains(k))
                    && alias.is_none_or(|t| t.starts_with("rvpn1 "))
                    && self.ours(index?)
            }
            libc::RTM_NEWADDR | libc::RTM_DELADDR => {
                let a = m.attributes(8)?;
                a.len() == 2
                    && a.iter().all(|(k, v)| {
                        [libc::IFA_LOCAL, libc::IFA_ADDRESS].contains(k) && in_pool(v)
                    })
                    && self.ours(index?)
            }
            libc::RTM_GETADDR => m.flags & DUMP == DUMP && m.attributes(8)?.is_empty(),
            libc::RTM_GETROUTE => m.flags & DUMP == DUMP && m.attributes(12)?.is_empty(),
            libc::RTM_NEWROUTE | libc::RTM_DELROUTE => {
                let a = m.attributes(12)?;
                let (table, kind) = (m.body.get(4)?, m.body.get(7)?);
                let to = value(&a, libc::RTA_DST)?;
                let over = number32(value(&a, libc::RTA_OIF)?, 0)?;
                a.len() == 2
                    && if m.kind == libc::RTM_NEWROUTE {
                        // The streams' addresses are this host's, and nothing else is routed.
                        (*table, *kind) == (libc::RT_TABLE_LOCAL, libc::RTN_LOCAL)
                            && over == LOOPBACK
                            && in_streams(to)
                    } else {
                        self.ours(over) && (in_pool(to) || to[..2] == [0xff, 0])
                    }
            }
            _ => false,
        })
    }

    fn netfilter(&self, m: &Message<'_>, serving: bool) -> Option<bool> {
        let a = m.attributes(4)?;
        let own_table = || {
            let table = value(&a, 1).map(text);
            m.body[0] == libc::NFPROTO_INET as u8 && table.as_deref() == Some("rvpn")
        };
        Some(match m.kind {
            BATCH_BEGIN | BATCH_END => m.body == [0, 0, 0, 10],
            CONNTRACK_GET | CONNTRACK_DELETE => {
                let mark = u32::from_be_bytes(value(&a, 8)?.try_into().ok()?);
                let mask = u32::from_be_bytes(value(&a, 21)?.try_into().ok()?);
                // Flows that bear another mark, or none, are nobody's business.
                a.len() == 2 && mask & MARK.1 == MARK.1 && mark & MARK.1 == MARK.0
            }
            NEW_ELEMENT | DELETE_ELEMENT => {
                let set = text(value(&a, 2)?);
                own_table() && (!serving || self.elements(&set, value(&a, 3)?)?)
            }
            // Tables, chains, rules, sets, objects: made before there is anybody to listen to.
            other => {
                let making = [0, 2, 3, 6, 9, 18].contains(&(other & 0xff));
                let looking = [1, 7].contains(&(other & 0xff)) && m.flags & DUMP == DUMP;
                other & 0xff00 == NFTABLES && (looking || making && !serving && own_table())
            }
        })
    }

    /// Every key names a device of the pool, and an address or mark of it.
    fn elements(&self, set: &str, list: &[u8]) -> Option<bool> {
        for (_, element) in attributes(list)? {
            let key = value(&attributes(element)?, 1)?;
            let key = value(&attributes(key)?, 1)?;
            let device = || number32(key, 0).is_some_and(|i| self.ours(i));
            let rest = key.get(4..).unwrap_or_default();
            let good = match set {
                "lease4" | "back4" => device() && rest.len() == 4 && in_pool(rest),
                "lease6" | "back6" => device() && rest.len() == 16 && in_pool(rest),
                "marks" => device() && rest.is_empty(),
                "owned" => device() && number32(rest, 0)? & MARK.1 == MARK.0,
                "stream4" | "stream6" | "stream_marks4" | "stream_marks6" => in_streams(key),
                _ => false,
            };
            if !good {
                return Some(false);
            }
        }
        Some(true)
    }
}

fn is_pool_name(name: &str) -> bool {
    name.strip_prefix("rv")
        .is_some_and(|n| (1..=5).contains(&n.len()) && n.bytes().all(|b| b.is_ascii_digit()))
}

/// Of 10.64.0.0/10, or of the laboratory's /48 without its last /64.
fn in_pool(address: &[u8]) -> bool {
    match *address {
        [10, b, _, _] => b & 0xc0 == 64,
        _ => <[u8; 16]>::try_from(address).is_ok_and(|a| {
            let s = Ipv6Addr::from(a).segments();
            s[..3] == [0xfd52, 0x5650, 1] && s[3] != 0xffff
        }),
    }
}

/// Of 10.63.192.0/18, or of the last /64 of the laboratory's /48.
fn in_streams(address: &[u8]) -> bool {
    match *address {
        [a, b, c, d] => Ipv4Addr::new(a, b, c, d).octets()[..2] == [10, 63] && c >= 192,
        _ => <[u8; 16]>::try_from(address)
            .is_ok_and(|a| Ipv6Addr::from(a).segments()[..4] == [0xfd52, 0x5650, 1, 0xffff]),
    }
}

#[test]
fn hlp_12_every_byte_said_to_the_kernel_is_of_the_model() {
    let seen = observe();
    let mut kinds = BTreeSet::new();
    for (at, sent) in seen.sent.iter().enumerate() {
        let serving = at >= seen.serving.0;
        let all = match sent.to {
            To::Elsewhere => continue,
            To::OtherNetlink => panic!("another family: {sent:?}"),
            To::Route | To::Netfilter => messages(&sent.bytes),
        };
        for m in all.unwrap_or_else(|| panic!("does not come out even: {sent:?}")) {
            let good = match sent.to {
                To::Route => seen.route(&m),
                _ => seen.netfilter(&m, serving),
            };
            assert_eq!(
                good,
                Some(true),
                "{:?} while serving: {serving}: {m:?}",
                sent.to
            );
            kinds.insert((sent.to, m.kind, serving));
        }
    }
    // What had to be seen for this to mean something.
    for (to, kind) in [
        (To::Route, libc::RTM_NEWLINK),
        (To::Route, libc::RTM_DELLINK),
        (To::Route, libc::RTM_NEWADDR),
        (To::Netfilter, NEW_ELEMENT),
        (To::Netfilter, DELETE_ELEMENT),
        (To::Netfilter, CONNTRACK_GET),
        (To::Netfilter, CONNTRACK_DELETE),
    ] {
        assert!(
            kinds.contains(&(to, kind, true)),
            "{to:?} {kind} was not seen"
        );
    }
    assert!(kinds.contains(&(To::Route, libc::RTM_NEWROUTE, false)));
    // Names are given by ioctl, which no trace shows: every link that ever was.
    let strange: Vec<_> = seen
        .links
        .iter()
        .filter(|n| !is_pool_name(n) && !n.starts_with("last"))
        .filter(|n| !["lo", "wan0"].contains(&n.as_str()))
        .collect();
    assert!(strange.is_empty(), "{strange:?}");
    assert!(seen.links.iter().any(|n| is_pool_name(n)));
}

#[test]
fn hlp_24_no_call_does_anything_else() {
    let seen = observe();
    let allowed = [
        "accept4",
        "brk",
        "clock_gettime",
        "clock_nanosleep",
        "close",
        "fcntl",
        "fsync",
        "futex",
        "getdents64",
        "getsockopt",
        "ioctl",
        "lseek",
        "madvise",
        "mmap",
        "mremap",
        "munmap",
        "newfstatat",
        "openat",
        "poll",
        "ppoll",
        "read",
        "recvmsg",
        "rename",
        "restart_syscall",
        "sendmsg",
        "sendto",
        "statx",
        "unlink",
        "write",
        "writev",
    ];
    let ioctls = [
        "TUNGETIFF",
        "TUNSETIFF",
        "TUNSETOFFLOAD",
        "TUNSETOWNER",
        "TUNSETPERSIST",
        "TUNSETGROUP",
    ];
    let mut opened = BTreeSet::new();
    for call in &seen.calls[seen.serving.1..] {
        assert!(allowed.contains(&call.name.as_str()), "{}", call.line);
        if call.name == "ioctl" {
            let request = call.line.split(", ").nth(1).unwrap_or_default();
            let request = request.split([',', ')', ' ']).next().unwrap_or_default();
            assert!(ioctls.contains(&request), "{}", call.line);
        }
        if call.name == "openat" {
            let path = call.line.split('"').nth(1).unwrap_or_default();
            let words: Vec<&str> = path.split('/').collect();
            let good = match words.as_slice() {
                ["", "dev", "net", "tun"] => true,
                // Settings of a device of the pool alone.
                [
                    "",
                    "proc",
                    "sys",
                    "net",
                    "ipv4" | "ipv6",
                    "conf",
                    device,
                    setting,
                ] => {
                    is_pool_name(device)
                        && [
                            "disable_ipv6",
                            "force_forwarding",
                            "forwarding",
                            "accept_ra",
                        ]
                        .contains(setting)
                }
                _ => false,
            };
            assert!(good, "{}", call.line);
            opened.insert(path);
        }
    }
    assert!(opened.contains("/dev/net/tun"), "{opened:?}");
    // No socket but those it had, each asked for what it is for.
    let sockets: BTreeSet<&str> = seen.calls[..seen.serving.1]
        .iter()
        .filter(|c| c.name == "socket")
        .filter_map(|c| c.line.split(['(', ',']).nth(1))
        .collect();
    assert!(
        sockets
            .iter()
            .all(|s| ["AF_UNIX", "AF_NETLINK"].contains(s)),
        "{sockets:?}"
    );
}
