//! A channel into a session that costs next to nothing while it is empty.
//!
//! Every session has some, and hardly ever is anything in them. tokio's
//! channels make room for 32 messages in advance, which for an idle client is
//! as much as all its keys; this one makes room when something comes, and
//! looking into it while nothing does takes no lock.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;

/// A mailbox for at most so many messages: its slot, which may be copied, and
/// its owner's side.
pub fn mailbox<T>(room: usize) -> (Slot<T>, Mailbox<T>) {
    let shared = Arc::new(Shared {
        something: AtomicBool::new(false),
        owner: AtomicWaker::new(),
        waiting: Mutex::new(Some(VecDeque::new())),
        room,
    });
    let slot = Slot(Arc::clone(&shared));
    (slot, Mailbox(shared))
}

struct Shared<T> {
    /// Whether looking is worth a lock.
    something: AtomicBool,
    owner: AtomicWaker,
    /// None when the owner is gone.
    waiting: Mutex<Option<VecDeque<T>>>,
    room: usize,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Option<VecDeque<T>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<T> {
        if !self.something.load(Ordering::Acquire) {
            return None;
        }
        let mut waiting = self.lock();
        let queue = waiting.as_mut()?;
        let message = queue.pop_front();
        if queue.is_empty() {
            *queue = VecDeque::new();
            self.something.store(false, Ordering::Release);
        }
        message
    }
}

/// Where messages are left.
pub struct Slot<T>(Arc<Shared<T>>);

impl<T> Slot<T> {
    /// Leaves a message. It comes back if the mailbox is full or its owner gone.
    pub fn leave(&self, message: T) -> Result<(), T> {
        let mut waiting = self.0.lock();
        match waiting.as_mut() {
            Some(queue) if queue.len() < self.0.room => queue.push_back(message),
            Some(_) | None => return Err(message),
        }
        self.0.something.store(true, Ordering::Release);
        drop(waiting);
        self.0.owner.wake();
        Ok(())
    }
}

impl<T> Clone for Slot<T> {
    fn clone(&self) -> Slot<T> {
        Slot(Arc::clone(&self.0))
    }
}

impl<T> fmt::Debug for Slot<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Slot").finish_non_exhaustive()
    }
}

/// Where they arrive. Dropping it drops what waits in it.
pub struct Mailbox<T>(Arc<Shared<T>>);

impl<T> Mailbox<T> {
    /// The next message. Pending as long as there is none, also when nobody is
    /// left who could leave one.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<T> {
        if let Some(message) = self.0.take() {
            return Poll::Ready(message);
        }
        self.0.owner.register(cx.waker());
        // What came between the look and the registration woke nobody.
        self.0.take().map_or(Poll::Pending, Poll::Ready)
    }
}

impl<T> Drop for Mailbox<T> {
    fn drop(&mut self) {
        // Dropped without the lock: a message may be an end of something itself.
        let left = self.0.lock().take();
        drop(left);
        self.0.owner.take();
    }
}

impl<T> fmt::Debug for Mailbox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Mailbox").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use tokio::sync::oneshot;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn messages_arrive_in_order_and_wake_whoever_waits() {
        let (slot, mut mail) = mailbox(4);
        let waiting = tokio::spawn(async move {
            let mut got = Vec::new();
            while got.len() < 6 {
                got.push(poll_fn(|cx| mail.poll(cx)).await);
            }
            got
        });
        for n in 0..6 {
            // The other task sleeps before each of them.
            tokio::task::yield_now().await;
            slot.clone().leave(n).unwrap();
        }
        let got = timeout(Duration::from_secs(5), waiting).await;
        assert_eq!(got.unwrap().unwrap(), [0, 1, 2, 3, 4, 5]);
    }

    #[tokio::test]
    async fn no_message_is_lost_between_threads() {
        const EACH: u32 = 20_000;
        let (slot, mut mail) = mailbox(64);
        let senders: Vec<_> = (0..2)
            .map(|_| {
                let slot = slot.clone();
                std::thread::spawn(move || {
                    for n in 0..EACH {
                        while slot.leave(n).is_err() {
                            std::thread::yield_now();
                        }
                    }
                })
            })
            .collect();
        let all = async {
            for _ in 0..2 * EACH {
                poll_fn(|cx| mail.poll(cx)).await;
            }
        };
        timeout(Duration::from_secs(60), all).await.unwrap();
        for sender in senders {
            sender.join().unwrap();
        }
    }

    #[test]
    fn a_full_mailbox_takes_nothing_and_an_abandoned_one_keeps_nothing() {
        let (slot, mail) = mailbox(1);
        let (give, mut take) = oneshot::channel::<()>();
        slot.leave(give).unwrap();
        assert!(slot.leave(oneshot::channel().0).is_err());
        assert_eq!(take.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        drop(mail);
        assert_eq!(take.try_recv(), Err(oneshot::error::TryRecvError::Closed));
        assert!(slot.leave(oneshot::channel().0).is_err());
    }

    #[test]
    fn an_empty_mailbox_is_small() {
        assert!(size_of::<Shared<super::super::hub::Order>>() <= 128);
    }
}
