//! What the tests of the helper's boundary have in common.

use rvpn_ipc::{Client, ClientError, Key, Kind, Status};

use crate::topology::many_uids;
use crate::{Helper, Lab, Tunnel, wait_until};

/// A laboratory with a helper that serves.
pub fn setup(config: &str) -> (Lab, Helper) {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, config);
    (lab, helper)
}

/// For cases that only another user shows.
#[track_caller]
pub fn two_users() {
    assert!(
        many_uids(),
        "this case needs two users: run it as root (sudo ./dev-bin/test)"
    );
}

/// Waits until nobody holds a slot.
#[track_caller]
pub fn all_free(client: &mut Client) {
    wait_until("every slot is free", || {
        let d = client.describe().expect("describe");
        d.free == d.slots
    });
}

/// Acquires as soon as there is a free slot.
pub fn when_free(client: &mut Client, key: u8) -> Tunnel {
    let key = Key([key; 16]);
    let mut got = None;
    wait_until("a slot is free", || {
        match client.acquire(key, Kind::Both, 0) {
            Ok(lease) => {
                got = Some(Tunnel::new(key, lease));
                true
            }
            Err(ClientError::Refused(r)) => {
                assert_eq!(r.status, Status::NoCapacity);
                false
            }
            Err(e) => panic!("{e}"),
        }
    });
    got.expect("a lease")
}
