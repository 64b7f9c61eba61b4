//! The few TLS alerts that are sent without a TLS library.

/// Why a greeting is refused, as RFC 8446 numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Alert {
    /// A message that does not belong here.
    UnexpectedMessage,
    /// A field that contradicts another.
    IllegalParameter,
    /// Lengths that do not fit, or bytes that mean nothing.
    Decode,
    /// Only versions that are no longer safe.
    ProtocolVersion,
    /// Nobody here can serve it now.
    InternalError,
    /// A name that is none.
    UnrecognizedName,
}

impl Alert {
    /// Its number.
    pub fn code(self) -> u8 {
        match self {
            Alert::UnexpectedMessage => 10,
            Alert::IllegalParameter => 47,
            Alert::Decode => 50,
            Alert::ProtocolVersion => 70,
            Alert::InternalError => 80,
            Alert::UnrecognizedName => 112,
        }
    }

    /// As a record that every version of TLS reads, and that ends the connection.
    pub fn record(self) -> [u8; 7] {
        [21, 3, 1, 0, 2, 2, self.code()]
    }
}
