//! How visitors' tasks wake the tunnel they are in.

use std::sync::{Mutex, PoisonError};
use std::task::{Context, Waker};

/// A visitor's number within its tunnel. Never used twice.
pub(super) type Number = u64;

/// Who wants the tunnel's attention.
#[derive(Debug, Default)]
pub(super) struct Bell {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    rung: Vec<Number>,
    waker: Option<Waker>,
}

impl Bell {
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
