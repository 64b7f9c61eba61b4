//! When a certificate begins and ends: the two moments in its DER.

/// Seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Validity {
    /// From here on.
    pub(super) begins: u64,
    /// Until here.
    pub(super) ends: u64,
}

impl Validity {
    /// How long it is.
    pub(super) fn days(self) -> u64 {
        (self.ends - self.begins) / 86_400
    }
}

const SEQUENCE: u8 = 0x30;
const EXPLICIT_0: u8 = 0xa0;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;

/// Reads it out of a certificate; `None` if it is none.
pub(super) fn of(certificate: &[u8]) -> Option<Validity> {
    let (_, certificate, _) = element(certificate, Some(SEQUENCE))?;
    let (_, mut fields, _) = element(certificate, Some(SEQUENCE))?;
    let (tag, _, rest) = element(fields, None)?;
    // The version is left out by certificates of the first kind.
    if tag == EXPLICIT_0 {
        fields = rest;
    }
    // Serial number, algorithm, issuer.
    for _ in 0..3 {
        fields = element(fields, None)?.2;
    }
    let (_, both, _) = element(fields, Some(SEQUENCE))?;
    let (kind, begins, rest) = element(both, None)?;
    let begins = moment(kind, begins)?;
    let (kind, ends, _) = element(rest, None)?;
    let ends = moment(kind, ends)?;
    (begins < ends).then_some(Validity { begins, ends })
}

/// Tag, content, and what follows.
fn element(bytes: &[u8], wanted: Option<u8>) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (len, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x83 => {
            let (len, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (len.iter().fold(0, |n, b| n << 8 | usize::from(*b)), rest)
        }
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(len)?;
    (wanted.is_none_or(|w| w == tag)).then_some((tag, content, rest))
}

fn moment(kind: u8, text: &[u8]) -> Option<u64> {
    let (year, rest) = match kind {
        UTC_TIME => {
            let (two, rest) = text.split_at_checked(2)?;
            let two = number(two)?;
            (if two < 50 { 2000 + two } else { 1900 + two }, rest)
        }
        GENERALIZED_TIME => {
            let (four, rest) = text.split_at_checked(4)?;
            (number(four)?, rest)
        }
        _ => return None,
    };
    let rest = rest.strip_suffix(b"Z")?;
    if rest.len() != 10 {
        return None;
    }
    let mut parts = rest.chunks(2).map(number);
    let mut part = |low: u64, high: u64| parts.next()?.filter(|n| (low..=high).contains(n));
    let (month, day) = (part(1, 12)?, part(1, 31)?);
    let (hour, minute, second) = (part(0, 23)?, part(0, 59)?, part(0, 60)?);
    let days = days(year, month, day)?;
    Some(((days * 24 + hour) * 60 + minute) * 60 + second)
}

fn number(digits: &[u8]) -> Option<u64> {
    let all = digits.iter().all(u8::is_ascii_digit);
    all.then(|| digits.iter().fold(0, |n, d| n * 10 + u64::from(d - b'0')))
}

/// Days since 1970 of a date of the Gregorian calendar.
fn days(year: u64, month: u64, day: u64) -> Option<u64> {
    let before = year.checked_sub(1)?;
    let leaps = |y: u64| y / 4 - y / 100 + y / 400;
    let leap = leaps(year) != leaps(before);
    let in_year = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
    let at = usize::try_from(month - 1).ok()?;
    let of_month = in_year.get(at)? + u64::from(leap && month > 2);
    (before * 365 + leaps(before) + of_month + day - 1).checked_sub(719_162)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    fn certificate(from: (i32, u8, u8), to: (i32, u8, u8)) -> Vec<u8> {
        let mut params = CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
        params.not_before = date_time_ymd(from.0, from.1, from.2);
        params.not_after = date_time_ymd(to.0, to.1, to.2);
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn both_kinds_of_time_are_read() {
        for (from, to) in [
            ((1970, 1, 2), (2049, 12, 31)),
            ((2000, 2, 29), (2050, 1, 1)),
            ((2024, 3, 1), (2100, 3, 1)),
            ((2026, 11, 21), (4096, 1, 1)),
        ] {
            let expected = |(y, m, d)| date_time_ymd(y, m, d).unix_timestamp();
            let found = of(&certificate(from, to)).unwrap();
            assert_eq!(found.begins, u64::try_from(expected(from)).unwrap());
            assert_eq!(found.ends, u64::try_from(expected(to)).unwrap());
        }
    }

    #[test]
    fn whatever_is_cut_or_changed_is_read_or_refused() {
        let whole = certificate((2026, 1, 1), (2027, 1, 1));
        for cut in 0..whole.len() {
            // Most of a certificate is behind the moments.
            let _ = of(&whole[..cut]);
        }
        assert_eq!(of(&whole[..40]), None);
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut other = whole.clone();
                other[at] ^= 1 << bit;
                let _ = of(&other);
            }
        }
        assert_eq!(of(b""), None);
        assert_eq!(of(&[0x30, 0x84, 0xff, 0xff, 0xff, 0xff]), None);
    }
}
