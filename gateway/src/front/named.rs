//! A port whose visitors all go to one name.

use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use rvpn_proto::name::Name;

use super::listeners::Take;
use crate::admit::{Counted, Io, Prefixed};
use crate::http::{Front, Visitor};
use crate::limits::PendingPass;
use crate::serve::{Service, Visit, visit};

/// Brings them to whoever serves the name, without looking at what they speak:
/// the server may well be the one that speaks first.
pub struct Named(pub Name);

impl Take for Named {
    fn name(&self) -> String {
        self.0.to_string()
    }

    fn take(
        &self,
        front: Arc<Front>,
        io: Counted,
        visitor: Visitor,
        pass: PendingPass,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let name = self.0.clone();
        Box::pin(async move {
            let visit = Visit {
                peer: visitor.peer,
                port: visitor.port,
                name: Some(name),
                service: Service::Tcp,
            };
            let raw = Prefixed::new(Bytes::new(), io);
            visit::pass(front, Io::plain(raw), visit, pass).await;
        })
    }
}
