//! Greetings of TLS, written by hand so that they can be wrong.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

/// A greeting to be.
#[derive(Clone)]
pub(crate) struct Greeting {
    pub(crate) version: u16,
    pub(crate) suites: Vec<u16>,
    pub(crate) extensions: Vec<(u16, Vec<u8>)>,
}

pub(crate) fn list16(content: &[u8]) -> Vec<u8> {
    let mut bytes = u16::try_from(content.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend(content);
    bytes
}

pub(crate) fn list8(content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![u8::try_from(content.len()).unwrap()];
    bytes.extend(content);
    bytes
}

/// The content of a server name extension with these entries.
pub(crate) fn names(entries: &[&[u8]]) -> Vec<u8> {
    let mut list = Vec::new();
    for entry in entries {
        list.push(0);
        list.extend(list16(entry));
    }
    list16(&list)
}

pub(crate) fn protocols(names: &[&[u8]]) -> Vec<u8> {
    list16(&names.iter().flat_map(|n| list8(n)).collect::<Vec<_>>())
}

impl Greeting {
    /// As a client of today would send it, without a name.
    pub(crate) fn new() -> Greeting {
        Greeting {
            version: 0x0303,
            suites: vec![0x1301, 0xc02b],
            extensions: vec![(43, vec![4, 3, 4, 3, 3])],
        }
    }

    pub(crate) fn of(name: &[u8]) -> Greeting {
        Greeting::new().with(0, names(&[name]))
    }

    pub(crate) fn with(mut self, kind: u16, content: Vec<u8>) -> Greeting {
        self.extensions.push((kind, content));
        self
    }

    pub(crate) fn without(mut self, kind: u16) -> Greeting {
        self.extensions.retain(|(k, _)| *k != kind);
        self
    }

    /// Made so long by padding.
    pub(crate) fn long(self, message: usize) -> Greeting {
        let now = self.message().len();
        self.with(21, vec![0; message - now - 4])
    }

    pub(crate) fn message(&self) -> Vec<u8> {
        let mut body = self.version.to_be_bytes().to_vec();
        body.extend([7; 32]);
        body.extend(list8(&[9; 32]));
        let suites = self.suites.iter().flat_map(|s| s.to_be_bytes());
        body.extend(list16(&suites.collect::<Vec<_>>()));
        body.extend(list8(&[0]));
        let mut all = Vec::new();
        for (kind, content) in &self.extensions {
            all.extend(kind.to_be_bytes());
            all.extend(list16(content));
        }
        body.extend(list16(&all));
        let mut message = vec![1];
        message.extend(&u32::try_from(body.len()).unwrap().to_be_bytes()[1..]);
        message.extend(body);
        message
    }

    /// In one record.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        records(&self.message(), usize::MAX)
    }
}

/// A message in records of at most so many bytes.
pub(crate) fn records(message: &[u8], most: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in message.chunks(most.min(16384)) {
        bytes.extend([22, 3, 1]);
        bytes.extend(list16(part));
    }
    bytes
}
