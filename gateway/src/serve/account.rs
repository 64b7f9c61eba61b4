//! The meter's rows of clients that serve.
//!
//! The connection that carries the visitors has a row of its own for its wire
//! bytes, as every session has. What visitors move is in one row per account
//! and served name, whoever of the account serves it: payload only, so that
//! nothing is counted twice.

use std::fmt;
use std::sync::Arc;

use crate::meter::flush::now_ms;
use crate::meter::{Full, Meter, Row, Totals};
use crate::ticket;

/// What stands before the name of what is served.
pub const SERVED: &str = "serve:";

/// The row of one account's name. Several tasks add to it; the last of them
/// ends it.
pub struct Served {
    row: Row,
}

impl Served {
    /// Takes a row for `what` an account serves.
    pub fn open(meter: &Meter, account: &str, what: &dyn fmt::Display) -> Result<Served, Full> {
        let service = format!("{SERVED}{what}");
        let row = meter.open(number()?, account, &service, now_ms())?;
        Ok(Served { row })
    }

    pub(super) fn add(&self, outbound: u64, inbound: u64) {
        self.row.add(outbound, inbound);
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.row.end(now_ms());
    }
}

impl fmt::Debug for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Served")
    }
}

/// The row of a connection that carries visitors. Dropping it ends the row
/// with what was last published.
pub struct Carrying {
    number: u128,
    totals: Totals,
    row: Row,
}

impl Carrying {
    /// Takes a row for a connection of `account`: `service` is what it speaks,
    /// `streams` or `packer`.
    pub fn open(meter: &Meter, account: &str, service: &str) -> Result<Carrying, Full> {
        let number = number()?;
        Ok(Carrying {
            row: meter.open(number, account, service, now_ms())?,
            number,
            totals: Totals::default(),
        })
    }

    /// The session's number.
    pub fn number(&self) -> u128 {
        self.number
    }

    /// Publishes the bytes read from and written to the socket since its
    /// beginning, as [`crate::admit::Io::wire`] has them.
    pub fn wire(&mut self, (read, written): (u64, u64)) {
        self.totals.outbound.wire = read;
        self.totals.inbound.wire = written;
        self.row.publish(&self.totals, false);
    }
}

impl Drop for Carrying {
    fn drop(&mut self) {
        self.row.end(now_ms());
    }
}

impl fmt::Debug for Carrying {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Carrying({:032x})", self.number)
    }
}

/// A table's rows for names and connections, and where they come from.
#[derive(Clone, Debug, Default)]
pub(super) struct Books {
    meter: Option<Arc<Meter>>,
}

impl Books {
    pub(super) fn of(meter: Arc<Meter>) -> Books {
        Books { meter: Some(meter) }
    }

    pub(super) fn served(
        &self,
        account: &str,
        what: &dyn fmt::Display,
    ) -> Result<Option<Arc<Served>>, Full> {
        let open = |meter: &Arc<Meter>| Served::open(meter, account, what).map(Arc::new);
        self.meter.as_ref().map(open).transpose()
    }
}

/// Without randomness there is no number, and without a number no row.
fn number() -> Result<u128, Full> {
    let bytes = ticket::random::<16>().map_err(|_| Full)?;
    Ok(u128::from_le_bytes(bytes))
}
