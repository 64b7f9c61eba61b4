//! Network namespaces held by descriptor.

use std::fs::File;
use std::io::{self, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Output, Stdio};

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// A namespace; it lives as long as a descriptor or a process of it.
pub struct Ns {
    pub name: &'static str,
    file: File,
}

impl Ns {
    /// A new one with loopback up.
    pub fn new(name: &'static str) -> Ns {
        let file = std::thread::scope(|s| {
            s.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET)
                    .expect("unshare: run the tests as root or in a user namespace");
                File::open("/proc/thread-self/ns/net").expect("own namespace")
            })
            .join()
            .expect("namespace thread")
        });
        let ns = Ns { name, file };
        // Addresses work at once, without the time their detection takes.
        ns.sysctl("net/ipv6/conf/default/accept_dad", "0");
        ns.ip("link set lo up");
        ns
    }

    /// Runs the closure inside; sockets it makes stay inside.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|s| {
            let inside = s.spawn(|| {
                setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET).expect("setns");
                f()
            });
            match inside.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Starts a program inside, in a process group of its own.
    pub fn spawn(&self, command: &mut Command) -> Child {
        let shown = format!("{command:?}");
        command.process_group(0);
        self.run(|| command.spawn())
            .unwrap_or_else(|e| panic!("{shown}: {e}"))
    }

    /// The same for one that serves until it is stopped: it does not outlive
    /// this process, however that ends.
    pub fn daemon(&self, command: &mut Command) -> Daemon {
        let child = self.spawn(command);
        let watch = Watch::over(child.id());
        Daemon { child, watch }
    }

    /// Runs a program inside to its end.
    pub fn output(&self, command: &mut Command) -> Output {
        let shown = format!("{command:?}");
        self.run(|| command.output())
            .unwrap_or_else(|e| panic!("{shown}: {e}"))
    }

    /// Runs a program that must succeed and returns what it printed.
    pub fn sh(&self, program: &str, args: &[&str]) -> String {
        let out = self.output(Command::new(program).args(args));
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(
            out.status.success(),
            "{}: {program} {args:?}: {}{}",
            self.name,
            text,
            String::from_utf8_lossy(&out.stderr)
        );
        text
    }

    /// `ip` with these words.
    pub fn ip(&self, words: &str) -> String {
        self.sh("ip", &words.split_whitespace().collect::<Vec<_>>())
    }

    /// Sets a sysctl of this namespace.
    pub fn sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/{name}");
        self.run(|| std::fs::write(&path, value))
            .unwrap_or_else(|e| panic!("{path}: {e}"));
    }

    /// Reads a sysctl of this namespace.
    pub fn sysctl_get(&self, name: &str) -> String {
        let path = format!("/proc/sys/{name}");
        let text = self
            .run(|| std::fs::read_to_string(&path))
            .unwrap_or_else(|e| panic!("{path}: {e}"));
        text.trim_end().to_owned()
    }

    /// A UDP socket inside, with a receive deadline.
    pub fn udp(&self, address: &str) -> UdpSocket {
        let socket = self.bound(address, || UdpSocket::bind(address));
        socket
            .set_read_timeout(Some(crate::PATIENCE))
            .expect("timeout");
        socket
    }

    /// A TCP listener inside.
    pub fn tcp(&self, address: &str) -> TcpListener {
        self.bound(address, || TcpListener::bind(address))
    }

    /// A child that another thread is about to start may still hold a copy of
    /// what was closed here a moment ago: such an address is soon free.
    fn bound<T: Send>(&self, address: &str, bind: impl Fn() -> io::Result<T> + Sync) -> T {
        let mut made = None;
        crate::wait_until("the address is free", || match self.run(&bind) {
            Ok(socket) => {
                made = Some(socket);
                true
            }
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => false,
            Err(e) => panic!("{}: {address}: {e}", self.name),
        });
        made.expect("bound")
    }

    /// Sends a whole IP packet from inside, as it is, by this namespace's routes.
    pub fn send_raw(&self, packet: &[u8]) {
        use nix::sys::socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6,
            sendto, socket,
        };
        use std::os::fd::AsRawFd;
        self.run(|| {
            let flags = SockFlag::SOCK_CLOEXEC;
            if packet[0] >> 4 == 4 {
                let to = SockaddrIn::new(packet[16], packet[17], packet[18], packet[19], 0);
                let s = socket(AddressFamily::Inet, SockType::Raw, flags, SockProtocol::Raw)
                    .expect("raw socket");
                sendto(s.as_raw_fd(), packet, &to, MsgFlags::empty()).expect("raw packet");
            } else {
                let to: [u8; 16] = packet[24..40].try_into().expect("address");
                let to = SockaddrIn6::from(std::net::SocketAddrV6::new(to.into(), 0, 0, 0));
                let s = socket(
                    AddressFamily::Inet6,
                    SockType::Raw,
                    flags,
                    SockProtocol::Raw,
                )
                .expect("raw socket");
                sendto(s.as_raw_fd(), packet, &to, MsgFlags::empty()).expect("raw packet");
            }
        });
    }
}

/// A running program, and with it whatever it started: all end together.
pub struct Daemon {
    pub child: Child,
    watch: Watch,
}

impl Daemon {
    /// Starts it where this thread is.
    pub fn start(command: &mut Command) -> Daemon {
        let shown = format!("{command:?}");
        let child = command
            .process_group(0)
            .spawn()
            .unwrap_or_else(|e| panic!("{shown}: {e}"));
        let watch = Watch::over(child.id());
        Daemon { child, watch }
    }

    /// `kill -9`, for a wrapper such as strace and what it runs alike.
    pub fn kill(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            kill_group(self.child.id());
        }
        let _ = self.child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        self.watch.dismiss();
    }
}

fn kill_group(pid: u32) {
    if let Ok(pid) = i32::try_from(pid) {
        let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Ends a process group when this process ends without having done so: a
/// runner's `kill` runs no destructor, and the kernel's own death signal is
/// forgotten by a program that changes its user.
struct Watch {
    shell: Child,
    alive: Option<ChildStdin>,
}

impl Watch {
    fn over(group: u32) -> Watch {
        let mut shell = Command::new("sh")
            .args(["-c", "read -r _ || kill -9 \"-$0\"", &group.to_string()])
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("sh");
        let alive = shell.stdin.take();
        Watch { shell, alive }
    }

    fn dismiss(&mut self) {
        if let Some(mut alive) = self.alive.take() {
            let _ = alive.write_all(b"done\n");
        }
        let _ = self.shell.wait();
    }
}

/// Changes the effective user of this thread alone: the raw call, since the C
/// library would change every thread of the process.
pub fn become_user(uid: u32) {
    crate::raw::set_thread_user(uid).unwrap_or_else(|e| panic!("setresuid {uid}: {e}"));
}
