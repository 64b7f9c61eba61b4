//! How visitors' tasks wake the tunnel they are in.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Waker};

/// A visitor's number within its tunnel. Never used twice.
pub(super) type Number = u64;

/// Who wants the tunnel's attention.
#[derive(Debug, Default)]
pub(super) struct Bell {
    inner: Mutex<Inner>,
    /// Bytes that wait for all visitors together.
    waiting: AtomicUsize,
}

#[derive(Debug, Default)]
struct Inner {
    rung: Vec<Number>,
    waker: Option<Waker>,
}

impl Bell {
    /// Bytes that wait for all visitors together.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// So many more wait.
    pub(super) fn fill(&self, bytes: usize) {
        self.waiting.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So many wait no longer.
    pub(super) fn drain(&self, bytes: usize) {
        self.waiting.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Asks for attention. A visitor rings once until it has been looked at.
    pub(super) fn ring(&self, number: Number) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.rung.push(number);
        if let Some(waker) = inner.waker.take() {
            waker.wake();
        }
    }

    /// Takes those who rang into `all`, and wakes the caller for the next.
    pub(super) fn answer(&self, all: &mut Vec<Number>, cx: &Context<'_>) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        all.append(&mut inner.rung);
        if !inner
            .waker
            .as_ref()
            .is_some_and(|w| w.will_wake(cx.waker()))
        {
            inner.waker = Some(cx.waker().clone());
        }
    }
}
