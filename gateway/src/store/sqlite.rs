//! The embedded engine.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Row, Transaction, TransactionBehavior, params};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{
    AccountUsage, DeviceKey, Engine, Flow, Invite, NewDevice, Revocation, Scope, StoreError,
    UsageQuery,
};
use crate::meter::{DropReason, Side, Totals, Usage};

/// Each step is applied once, in order; `user_version` counts them.
const STEPS: [&str; 2] = [
    "
    CREATE TABLE device (
        id TEXT PRIMARY KEY, account TEXT NOT NULL, name TEXT NOT NULL,
        public BLOB NOT NULL, created INTEGER NOT NULL, expires INTEGER,
        class INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE invite (
        hash BLOB PRIMARY KEY, id TEXT NOT NULL UNIQUE, account TEXT NOT NULL,
        remaining INTEGER NOT NULL CHECK (remaining >= 0),
        created INTEGER NOT NULL, expires INTEGER NOT NULL,
        device_life INTEGER, class INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE revocation (
        scope TEXT NOT NULL, value TEXT NOT NULL, reason TEXT NOT NULL,
        created INTEGER NOT NULL, until INTEGER,
        PRIMARY KEY (scope, value)
    ) STRICT;
    CREATE TABLE usage (
        session TEXT NOT NULL, service TEXT NOT NULL, account TEXT NOT NULL,
        started_ms INTEGER NOT NULL, ended_ms INTEGER,
        sequence INTEGER NOT NULL,
        out_packets INTEGER NOT NULL, out_payload INTEGER NOT NULL,
        out_wire INTEGER NOT NULL, out_dropped INTEGER NOT NULL,
        in_packets INTEGER NOT NULL, in_payload INTEGER NOT NULL,
        in_wire INTEGER NOT NULL, in_dropped INTEGER NOT NULL,
        drops TEXT NOT NULL,
        PRIMARY KEY (session, service)
    ) STRICT;
    CREATE INDEX usage_by_account ON usage (account, started_ms);
    CREATE INDEX usage_by_time ON usage (started_ms);
",
    "
    ALTER TABLE device ADD COLUMN names TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE device ADD COLUMN ports TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE invite ADD COLUMN names TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE invite ADD COLUMN ports TEXT NOT NULL DEFAULT '[]';
",
];

/// Another process may hold the file for a moment, such as an operator's shell.
const BUSY: Duration = Duration::from_secs(2);

/// A store in one file.
#[derive(Debug)]
pub struct Sqlite {
    db: Connection,
}

impl Sqlite {
    /// Opens the file, or makes it, readable by this user only.
    pub fn open(path: &Path) -> Result<Sqlite, StoreError> {
        use std::os::unix::fs::OpenOptionsExt;
        // The library would make it with the process's umask.
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path)
            .map_err(|e| StoreError::Engine(format!("cannot open {}: {e}", path.display())))?;
        Sqlite::prepare(Connection::open(path)?)
    }

    /// A store that is gone with the process, for tests.
    pub fn in_memory() -> Result<Sqlite, StoreError> {
        Sqlite::prepare(Connection::open_in_memory()?)
    }

    fn prepare(mut db: Connection) -> Result<Sqlite, StoreError> {
        db.busy_timeout(BUSY)?;
        db.pragma_update(None, "journal_mode", "WAL")?;
        db.pragma_update(None, "synchronous", "FULL")?;
        db.pragma_update(None, "trusted_schema", false)?;
        let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let done: usize = tx.pragma_query_value(None, "user_version", |row| {
            row.get::<_, i64>(0)
                .map(|n| usize::try_from(n).unwrap_or(usize::MAX))
        })?;
        let Some(missing) = STEPS.get(done..) else {
            return Err(StoreError::Engine(
                "the store was written by a newer version; use that one, or restore a backup"
                    .to_owned(),
            ));
        };
        for step in missing {
            tx.execute_batch(step)?;
        }
        tx.pragma_update(None, "user_version", stored(STEPS.len() as u64))?;
        tx.commit()?;
        Ok(Sqlite { db })
    }

    fn write(&mut self) -> Result<Transaction<'_>, StoreError> {
        Ok(self
            .db
            .transaction_with_behavior(TransactionBehavior::Immediate)?)
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> StoreError {
        if error.sqlite_error_code() == Some(rusqlite::ErrorCode::ConstraintViolation) {
            return StoreError::Exists;
        }
        StoreError::Engine(error.to_string())
    }
}

/// The engine knows signed numbers only; ours do not reach that far in practice.
fn stored(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn number(row: &Row<'_>, column: &str) -> rusqlite::Result<u64> {
    Ok(u64::try_from(row.get::<_, i64>(column)?).unwrap_or(0))
}

fn maybe(row: &Row<'_>, column: &str) -> rusqlite::Result<Option<u64>> {
    let n: Option<i64> = row.get(column)?;
    Ok(n.and_then(|n| u64::try_from(n).ok()))
}

fn class(row: &Row<'_>) -> rusqlite::Result<u8> {
    row.get("class")
}

/// A list, as JSON has it.
fn list<T: DeserializeOwned>(row: &Row<'_>, column: &str) -> rusqlite::Result<Vec<T>> {
    let text: String = row.get(column)?;
    serde_json::from_str(&text).map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, error.into())
    })
}

fn list_text(list: &impl Serialize) -> Result<String, StoreError> {
    serde_json::to_string(list).map_err(|e| StoreError::Engine(e.to_string()))
}

fn device(row: &Row<'_>) -> rusqlite::Result<DeviceKey> {
    Ok(DeviceKey {
        id: row.get("id")?,
        account: row.get("account")?,
        name: row.get("name")?,
        public: row.get("public")?,
        created: number(row, "created")?,
        expires: maybe(row, "expires")?,
        class: class(row)?,
        names: list(row, "names")?,
        ports: list(row, "ports")?,
    })
}

fn invite(row: &Row<'_>) -> rusqlite::Result<Invite> {
    Ok(Invite {
        id: row.get("id")?,
        account: row.get("account")?,
        left: row.get("remaining")?,
        created: number(row, "created")?,
        expires: number(row, "expires")?,
        device_life: maybe(row, "device_life")?,
        class: class(row)?,
        names: list(row, "names")?,
        ports: list(row, "ports")?,
    })
}

fn revocation(row: &Row<'_>) -> rusqlite::Result<Option<Revocation>> {
    let scope: String = row.get("scope")?;
    let scope = [Scope::Jti, Scope::Subject]
        .into_iter()
        .find(|s| s.name() == scope);
    let Some(scope) = scope else {
        return Ok(None);
    };
    Ok(Some(Revocation {
        scope,
        value: row.get("value")?,
        reason: row.get("reason")?,
        created: number(row, "created")?,
        until: maybe(row, "until")?,
    }))
}

/// Drop counts by direction and reason name.
type Drops = BTreeMap<String, BTreeMap<String, u64>>;

fn drops_text(totals: &Totals) -> Result<String, StoreError> {
    let side = |side: &Side| {
        side.dropped()
            .map(|(r, n)| (r.name().to_owned(), n))
            .collect()
    };
    let drops: Drops = [
        ("in".to_owned(), side(&totals.inbound)),
        ("out".to_owned(), side(&totals.outbound)),
    ]
    .into();
    serde_json::to_string(&drops).map_err(|e| StoreError::Engine(e.to_string()))
}

fn usage(row: &Row<'_>) -> rusqlite::Result<Usage> {
    let drops: String = row.get("drops")?;
    let drops: Drops = serde_json::from_str(&drops).unwrap_or_default();
    let side = |way: &str| -> rusqlite::Result<Side> {
        let mut side = Side {
            payload: number(row, &format!("{way}_payload"))?,
            packets: number(row, &format!("{way}_packets"))?,
            wire: number(row, &format!("{way}_wire"))?,
            ..Side::default()
        };
        for reason in DropReason::ALL {
            let count = drops.get(way).and_then(|d| d.get(reason.name()));
            side.drop(reason, count.copied().unwrap_or(0));
        }
        Ok(side)
    };
    let session: String = row.get("session")?;
    Ok(Usage {
        session: u128::from_str_radix(&session, 16).unwrap_or_default(),
        account: row.get("account")?,
        service: row.get("service")?,
        started_ms: number(row, "started_ms")?,
        ended_ms: maybe(row, "ended_ms")?,
        totals: Totals {
            outbound: side("out")?,
            inbound: side("in")?,
        },
    })
}

/// Grows with every counter and with the end of the session, and with nothing
/// else, so that of two rows the later is known whichever comes first.
fn sequence(usage: &Usage) -> u64 {
    let sides = [&usage.totals.outbound, &usage.totals.inbound];
    let counted: u64 = sides
        .iter()
        .map(|s| s.payload + s.packets + s.wire + s.drops.iter().sum::<u64>())
        .sum();
    counted * 2 + u64::from(usage.ended_ms.is_some())
}

impl Engine for Sqlite {
    fn add_invite(&mut self, hash: &[u8; 32], invite: &Invite) -> Result<(), StoreError> {
        self.db.execute(
            "INSERT INTO invite (hash, id, account, remaining, created, expires, device_life, class, names, ports)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
            params![
                hash,
                invite.id,
                invite.account,
                invite.left,
                stored(invite.created),
                stored(invite.expires),
                invite.device_life.map(stored),
                invite.class,
                list_text(&invite.names)?,
                list_text(&invite.ports)?,
            ],
        )?;
        Ok(())
    }

    fn invites(&mut self) -> Result<Vec<Invite>, StoreError> {
        let sql = "SELECT * FROM invite WHERE remaining > 0 ORDER BY created DESC, id";
        let mut all = self.db.prepare_cached(sql)?;
        let rows = all.query_map([], invite)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    fn remove_invite(&mut self, id: &str) -> Result<bool, StoreError> {
        let gone = self.db.execute("DELETE FROM invite WHERE id = ?1", [id])?;
        Ok(gone > 0)
    }

    fn redeem(
        &mut self,
        hash: &[u8; 32],
        new: &NewDevice,
        now: u64,
    ) -> Result<Option<DeviceKey>, StoreError> {
        let tx = self.write()?;
        let sql = "SELECT * FROM invite WHERE hash = ?1 AND expires > ?2";
        let found = tx
            .query_row(sql, params![hash, stored(now)], invite)
            .optional()?;
        let Some(found) = found else {
            return Ok(None);
        };
        let known = tx
            .query_row("SELECT * FROM device WHERE id = ?1", [&new.id], device)
            .optional()?;
        if let Some(known) = known {
            // The answer to an earlier try was lost; the same key may ask again.
            return match known.account == found.account {
                true => Ok(Some(known)),
                false => Err(StoreError::Exists),
            };
        }
        if found.left == 0 {
            return Ok(None);
        }
        tx.execute(
            "UPDATE invite SET remaining = remaining - 1 WHERE hash = ?1",
            [hash],
        )?;
        let key = DeviceKey {
            id: new.id.clone(),
            account: found.account,
            name: new.name.clone(),
            public: new.public.clone(),
            created: now,
            expires: found.device_life.map(|life| now.saturating_add(life)),
            class: found.class,
            names: found.names,
            ports: found.ports,
        };
        tx.execute(
            "INSERT INTO device (id, account, name, public, created, expires, class, names, ports)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
            params![
                key.id,
                key.account,
                key.name,
                key.public,
                stored(key.created),
                key.expires.map(stored),
                key.class,
                list_text(&key.names)?,
                list_text(&key.ports)?,
            ],
        )?;
        tx.commit()?;
        Ok(Some(key))
    }

    fn devices(&mut self) -> Result<Vec<DeviceKey>, StoreError> {
        let sql = "SELECT * FROM device ORDER BY created DESC, id";
        let mut all = self.db.prepare_cached(sql)?;
        let rows = all.query_map([], device)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    fn remove_device(&mut self, id: &str) -> Result<bool, StoreError> {
        let gone = self.db.execute("DELETE FROM device WHERE id = ?1", [id])?;
        Ok(gone > 0)
    }

    fn revoke(&mut self, r: &Revocation) -> Result<(), StoreError> {
        self.db.execute(
            "INSERT OR REPLACE INTO revocation (scope, value, reason, created, until)
             VALUES (?1, ?2, ?3, ?4, ?5)",
            params![
                r.scope.name(),
                r.value,
                r.reason,
                stored(r.created),
                r.until.map(stored)
            ],
        )?;
        Ok(())
    }

    fn revocations(&mut self) -> Result<Vec<Revocation>, StoreError> {
        let sql = "SELECT * FROM revocation ORDER BY created DESC, scope, value";
        let mut all = self.db.prepare_cached(sql)?;
        let rows = all.query_map([], revocation)?;
        Ok(rows
            .filter_map(Result::transpose)
            .collect::<Result<_, _>>()?)
    }

    fn remove_revocation(&mut self, scope: Scope, value: &str) -> Result<bool, StoreError> {
        let sql = "DELETE FROM revocation WHERE scope = ?1 AND value = ?2";
        Ok(self.db.execute(sql, [scope.name(), value])? > 0)
    }

    fn prune(&mut self, now: u64) -> Result<(), StoreError> {
        let tx = self.write()?;
        tx.execute("DELETE FROM invite WHERE expires <= ?1", [stored(now)])?;
        tx.execute("DELETE FROM revocation WHERE until <= ?1", [stored(now)])?;
        tx.commit()?;
        Ok(())
    }

    fn put_usage(&mut self, rows: &[Usage]) -> Result<(), StoreError> {
        let tx = self.write()?;
        {
            let mut put = tx.prepare_cached(
                "INSERT INTO usage (session, service, account, started_ms, ended_ms, sequence,
                     out_packets, out_payload, out_wire, out_dropped,
                     in_packets, in_payload, in_wire, in_dropped, drops)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)
                 ON CONFLICT (session, service) DO UPDATE SET
                     ended_ms = excluded.ended_ms, sequence = excluded.sequence,
                     out_packets = excluded.out_packets, out_payload = excluded.out_payload,
                     out_wire = excluded.out_wire, out_dropped = excluded.out_dropped,
                     in_packets = excluded.in_packets, in_payload = excluded.in_payload,
                     in_wire = excluded.in_wire, in_dropped = excluded.in_dropped,
                     drops = excluded.drops
                 WHERE excluded.sequence > usage.sequence",
            )?;
            for row in rows {
                let (o, i) = (&row.totals.outbound, &row.totals.inbound);
                put.execute(params![
                    format!("{:032x}", row.session),
                    row.service,
                    row.account,
                    stored(row.started_ms),
                    row.ended_ms.map(stored),
                    stored(sequence(row)),
                    stored(o.packets),
                    stored(o.payload),
                    stored(o.wire),
                    stored(o.drops.iter().sum()),
                    stored(i.packets),
                    stored(i.payload),
                    stored(i.wire),
                    stored(i.drops.iter().sum()),
                    drops_text(&row.totals)?,
                ])?;
            }
        }
        tx.commit()?;
        Ok(())
    }

    fn usage(&mut self, query: &UsageQuery) -> Result<Vec<Usage>, StoreError> {
        let mut all = self.db.prepare_cached(
            "SELECT * FROM usage
             WHERE (?1 IS NULL OR account = ?1)
               AND (?2 IS NULL OR ended_ms IS NULL OR ended_ms >= ?2)
             ORDER BY started_ms DESC, session LIMIT ?3",
        )?;
        let since = query.since_ms.map(stored);
        let rows = all.query_map(params![query.account, since, query.limit], usage)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    fn usage_by_account(&mut self, query: &UsageQuery) -> Result<Vec<AccountUsage>, StoreError> {
        let mut all = self.db.prepare_cached(
            "SELECT account, count(*) AS sessions,
                 sum(out_packets) AS out_packets, sum(out_payload) AS out_payload,
                 sum(out_wire) AS out_wire, sum(out_dropped) AS out_dropped,
                 sum(in_packets) AS in_packets, sum(in_payload) AS in_payload,
                 sum(in_wire) AS in_wire, sum(in_dropped) AS in_dropped
             FROM usage
             WHERE (?1 IS NULL OR account = ?1)
               AND (?2 IS NULL OR ended_ms IS NULL OR ended_ms >= ?2)
             GROUP BY account ORDER BY account LIMIT ?3",
        )?;
        let since = query.since_ms.map(stored);
        let flow = |row: &Row<'_>, way: &str| -> rusqlite::Result<Flow> {
            Ok(Flow {
                packets: number(row, &format!("{way}_packets"))?,
                payload: number(row, &format!("{way}_payload"))?,
                wire: number(row, &format!("{way}_wire"))?,
                dropped: number(row, &format!("{way}_dropped"))?,
            })
        };
        let rows = all.query_map(params![query.account, since, query.limit], |row| {
            Ok(AccountUsage {
                account: row.get("account")?,
                sessions: number(row, "sessions")?,
                outbound: flow(row, "out")?,
                inbound: flow(row, "in")?,
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}
