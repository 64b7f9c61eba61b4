//! Life under a service manager: a socket passed in, readiness, the watchdog,
//! and an orderly end.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rvpn_ipc::seqpacket;
use rvpn_lab::helper::give;
use rvpn_lab::{Helper, Lab, PATIENCE, Tunnel, wait_until};

/// A process that does not outlive its test.
struct Service(Child);

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the service manager is told next.
fn told(manager: &UnixDatagram) -> String {
    let mut buf = [0; 512];
    let n = manager.recv(&mut buf).expect("a notification in time");
    String::from_utf8_lossy(&buf[..n]).into_owned()
}

#[test]
fn a_socket_passed_in_readiness_watchdog_and_the_end() {
    let lab = Lab::new();
    let helper = Helper::prepared(&lab, "");
    // As a service manager does: it makes the socket, and keeps it.
    let dir = helper.socket.parent().unwrap();
    fs::create_dir_all(dir).unwrap();
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    let listener: OwnedFd = seqpacket::listen(&helper.socket, 8).unwrap();
    give(&helper.socket, helper.gateway_uid);
    let notify = lab.dir.join("notify");
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();

    // Nobody reads its log: no reason to stop.
    let (nobody, log) = std::io::pipe().unwrap();
    drop(nobody);
    let serve = helper.command("serve");
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            "exec 3<&0 </dev/null; export LISTEN_PID=$$; exec \"$@\"",
            "sh",
        ])
        .arg(serve.get_program())
        .args(serve.get_args())
        .env("LISTEN_FDS", "1")
        .env("NOTIFY_SOCKET", &notify)
        .env("WATCHDOG_USEC", "200000")
        .stdin(Stdio::from(listener))
        .stderr(Stdio::from(log));
    let mut service = Service(lab.gw.spawn(&mut command));
    drop(command);

    let ready = told(&manager);
    assert!(ready.lines().any(|l| l == "READY=1"), "{ready}");
    let (mut client, pool) = helper
        .try_connect(false)
        .expect("served on the socket passed in");
    assert_eq!(pool.slots, 4);
    drop(Tunnel::acquire(&mut client, 1));
    for _ in 0..3 {
        assert_eq!(told(&manager), "WATCHDOG=1");
    }

    let pid = i32::try_from(service.0.id()).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    wait_until("the end is announced", || told(&manager) == "STOPPING=1");
    assert_eq!(service.0.wait().unwrap().code(), Some(0));
    assert!(
        helper.socket.exists(),
        "the socket is the service manager's"
    );
}

#[test]
fn a_stalled_helper_misses_its_watchdog() {
    let lab = Lab::new();
    let mut helper = Helper::prepared(&lab, "");
    let notify = lab.dir.join("notify");
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let program = helper.command("serve").get_program().to_owned();
    let notify = notify.display().to_string();
    helper.program(
        program.into(),
        &[("NOTIFY_SOCKET", &notify), ("WATCHDOG_USEC", "200000")],
    );
    helper.start(&lab.gw);
    wait_until("it is alive", || told(&manager) == "WATCHDOG=1");
    helper.signal(Signal::SIGSTOP);
    // What was sent before it stood still is read first.
    manager.set_read_timeout(Some(PATIENCE / 20)).unwrap();
    wait_until("it is silent", || manager.recv(&mut [0; 512]).is_err());
    helper.signal(Signal::SIGCONT);
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(told(&manager), "WATCHDOG=1");
    helper.connect();
}
