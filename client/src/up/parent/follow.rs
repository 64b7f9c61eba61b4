//! What changes around a tunnel that is up: the network, the gateway's addresses.

use futures_util::StreamExt as _;
use rtnetlink::MulticastGroup;
use tokio::sync::mpsc;
use tokio::time::{Duration, sleep, timeout};

use super::{Parent, SETTLE};
use crate::fail::{Outcome, While as _};
use crate::reach;
use crate::up::wire::Order;

impl Parent {
    /// Switches off what would drop the gateway's answers.
    pub(super) async fn loosen(&mut self) -> Outcome {
        for (path, value) in self.net.checks(&self.plan).await? {
            self.journal.set(path, value)?;
        }
        Ok(())
    }

    /// The gateway's addresses may change while we are connected.
    pub(super) fn refresh(&self) {
        let (to, found) = (self.to.clone(), self.found.clone());
        tokio::spawn(async move {
            if let Ok(addresses) = reach::resolve(&to).await {
                // One that waits already is as good.
                let _full = found.try_send(addresses);
            }
        });
    }

    /// Tells of changes to the network that are not ours.
    pub(super) fn events(&self) -> Outcome<mpsc::Receiver<()>> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ];
        let opened = rtnetlink::new_multicast_connection(&groups);
        let (connection, _, mut messages) = opened.while_doing("watch the network")?;
        tokio::spawn(connection);
        let (tell, events) = mpsc::channel(1);
        tokio::spawn(async move {
            while messages.next().await.is_some() {
                sleep(SETTLE).await;
                while let Ok(Some(_)) = timeout(Duration::ZERO, messages.next()).await {}
                // One that waits already is enough.
                let _full = tell.try_send(());
            }
        });
        Ok(events)
    }

    /// The network changed. Whatever goes wrong with looking at it is no reason
    /// to give up what protects from it.
    pub(super) async fn look(&mut self) -> Outcome {
        match self.changed().await {
            Ok(false) => Ok(()),
            Ok(true) => self.tell(&Order::Changed, None).await,
            Err(failure) => {
                eprintln!("cannot follow a change of the network: {failure}");
                self.tell(&Order::Changed, None).await
            }
        }
    }

    async fn changed(&mut self) -> Outcome<bool> {
        if self.captured && !self.net.is_captured(&self.plan).await? {
            eprintln!("somebody removed the rules that lead into the tunnel: they are back");
            self.net.capture(&self.plan).await?;
        }
        let seen = self.net.snapshot(&self.plan.interface).await?;
        if seen == self.seen {
            return Ok(false);
        }
        self.seen = seen;
        self.local = self.net.local(&self.plan.interface).await?;
        if self.captured {
            self.loosen().await?;
        }
        Ok(true)
    }
}
