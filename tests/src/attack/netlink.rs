//! Netlink messages taken apart. Written from the kernel's headers, not shared
//! with what it judges.

/// One message of a buffer.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    pub kind: u16,
    pub flags: u16,
    pub body: &'a [u8],
}

/// Takes a buffer apart to its last byte; `None` when it does not come out even.
pub fn messages(mut data: &[u8]) -> Option<Vec<Message<'_>>> {
    let mut all = Vec::new();
    while !data.is_empty() {
        let length = number32(data, 0)? as usize;
        all.push(Message {
            kind: number16(data, 4)?,
            flags: number16(data, 6)?,
            body: data.get(16..length)?,
        });
        data = data.get(length.next_multiple_of(4)..)?;
    }
    Some(all)
}

impl<'a> Message<'a> {
    /// The attributes behind a fixed part of this length.
    pub fn attributes(&self, fixed: usize) -> Option<Vec<(u16, &'a [u8])>> {
        attributes(self.body.get(fixed.next_multiple_of(4)..)?)
    }
}

/// A list of attributes, to its last byte; flags of the kind are left out.
pub fn attributes(mut data: &[u8]) -> Option<Vec<(u16, &[u8])>> {
    let mut all = Vec::new();
    while !data.is_empty() {
        let length = usize::from(number16(data, 0)?);
        all.push((number16(data, 2)? & 0x3fff, data.get(4..length)?));
        data = data.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(all)
}

/// The first attribute of this kind.
pub fn value<'a>(all: &[(u16, &'a [u8])], kind: u16) -> Option<&'a [u8]> {
    all.iter().find(|(k, _)| *k == kind).map(|(_, v)| *v)
}

/// Text up to its zero.
pub fn text(value: &[u8]) -> String {
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

pub fn number16(data: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(data.get(at..at + 2)?.try_into().ok()?))
}

pub fn number32(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(data.get(at..at + 4)?.try_into().ok()?))
}
