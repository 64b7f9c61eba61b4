//! A helper for tests: speaks the real protocol over a real socket, and hands
//! out one end of a packet-preserving socket pair where the real one hands out
//! a TUN. What the gateway writes to its device is what the test reads here.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rvpn_ipc::frame::{FLAG_RESUMED, REQUEST_LEN};
use rvpn_ipc::{Generation, Key, Op, Reply, Request, Slot, Status, seqpacket};

/// How long a test waits for anything at all.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// How often the serving thread looks at what the test wants of it.
const TICK: Duration = Duration::from_millis(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotState {
    Free,
    Leased,
    Lingering,
}

#[derive(Debug)]
struct Entry {
    state: SlotState,
    generation: Generation,
    key: Key,
    far_end: Option<Arc<UnixDatagram>>,
}

#[derive(Debug)]
struct State {
    slots: Vec<Entry>,
    linger: bool,
    stalled: bool,
    stopping: bool,
    connected: bool,
    notices: Vec<Reply>,
    log: Vec<Op>,
}

/// The helper. Dropping it closes its socket.
pub(crate) struct FakeHelper {
    pub(crate) socket: PathBuf,
    shared: Arc<(Mutex<State>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl FakeHelper {
    pub(crate) fn start(dir: &Path, slots: usize) -> FakeHelper {
        let state = State {
            slots: (0..slots)
                .map(|_| Entry {
                    state: SlotState::Free,
                    generation: 0,
                    key: Key::NONE,
                    far_end: None,
                })
                .collect(),
            linger: true,
            stalled: false,
            stopping: false,
            connected: false,
            notices: Vec::new(),
            log: Vec::new(),
        };
        let mut helper = FakeHelper {
            socket: dir.join("helper.sock"),
            shared: Arc::new((Mutex::new(state), Condvar::new())),
            thread: None,
        };
        helper.run();
        helper
    }

    /// As after `kill -9` and a new start: the connection is gone, the leases are not.
    pub(crate) fn restart(&mut self) {
        self.stop();
        self.state().stopping = false;
        self.run();
    }

    /// Ends the process, so to speak; the leases stay known for [`FakeHelper::revive`].
    pub(crate) fn stop(&mut self) {
        self.state().stopping = true;
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        std::fs::remove_file(&self.socket).unwrap();
    }

    pub(crate) fn revive(&mut self) {
        self.state().stopping = false;
        self.run();
    }

    /// Stops or resumes answering, as SIGSTOP and SIGCONT do.
    pub(crate) fn stall(&self, stalled: bool) {
        self.state().stalled = stalled;
    }

    /// Forgets all leases, as a helper does whose devices were deleted.
    pub(crate) fn forget_leases(&self) {
        for slot in &mut self.state().slots {
            slot.state = SlotState::Free;
            slot.generation += 1;
        }
    }

    pub(crate) fn notify(&self, status: Status, slot: Slot) {
        let mut state = self.state();
        let generation = state.slots[slot as usize].generation;
        state.notices.push(Reply::notice(status, slot, generation));
    }

    pub(crate) fn slot(&self, slot: Slot) -> (SlotState, Generation, Key) {
        let state = self.state();
        let entry = &state.slots[slot as usize];
        (entry.state, entry.generation, entry.key)
    }

    /// Waits until a slot is in this state.
    pub(crate) fn await_slot(&self, slot: Slot, wanted: SlotState) {
        self.await_state(&format!("slot {slot} to be {wanted:?}"), |s| {
            s.slots[slot as usize].state == wanted
        });
    }

    pub(crate) fn await_connected(&self) {
        self.await_state("the gateway to connect", |s| s.connected);
    }

    fn await_state(&self, what: &str, done: impl Fn(&State) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.state();
        while !done(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited in vain for {what}: {state:?}");
            state = self.shared.1.wait_timeout(state, left).unwrap().0;
        }
    }

    /// The far end of the slot's device: what comes out of it, and into it.
    pub(crate) fn device(&self, slot: Slot) -> Arc<UnixDatagram> {
        self.await_state("the device to be handed out", |s| {
            s.slots[slot as usize].far_end.is_some()
        });
        let state = self.state();
        Arc::clone(state.slots[slot as usize].far_end.as_ref().unwrap())
    }

    /// Closes the far end: every further read and write of the gateway fails.
    pub(crate) fn destroy_device(&self, slot: Slot) {
        self.state().slots[slot as usize].far_end = None;
    }

    /// Operations so far.
    pub(crate) fn log(&self) -> Vec<Op> {
        self.state().log.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap()
    }

    fn run(&mut self) {
        let listener = seqpacket::listen(&self.socket, 8).unwrap();
        let shared = Arc::clone(&self.shared);
        self.thread = Some(std::thread::spawn(move || serve(&listener, &shared)));
    }
}

impl Drop for FakeHelper {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.stop();
        }
    }
}

fn serve(listener: &OwnedFd, shared: &(Mutex<State>, Condvar)) {
    let mut connection: Option<OwnedFd> = None;
    loop {
        let stalled = {
            let mut state = shared.0.lock().unwrap();
            if state.stopping {
                state.connected = false;
                return;
            }
            if let Some(socket) = &connection {
                for notice in state.notices.drain(..) {
                    seqpacket::send(socket.as_fd(), &notice.encode(), None).unwrap();
                }
            }
            state.stalled
        };
        if stalled {
            std::thread::park_timeout(TICK);
            continue;
        }
        // A second connection replaces the first, which is gone by then.
        if let Ok(socket) = seqpacket::accept(listener.as_fd()) {
            let blocking = UnixDatagram::from(socket);
            blocking.set_nonblocking(false).unwrap();
            let socket = OwnedFd::from(blocking);
            seqpacket::set_timeout(socket.as_fd(), TICK).unwrap();
            connection = Some(socket);
        }
        let Some(socket) = &connection else {
            std::thread::park_timeout(TICK);
            continue;
        };
        let mut buf = [0; REQUEST_LEN];
        match seqpacket::recv(socket.as_fd(), &mut buf, false) {
            Ok(got) if got.len == REQUEST_LEN => {
                let request = Request::decode(&buf).unwrap();
                while shared.0.lock().unwrap().stalled {
                    std::thread::park_timeout(TICK);
                }
                let (reply, tun) = answer(&mut shared.0.lock().unwrap(), &request);
                let tun = tun.as_ref().map(AsFd::as_fd);
                // The gateway may be gone by now.
                drop(seqpacket::send(socket.as_fd(), &reply.encode(), tun));
                shared.1.notify_all();
            }
            Ok(_) => {
                connection = None;
                let mut state = shared.0.lock().unwrap();
                state.connected = false;
                for slot in &mut state.slots {
                    if slot.state == SlotState::Leased {
                        slot.state = SlotState::Lingering;
                    }
                }
                shared.1.notify_all();
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) => panic!("the helper's socket: {e}"),
        }
    }
}

fn answer(state: &mut State, request: &Request) -> (Reply, Option<OwnedFd>) {
    state.log.push(request.op);
    let index = request.slot as usize;
    let known = |state: &State| {
        state
            .slots
            .get(index)
            .is_some_and(|e| e.generation == request.generation && e.state != SlotState::Free)
    };
    match request.op {
        Op::Hello => {
            state.connected = true;
            (figures(state, Reply::to(request, Status::Ok)), None)
        }
        Op::Describe => (figures(state, Reply::to(request, Status::Ok)), None),
        Op::Acquire => acquire(state, request),
        Op::Confirm if known(state) && state.slots[index].key == request.key => {
            state.slots[index].state = SlotState::Leased;
            (lease(state, index, Reply::to(request, Status::Ok)), None)
        }
        Op::Linger if known(state) => {
            state.slots[index].state = if state.linger {
                SlotState::Lingering
            } else {
                SlotState::Free
            };
            (Reply::to(request, Status::Ok), None)
        }
        Op::Release if known(state) => {
            state.slots[index].state = SlotState::Free;
            (Reply::to(request, Status::Ok), None)
        }
        Op::Confirm | Op::Linger | Op::Release => (Reply::to(request, Status::UnknownLease), None),
    }
}

fn acquire(state: &mut State, request: &Request) -> (Reply, Option<OwnedFd>) {
    let by_key = state
        .slots
        .iter()
        .position(|e| e.key == request.key && e.state != SlotState::Free);
    let free = || state.slots.iter().position(|e| e.state == SlotState::Free);
    let Some(index) = by_key.or_else(free) else {
        let mut reply = figures(state, Reply::to(request, Status::NoCapacity));
        reply.retry_after_ms = 2_000;
        return (reply, None);
    };
    let entry = &mut state.slots[index];
    if by_key.is_none() {
        entry.generation += 1;
        entry.key = request.key;
    }
    entry.state = SlotState::Leased;
    let with_tun = request.kind.is_some_and(rvpn_ipc::Kind::has_tun);
    let (near, far) = seqpacket::pair().unwrap();
    entry.far_end = Some(Arc::new(UnixDatagram::from(far)));
    let mut reply = lease(state, index, Reply::to(request, Status::Ok));
    if by_key.is_some() {
        reply.flags = FLAG_RESUMED;
    }
    (reply, with_tun.then_some(near))
}

fn lease(state: &State, index: usize, reply: Reply) -> Reply {
    let third = u8::try_from(index).unwrap();
    Reply {
        slot: index as Slot,
        generation: state.slots[index].generation,
        ..figures(
            state,
            Reply {
                v4: Ipv4Addr::new(10, 64, third, 0),
                v6: Ipv6Addr::new(0xfd00, 0x1234, 0x5678, u16::from(third), 0, 0, 0, 0),
                stream4: Ipv4Addr::new(10, 127, 0, third),
                ..reply
            },
        )
    }
}

fn figures(state: &State, reply: Reply) -> Reply {
    let count = |wanted| {
        let found = state.slots.iter().filter(|e| e.state == wanted).count();
        u32::try_from(found).unwrap()
    };
    Reply {
        mtu: 1500,
        nat_low: 16_384,
        nat_high: 32_767,
        offload: 0x6f,
        slots: u32::try_from(state.slots.len()).unwrap(),
        free: count(SlotState::Free),
        leased: count(SlotState::Leased),
        lingering: count(SlotState::Lingering),
        linger_ms: 60_000,
        ..reply
    }
}
