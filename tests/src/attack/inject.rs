//! A system call made by another process against its will, as code that has
//! been smuggled into it would make it. Whether its own cage holds is seen in no
//! other way: the process itself never tries.

use std::ffi::CStr;
use std::fs;

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::wait_until;

/// Stands in the arguments for the address of the text passed along.
pub const TEXT: u64 = 0x7465_7874;

/// `syscall`.
const INSTRUCTION: u16 = 0x050f;
/// Beyond what a function may keep below the stack pointer.
const BELOW_THE_STACK: u64 = 1024;

/// What came of the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injected {
    /// It was let through to the kernel's own checks, and came back with this.
    Returned(i64),
    /// The filter ended the process.
    Killed(Signal),
}

/// Makes `pid`, once it waits for events, make another call; it is left stopped no longer than that.
#[track_caller]
pub fn inject(pid: u32, number: i64, arguments: [u64; 6], text: Option<&CStr>) -> Injected {
    wait_until("the process waits for events", || {
        let call = fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
        let number = call.split(' ').next().and_then(|n| n.parse().ok());
        matches!(number, Some(libc::SYS_poll | libc::SYS_ppoll))
    });
    let pid = Pid::from_raw(i32::try_from(pid).expect("pid"));
    ptrace::attach(pid).expect("attach: run the tests as root");
    wait_stop(pid);
    let before = ptrace::getregs(pid).expect("registers");
    // It waits inside a call, so the instruction that makes one lies just behind.
    let at = before.rip - 2;
    let word = ptrace::read(pid, at as ptrace::AddressType).expect("code");
    assert_eq!(word as u16, INSTRUCTION, "not waiting in a system call");
    let place = (before.rsp - BELOW_THE_STACK) & !15;
    if let Some(text) = text {
        let mut bytes = text.to_bytes_with_nul().to_vec();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        for (i, word) in bytes.chunks_exact(8).enumerate() {
            let value = i64::from_ne_bytes(word.try_into().expect("eight bytes"));
            let address = place + 8 * i as u64;
            ptrace::write(pid, address as ptrace::AddressType, value).expect("memory");
        }
    }
    let a = arguments.map(|x| if x == TEXT { place } else { x });
    let mut regs = before;
    regs.rip = at;
    regs.rax = number.cast_unsigned();
    // Not inside a call any more: nothing is to be restarted.
    regs.orig_rax = u64::MAX;
    [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = a;
    ptrace::setregs(pid, regs).expect("registers");
    ptrace::step(pid, None).expect("step");
    match waitpid(pid, Some(WaitPidFlag::__WALL)).expect("wait") {
        WaitStatus::Stopped(_, Signal::SIGTRAP) => {}
        WaitStatus::Signaled(_, signal, _) => return Injected::Killed(signal),
        WaitStatus::Stopped(_, signal) => {
            // The notice of the signal that a filter sends, before it ends the process.
            ptrace::cont(pid, Some(signal)).expect("go on");
            return match waitpid(pid, Some(WaitPidFlag::__WALL)).expect("wait") {
                WaitStatus::Signaled(_, signal, _) => Injected::Killed(signal),
                other => panic!("after the call: {other:?}"),
            };
        }
        other => panic!("after the call: {other:?}"),
    }
    let returned = ptrace::getregs(pid).expect("registers").rax.cast_signed();
    // Back into the wait it was taken from, from its beginning.
    let mut regs = before;
    regs.rip = at;
    regs.rax = before.orig_rax;
    regs.orig_rax = u64::MAX;
    ptrace::setregs(pid, regs).expect("registers");
    ptrace::detach(pid, None).expect("detach");
    Injected::Returned(returned)
}

#[track_caller]
fn wait_stop(pid: Pid) {
    match waitpid(pid, Some(WaitPidFlag::__WALL)).expect("wait") {
        WaitStatus::Stopped(..) => {}
        other => panic!("not stopped: {other:?}"),
    }
}
