//! What every engine must do. A further one is put through the same.

use super::*;
use crate::meter::{DropReason, Totals};

/// Puts a new, empty engine through each case.
fn conforms<E: Engine>(mut fresh: impl FnMut() -> E) {
    an_invite_is_good_for_its_uses_and_its_time(&mut fresh());
    asking_again_with_the_same_key_costs_nothing(&mut fresh());
    a_key_belongs_to_one_account(&mut fresh());
    devices_come_and_go(&mut fresh());
    revocations_come_and_go(&mut fresh());
    int_09_usage_is_idempotent_in_any_order(&mut fresh());
    usage_adds_up_by_account(&mut fresh());
}

#[test]
fn sqlite_in_memory_conforms() {
    conforms(|| Sqlite::in_memory().unwrap());
}

#[test]
fn sqlite_in_a_file_conforms_and_keeps_its_mode() {
    let dir = tempfile::tempdir().unwrap();
    let mut n = 0;
    conforms(|| {
        n += 1;
        Sqlite::open(&dir.path().join(format!("{n}.db"))).unwrap()
    });
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(dir.path().join("1.db"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn what_was_stored_is_there_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.db");
    Sqlite::open(&path)
        .unwrap()
        .revoke(&revocation("a", None))
        .unwrap();
    let mut again = Sqlite::open(&path).unwrap();
    assert_eq!(again.revocations().unwrap(), [revocation("a", None)]);
}

#[test]
fn a_store_without_names_gets_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.db");
    let mut db = Sqlite::open(&path).unwrap();
    db.add_invite(&HASH, &invite(1)).unwrap();
    let joined = db.redeem(&HASH, &new_device("a"), 10).unwrap().unwrap();
    assert_eq!(joined.names, ["app.ex.org", "*.x.ex.org"]);
    assert_eq!(joined.ports, [15432]);
    drop(db);
    // As the first version left it.
    let db = rusqlite::Connection::open(&path).unwrap();
    for table in ["device", "invite"] {
        for column in ["names", "ports"] {
            let drop = format!("ALTER TABLE {table} DROP COLUMN {column}");
            db.execute(&drop, []).unwrap();
        }
    }
    db.pragma_update(None, "user_version", 1).unwrap();
    drop(db);
    let found = Sqlite::open(&path).unwrap().devices().unwrap();
    assert_eq!((found.len(), &*found[0].id), (1, "a"));
    assert!(found[0].names.is_empty() && found[0].ports.is_empty());
}

#[test]
fn a_store_of_the_future_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.db");
    drop(Sqlite::open(&path).unwrap());
    let db = rusqlite::Connection::open(&path).unwrap();
    db.pragma_update(None, "user_version", 99).unwrap();
    drop(db);
    let error = Sqlite::open(&path).unwrap_err().to_string();
    assert!(error.contains("newer version"), "{error}");
}

#[tokio::test]
async fn aut_12_a_hundred_tries_of_one_code_at_once() {
    let store = Store::start(Sqlite::in_memory().unwrap()).unwrap();
    store
        .run(|e| e.add_invite(&HASH, &invite(1)))
        .await
        .unwrap();
    let tries: Vec<_> = (0..100)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move {
                let device = new_device(&format!("device{n}"));
                store
                    .run(move |e| e.redeem(&HASH, &device, 10))
                    .await
                    .unwrap()
            })
        })
        .collect();
    let mut let_in = 0;
    for one in tries {
        let_in += usize::from(one.await.unwrap().is_some());
    }
    assert_eq!(let_in, 1);
    assert_eq!(store.run(|e| e.devices()).await.unwrap().len(), 1);
}

const HASH: [u8; 32] = [7; 32];

fn invite(left: u32) -> Invite {
    Invite {
        id: format!("i{left}"),
        account: "alice".into(),
        left,
        created: 1,
        expires: 100,
        device_life: Some(1000),
        class: 3,
        names: vec!["app.ex.org".into(), "*.x.ex.org".into()],
        ports: vec![15432],
    }
}

fn new_device(id: &str) -> NewDevice {
    NewDevice {
        id: id.into(),
        name: "phone".into(),
        public: vec![1; 32],
    }
}

fn revocation(value: &str, until: Option<u64>) -> Revocation {
    Revocation {
        scope: Scope::Jti,
        value: value.into(),
        reason: "lost".into(),
        created: 5,
        until,
    }
}

fn an_invite_is_good_for_its_uses_and_its_time(engine: &mut impl Engine) {
    engine.add_invite(&HASH, &invite(2)).unwrap();
    assert_eq!(engine.invites().unwrap(), [invite(2)]);
    assert!(
        engine
            .redeem(&[8; 32], &new_device("a"), 10)
            .unwrap()
            .is_none()
    );
    assert!(
        engine
            .redeem(&HASH, &new_device("a"), 100)
            .unwrap()
            .is_none(),
        "it has ended"
    );
    let key = engine.redeem(&HASH, &new_device("a"), 10).unwrap().unwrap();
    assert_eq!(
        (key.account.as_str(), key.expires, key.class),
        ("alice", Some(1010), 3)
    );
    assert!(
        engine
            .redeem(&HASH, &new_device("b"), 10)
            .unwrap()
            .is_some()
    );
    assert!(
        engine
            .redeem(&HASH, &new_device("c"), 10)
            .unwrap()
            .is_none(),
        "it is used up"
    );
    assert!(engine.invites().unwrap().is_empty());
    assert!(engine.remove_invite("i2").unwrap());
    assert!(!engine.remove_invite("i2").unwrap());
    engine.add_invite(&[9; 32], &invite(1)).unwrap();
    engine.prune(100).unwrap();
    assert!(engine.invites().unwrap().is_empty());
}

fn asking_again_with_the_same_key_costs_nothing(engine: &mut impl Engine) {
    engine.add_invite(&HASH, &invite(1)).unwrap();
    let key = engine.redeem(&HASH, &new_device("a"), 10).unwrap();
    assert!(key.is_some());
    assert_eq!(engine.redeem(&HASH, &new_device("a"), 11).unwrap(), key);
    assert!(
        engine
            .redeem(&HASH, &new_device("b"), 11)
            .unwrap()
            .is_none()
    );
}

fn a_key_belongs_to_one_account(engine: &mut impl Engine) {
    engine.add_invite(&HASH, &invite(5)).unwrap();
    engine.redeem(&HASH, &new_device("a"), 10).unwrap().unwrap();
    let other = Invite {
        account: "bob".into(),
        id: "other".into(),
        ..invite(5)
    };
    engine.add_invite(&[9; 32], &other).unwrap();
    let taken = engine.redeem(&[9; 32], &new_device("a"), 10);
    assert!(matches!(taken, Err(StoreError::Exists)), "{taken:?}");
    assert_eq!(engine.devices().unwrap()[0].account, "alice");
}

fn devices_come_and_go(engine: &mut impl Engine) {
    engine.add_invite(&HASH, &invite(5)).unwrap();
    let a = engine.redeem(&HASH, &new_device("a"), 10).unwrap().unwrap();
    let b = engine.redeem(&HASH, &new_device("b"), 11).unwrap().unwrap();
    assert_eq!(engine.devices().unwrap(), [b, a.clone()]);
    assert!(engine.remove_device("b").unwrap());
    assert!(!engine.remove_device("b").unwrap());
    assert_eq!(engine.devices().unwrap(), [a]);
}

fn revocations_come_and_go(engine: &mut impl Engine) {
    engine.revoke(&revocation("a", None)).unwrap();
    engine.revoke(&revocation("b", Some(50))).unwrap();
    engine.revoke(&revocation("a", Some(90))).unwrap();
    let all = [revocation("a", Some(90)), revocation("b", Some(50))];
    assert_eq!(engine.revocations().unwrap(), all);
    engine.prune(50).unwrap();
    assert_eq!(engine.revocations().unwrap(), all[..1]);
    assert!(!engine.remove_revocation(Scope::Subject, "a").unwrap());
    assert!(engine.remove_revocation(Scope::Jti, "a").unwrap());
    assert!(engine.revocations().unwrap().is_empty());
}

fn usage(session: u128, account: &str, packets: u64, ended_ms: Option<u64>) -> Usage {
    let mut totals = Totals::default();
    totals.outbound.pass(packets, packets * 100);
    totals.outbound.drop(DropReason::Spoofed, packets / 2);
    totals.inbound.wire = packets * 3;
    totals.inbound.drop(DropReason::Overload, packets);
    Usage {
        session,
        account: account.into(),
        service: "packets".into(),
        started_ms: 1000,
        ended_ms,
        totals,
    }
}

fn int_09_usage_is_idempotent_in_any_order(engine: &mut impl Engine) {
    let all = UsageQuery {
        limit: 100,
        ..UsageQuery::default()
    };
    let records = [
        usage(1, "alice", 2, None),
        usage(1, "alice", 5, None),
        usage(1, "alice", 9, None),
        usage(1, "alice", 9, Some(4000)),
    ];
    // Twice over and in every rotation, forwards and backwards.
    for start in 0..records.len() {
        for n in 0..2 * records.len() {
            let forwards = &records[(start + n) % records.len()];
            engine.put_usage(std::slice::from_ref(forwards)).unwrap();
        }
        let backwards: Vec<_> = records.iter().rev().cloned().collect();
        engine.put_usage(&backwards).unwrap();
        assert_eq!(engine.usage(&all).unwrap(), [records[3].clone()]);
    }
    // The same session's other service is another row.
    let other = Usage {
        service: "streams".into(),
        ..usage(1, "alice", 1, None)
    };
    engine.put_usage(std::slice::from_ref(&other)).unwrap();
    assert_eq!(engine.usage(&all).unwrap().len(), 2);
}

fn usage_adds_up_by_account(engine: &mut impl Engine) {
    let rows = [
        usage(1, "alice", 10, Some(2000)),
        usage(2, "alice", 20, None),
        usage(3, "bob", 40, Some(5000)),
    ];
    engine.put_usage(&rows).unwrap();
    let query = |account: Option<&str>, since_ms| UsageQuery {
        account: account.map(str::to_owned),
        since_ms,
        limit: 100,
    };
    let all = engine.usage_by_account(&query(None, None)).unwrap();
    assert_eq!(all.len(), 2);
    let alice = &all[0];
    assert_eq!((alice.account.as_str(), alice.sessions), ("alice", 2));
    assert_eq!(
        alice.outbound,
        Flow {
            packets: 30,
            payload: 3000,
            wire: 0,
            dropped: 15
        }
    );
    assert_eq!(
        alice.inbound,
        Flow {
            packets: 0,
            payload: 0,
            wire: 90,
            dropped: 30
        }
    );
    // What ended before does not count, what runs does.
    let late = engine.usage_by_account(&query(None, Some(3000))).unwrap();
    assert_eq!(late.iter().map(|a| a.sessions).collect::<Vec<_>>(), [1, 1]);
    assert_eq!(engine.usage(&query(Some("bob"), None)).unwrap(), rows[2..]);
    let limited = UsageQuery {
        limit: 1,
        ..UsageQuery::default()
    };
    assert_eq!(engine.usage(&limited).unwrap().len(), 1);
}
