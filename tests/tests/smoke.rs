//! The way a client's packet is meant to go, before all the ways it is not.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use rvpn_lab::helper::field;
use rvpn_lab::ns::Daemon;
use rvpn_lab::probe::Canary;
use rvpn_lab::topology::{FAR4, GW4, GW6, UP4, UP6};
use rvpn_lab::{Helper, Lab, Tunnel, packet, wait_until};

#[test]
fn a_lease_reaches_the_internet_and_hears_back_on_both_families() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let mut gateway = helper.connect();
    let a = Tunnel::acquire(&mut gateway, 1);
    for (local, far, port, wan) in [
        (a.v4(2), UP4, "1.1.1.1:5353", GW4),
        (a.v6(1), UP6, "[2606:4700:4700::1111]:5353", GW6),
    ] {
        let server = lab.up.udp(port);
        let there = Canary::new();
        a.send(&packet::udp(&local, 4000, far, 5353, &there.0));
        let mut buf = [0; 64];
        let (n, from) = server.recv_from(&mut buf).expect("the datagram arrives");
        assert_eq!(
            (&buf[..n], from.ip().to_string().as_str()),
            (&there.0[..], wan)
        );
        assert!((16384..=32767).contains(&from.port()), "{from}");
        let back = Canary::new();
        server.send_to(&back.0, from).unwrap();
        a.expect(&back.0);
        let echo = Canary::new();
        a.send(&packet::echo(&local, far, 7, 1, &echo.0));
        a.expect(&echo.0);
    }
    let echo = Canary::new();
    a.send(&packet::echo(&a.v4(2), FAR4, 7, 2, &echo.0));
    a.expect(&echo.0);
}

#[test]
fn a_clients_machine_reaches_the_gateway_and_the_internet() {
    let lab = Lab::new();
    let machines = [(lab.client("ca", 11), "11"), (lab.client("cb", 12), "12")];
    for (ns, n) in &machines {
        for (there, v4, v6) in [(&lab.gw, GW4, GW6), (&lab.up, UP4, UP6)] {
            for (to, from) in [
                (format!("{v4}:8443"), format!("1.1.1.{n}")),
                (format!("[{v6}]:8443"), format!("2606:4700:4700::{n}")),
            ] {
                let listener = there.tcp(&to);
                let mut out = ns.run(|| TcpStream::connect(&to)).expect("connected");
                let (mut accepted, peer) = listener.accept().expect("accepted");
                assert_eq!(peer.ip().to_string(), from);
                out.write_all(b"hello").expect("written");
                let mut buf = [0; 5];
                accepted.read_exact(&mut buf).expect("read");
                assert_eq!(&buf, b"hello");
            }
        }
    }
}

/// Started in a lab of its own: a shell and what it waits for, whose number it prints.
fn start_two(lab: &Lab) -> (Daemon, String) {
    let mut program = Command::new("sh");
    program.args(["-c", "sleep 600 & echo $!; wait"]);
    let mut daemon = lab.gw.daemon(program.stdout(Stdio::piped()));
    let mut line = String::new();
    let out = daemon.child.stdout.take().expect("piped");
    BufReader::new(out).read_line(&mut line).expect("its line");
    (daemon, line.trim().to_owned())
}

fn runs(pid: &str) -> bool {
    let state = field(&format!("/proc/{pid}/status"), "State");
    !state.is_empty() && !state.starts_with('Z')
}

#[test]
fn what_is_started_ends_with_its_test() {
    let lab = Lab::new();
    let (daemon, pid) = start_two(&lab);
    assert!(runs(&pid));
    drop(daemon);
    wait_until("what the program started is gone", || !runs(&pid));
}

#[test]
fn what_is_started_ends_with_a_test_that_is_killed() {
    const INNER: &str = "RVPN_LAB_TO_BE_KILLED";
    if std::env::var_os(INNER).is_some() {
        let lab = Lab::new();
        let (_daemon, pid) = start_two(&lab);
        println!("\nstarted={pid}");
        loop {
            std::thread::park();
        }
    }
    let mut test = Command::new(std::env::current_exe().expect("own path"));
    test.args(["--exact", "what_is_started_ends_with_a_test_that_is_killed"])
        .arg("--nocapture")
        .env(INNER, "1")
        .stdout(Stdio::piped());
    let mut test = test.spawn().expect("the test once more");
    let lines = BufReader::new(test.stdout.take().expect("piped")).lines();
    let pid = lines
        .map_while(Result::ok)
        .find_map(|l| l.strip_prefix("started=").map(str::to_owned))
        .expect("what it started");
    assert!(runs(&pid));
    test.kill().expect("kill -9");
    test.wait().expect("its end");
    wait_until("what it started is gone", || !runs(&pid));
}
