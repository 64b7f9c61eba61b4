//! The authority's key, and what it signs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, PKCS_ECDSA_P256_SHA256,
    PublicKeyData, SerialNumber, SignatureAlgorithm, date_time_ymd,
};

pub(super) struct Issuer {
    signer: rcgen::Issuer<'static, KeyPair>,
    pem: String,
    serial: AtomicU64,
}

/// The public key of a request, as it stood there.
struct Wanted(Vec<u8>);

impl PublicKeyData for Wanted {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

impl Issuer {
    pub(super) fn new() -> Issuer {
        let key = KeyPair::generate().expect("a key");
        let mut own = CertificateParams::new(Vec::new()).expect("no names");
        own.distinguished_name
            .push(DnType::CommonName, format!("authority {}", key_name(&key)));
        own.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let made = own.self_signed(&key).expect("a certificate");
        Issuer {
            pem: made.pem(),
            signer: rcgen::Issuer::new(own, key),
            serial: AtomicU64::new(1),
        }
    }

    pub(super) fn pem(&self) -> &str {
        &self.pem
    }

    /// Certificate and key of the authority's own server.
    pub(super) fn own(&self) -> (Vec<u8>, Vec<u8>) {
        let key = KeyPair::generate().expect("a key");
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let params = CertificateParams::new(names).expect("names");
        let made = params.signed_by(&key, &self.signer).expect("a certificate");
        (made.der().to_vec(), key.serialize_der())
    }

    /// Signs a request for exactly this name. `None` if it is for another, or
    /// is not signed with the key it is for.
    pub(super) fn sign(&self, request: &[u8], name: &str, life: Duration) -> Option<String> {
        let key = public_key(request, name)?;
        let mut params = CertificateParams::new(vec![name.to_owned()]).ok()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        let begins = date_time_ymd(1970, 1, 1) + Duration::from_secs(now.as_secs());
        params.not_before = begins;
        params.not_after = begins + life;
        let serial = self.serial.fetch_add(1, Ordering::SeqCst);
        params.serial_number = Some(SerialNumber::from(serial));
        let made = params.signed_by(&Wanted(key), &self.signer).ok()?;
        Some(format!("{}{}", made.pem(), self.pem))
    }
}

/// No two have the same name: they would be told apart by their keys only.
fn key_name(key: &KeyPair) -> String {
    let bytes = key.der_bytes().iter().skip(1).take(8);
    bytes.map(|b| format!("{b:02x}")).collect()
}

/// Tag, content, the element as a whole, and what follows.
type Element<'a> = (u8, &'a [u8], &'a [u8], &'a [u8]);

fn element(bytes: &[u8]) -> Option<Element<'_>> {
    let (&[tag, first], rest) = bytes.split_first_chunk::<2>()?;
    let (len, head) = match first {
        0..=0x7f => (usize::from(first), 2),
        0x81 => (usize::from(*rest.first()?), 3),
        0x82 => {
            let two = rest.get(..2)?;
            (usize::from(two[0]) << 8 | usize::from(two[1]), 4)
        }
        _ => return None,
    };
    let (whole, rest) = bytes.split_at_checked(head + len)?;
    Some((tag, &whole[head..], whole, rest))
}

/// The key of a certification request (RFC 2986) that proves it holds the
/// private half and asks for this name alone.
fn public_key(request: &[u8], name: &str) -> Option<Vec<u8>> {
    let (_, request, _, end) = element(request)?;
    let (_, info, signed, rest) = element(request)?;
    let (_, _, _, rest) = element(rest)?;
    let (_, signature, _, _) = element(rest)?;
    let (_, _, _, info) = element(info)?;
    let (_, _, _, info) = element(info)?;
    let (_, spki, _, attributes) = element(info)?;
    let (_, _, _, key) = element(spki)?;
    let (tag, key, _, _) = element(key)?;
    // Bit strings begin with the number of bits that do not count.
    let (key, signature) = (key.strip_prefix(&[0])?, signature.strip_prefix(&[0])?);
    let proved = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key).verify(signed, signature);
    let mut names = Vec::new();
    find_names(attributes, &mut names);
    let fits = end.is_empty() && tag == 0x03 && proved.is_ok() && names == [name.as_bytes()];
    fits.then(|| key.to_vec())
}

/// The key of a certificate, with its algorithm.
pub(super) fn public_key_info(certificate: &[u8]) -> Option<&[u8]> {
    let (_, certificate, _, _) = element(certificate)?;
    let (_, mut fields, _, _) = element(certificate)?;
    // Version, serial number, algorithm, issuer, validity, subject.
    for _ in 0..6 {
        fields = element(fields)?.3;
    }
    element(fields).map(|(_, _, whole, _)| whole)
}

/// All DNS names below; nothing else in a request has their tag.
fn find_names<'a>(mut bytes: &'a [u8], found: &mut Vec<&'a [u8]>) {
    while let Some((tag, content, _, rest)) = element(bytes) {
        match tag {
            0x82 => found.push(content),
            // Sequences, sets, the attributes, and octet strings with values in them.
            0x30 | 0x31 | 0xa0 | 0x04 => find_names(content, found),
            _ => {}
        }
        bytes = rest;
    }
}
