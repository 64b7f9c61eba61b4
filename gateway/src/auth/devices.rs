//! Registered devices, in memory.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::signature::{ED25519, ParsedPublicKey};
use jsonwebtoken::DecodingKey;

use super::rights::Rights;
use crate::store::DeviceKey;

/// A device whose key is ready for use.
pub struct Device {
    /// What is stored about it.
    pub stored: DeviceKey,
    /// Its public key.
    pub key: DecodingKey,
    /// What it may serve.
    pub rights: Rights,
}

/// All of them, by id.
#[derive(Default)]
pub struct Devices {
    by_id: RwLock<HashMap<String, Arc<Device>>>,
}

impl Devices {
    /// Takes what the store has.
    pub fn new(stored: Vec<DeviceKey>) -> Devices {
        let devices = Devices::default();
        for one in stored {
            devices.add(one);
        }
        devices
    }

    /// The device of this id.
    pub fn find(&self, id: &str) -> Option<Arc<Device>> {
        let by_id = self.by_id.read().unwrap_or_else(PoisonError::into_inner);
        by_id.get(id).cloned()
    }

    /// Whether there is one.
    pub fn knows(&self, id: &str) -> bool {
        let by_id = self.by_id.read().unwrap_or_else(PoisonError::into_inner);
        by_id.contains_key(id)
    }

    /// Adds one.
    pub fn add(&self, stored: DeviceKey) {
        let key = DecodingKey::from_ed_der(&stored.public);
        let rights = Rights::stored(&stored.names, &stored.ports);
        let id = stored.id.clone();
        let device = Device {
            stored,
            key,
            rights,
        };
        let mut by_id = self.by_id.write().unwrap_or_else(PoisonError::into_inner);
        by_id.insert(id, Arc::new(device));
    }

    /// Forgets one.
    pub fn remove(&self, id: &str) {
        let mut by_id = self.by_id.write().unwrap_or_else(PoisonError::into_inner);
        by_id.remove(id);
    }
}

/// The id of a device with this key; `None` if it is not an Ed25519 key. Made
/// of the key, so that nobody can register an id that belongs to another key.
pub fn id_of(public: &[u8]) -> Option<String> {
    ParsedPublicKey::new(&ED25519, public).ok()?;
    let hash = digest(&SHA256, public);
    let short = hash.as_ref().first_chunk::<15>()?;
    Some(format!("d.{}", super::base64::to_url(short)))
}
