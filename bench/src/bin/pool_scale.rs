//! How the helper's pool scales: time and memory to provision, acquire,
//! release and tear down pools of several sizes, in namespaces of its own.
//!
//! In each pool [`LEASES`] slots are leased and given back; with `--all`, every one.
//!
//! Run it as root, or in a user namespace, beside a helper of the same build:
//! `cargo build --release -p rvpn-privhelper -p rvpn-bench && ./target/release/pool_scale`

use std::fs;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use rvpn_ipc::{Client, Key, Kind, Lease};
use rvpn_lab::{Helper, Lab, wait_within};

const SIZES: [u32; 3] = [1_000, 5_000, 10_000];
/// The most a plan numbers with the ranges below.
const LARGEST: u32 = 16_384;
/// Held at a time, so that every size has as many samples.
const LEASES: u32 = 1_000;
/// Descriptors needed beside one for each lease.
const OTHER_DESCRIPTORS: u64 = 256;
/// Beyond this something hangs, and no figure is worth waiting for.
const HANG: Duration = Duration::from_secs(300);

/// What one pool cost.
struct Row {
    devices: u32,
    leased: u32,
    provision: Duration,
    /// Unswappable kernel memory of the devices, in KiB.
    kernel: f64,
    /// All memory they took, as the kernel estimates what is left, in KiB.
    all: f64,
    /// From start to serving, the devices being there.
    adopt: Duration,
    acquire: Vec<Duration>,
    release: Vec<Duration>,
    /// From the first release until the last slot was proven clean.
    clean: Duration,
    /// The helper's resident memory at its highest, in KiB.
    resident: u64,
    teardown: Duration,
}

fn main() -> ExitCode {
    let mut given: Vec<String> = std::env::args().skip(1).collect();
    let words = given.len();
    given.retain(|a| a != "--all");
    let all = given.len() < words;
    let sizes: Vec<u32> = if given.is_empty() {
        SIZES.into()
    } else {
        given.iter().filter_map(|a| a.parse().ok()).collect()
    };
    let fits = |n: &u32| (1..=LARGEST).contains(n);
    if sizes.len() < given.len() || !sizes.iter().all(fits) {
        eprintln!(
            "usage: pool_scale [--all] [DEVICES...], each from 1 to {LARGEST}; without: {SIZES:?}"
        );
        return ExitCode::from(1);
    }
    let most = sizes.iter().copied().map(u64::from).max().unwrap_or(0) + OTHER_DESCRIPTORS;
    if let Err(e) = setrlimit(Resource::RLIMIT_NOFILE, most, most) {
        eprintln!("{most} open files are needed, one for each lease: {e}; raise the limit");
        return ExitCode::from(78);
    }
    heading();
    let mut first = None;
    for devices in sizes {
        // A thread has namespaces of its own, and takes them with it.
        let row = std::thread::spawn(move || {
            measure(devices, if all { devices } else { LEASES.min(devices) })
        })
        .join();
        let Ok(row) = row else {
            return ExitCode::from(70);
        };
        print(&row, first.as_ref());
        first.get_or_insert(row);
    }
    ExitCode::SUCCESS
}

fn measure(devices: u32, leased: u32) -> Row {
    let lab = Lab::new();
    let config = format!("slots = {devices}\nmax-slots = {devices}\nlinger = 60\n");
    let mut helper = Helper::prepared(&lab, &config);

    let before = Memory::now();
    let (provision, (code, said)) = timed(|| helper.run(&lab.gw, "provision"));
    assert_eq!(code, 0, "provision: {said}");
    let after = Memory::now();
    let each = |a: f64, b: f64| (b - a) / f64::from(devices);

    let (adopt, ()) = timed(|| helper.start(&lab.gw));
    let mut client = helper.connect();
    let mut leases = Vec::new();
    let mut acquire = Vec::new();
    for n in 1..=u128::from(leased) {
        let (took, lease) = timed(|| client.acquire(Key(n.to_le_bytes()), Kind::Both, 0));
        acquire.push(took);
        leases.push(lease.unwrap_or_else(|e| panic!("lease {n}: {e}; {}", helper.log())));
    }
    let resident = helper.resident();
    let (clean, release) = timed(|| release_all(&mut client, leases));
    drop(client);
    let resident = resident.max(helper.resident());
    helper.signal(Signal::SIGTERM);
    helper.ended();

    let (teardown, (code, said)) = timed(|| helper.run(&lab.gw, "teardown"));
    assert_eq!(code, 0, "teardown: {said}");
    Row {
        devices,
        leased,
        provision,
        kernel: each(before.kernel, after.kernel),
        all: each(after.available, before.available),
        adopt,
        acquire: sorted(acquire),
        release: sorted(release),
        clean,
        resident,
        teardown,
    }
}

/// Gives every lease back as a gateway does: descriptor first.
fn release_all(client: &mut Client, leases: Vec<Lease>) -> Vec<Duration> {
    let mut release = Vec::new();
    for lease in leases {
        let (slot, generation) = (lease.reply.slot, lease.reply.generation);
        drop(lease);
        let (took, done) = timed(|| client.release(slot, generation));
        release.push(took);
        done.unwrap_or_else(|e| panic!("release of slot {slot}: {e}"));
    }
    wait_within(HANG, "every slot is clean", || {
        client.describe().is_ok_and(|d| d.free == d.slots)
    });
    release
}

fn timed<T>(f: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let value = f();
    (start.elapsed(), value)
}

fn sorted(mut all: Vec<Duration>) -> Vec<Duration> {
    all.sort_unstable();
    all
}

/// The value below which this share of a sorted list lies, in milliseconds.
fn percentile(sorted: &[Duration], percent: usize) -> f64 {
    let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).map_or(0.0, |d| d.as_secs_f64() * 1e3)
}

/// The machine's memory in KiB: other programs move it too, so run this on a quiet one.
struct Memory {
    kernel: f64,
    available: f64,
}

impl Memory {
    fn now() -> Memory {
        let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let field = |name: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(name));
            let number =
                line.and_then(|l| l.trim_matches([':', ' ']).split(' ').next()?.parse().ok());
            number.unwrap_or(0.0)
        };
        Memory {
            kernel: field("SUnreclaim") + field("Percpu"),
            available: field("MemAvailable"),
        }
    }
}

fn heading() {
    println!(
        "          provision  KiB a device  adopt           acquire, ms             release, ms   clean  helper  teardown"
    );
    println!(
        "devices    s     ms  kernel   all      s  leases    p50    p99     max     p50     p99       s     KiB         s"
    );
}

fn print(r: &Row, first: Option<&Row>) {
    let per_device = |d: Duration, r: &Row| d.as_secs_f64() * 1e3 / f64::from(r.devices);
    println!(
        "{:7} {:4.1} {:6.2}  {:6.1} {:5.1} {:6.2} {:7} {:6.2} {:6.2} {:7.2} {:7.2} {:7.2} {:7.1} {:7} {:9.2}",
        r.devices,
        r.provision.as_secs_f64(),
        per_device(r.provision, r),
        r.kernel,
        r.all,
        r.adopt.as_secs_f64(),
        r.leased,
        percentile(&r.acquire, 50),
        percentile(&r.acquire, 99),
        percentile(&r.acquire, 100),
        percentile(&r.release, 50),
        percentile(&r.release, 99),
        r.clean.as_secs_f64(),
        r.resident,
        r.teardown.as_secs_f64(),
    );
    if let Some(f) = first {
        println!(
            "  x, a device against {}: provision {:.2}, kernel memory {:.2}, adopt {:.2}, acquire p50 {:.2} p99 {:.2}, release p50 {:.2} p99 {:.2}, clean a lease {:.2}, teardown {:.2}",
            f.devices,
            per_device(r.provision, r) / per_device(f.provision, f),
            r.kernel / f.kernel,
            per_device(r.adopt, r) / per_device(f.adopt, f),
            percentile(&r.acquire, 50) / percentile(&f.acquire, 50),
            percentile(&r.acquire, 99) / percentile(&f.acquire, 99),
            percentile(&r.release, 50) / percentile(&f.release, 50),
            percentile(&r.release, 99) / percentile(&f.release, 99),
            (r.clean.as_secs_f64() / f64::from(r.leased))
                / (f.clean.as_secs_f64() / f64::from(f.leased)),
            per_device(r.teardown, r) / per_device(f.teardown, f),
        );
    }
}
