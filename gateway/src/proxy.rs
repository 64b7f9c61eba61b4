//! PROXY protocol, version 2: on whose behalf a proxy connects.
//!
//! It is read only from sources that the configuration names, and there it is
//! required: a header that may or may not be there could be forged by whoever
//! the proxy connects for.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt};

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Addresses and whatever else a proxy adds to them.
const MAX_LEN: usize = 1024;

/// Why a header was not one.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// The connection ended or failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Something else was there.
    #[error("no PROXY v2 header, which this source must send")]
    Missing,
    /// Not as the protocol says.
    #[error("malformed PROXY v2 header")]
    Malformed,
}

/// Reads the header and nothing behind it. `None` when the proxy speaks for
/// itself, or for somebody without an Internet address.
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<SocketAddr>, ProxyError> {
    let mut head = [0; 16];
    stream.read_exact(&mut head).await?;
    let (signature, rest) = head.split_at(12);
    if signature != SIGNATURE {
        return Err(ProxyError::Missing);
    }
    let [command, family, high, low] = *rest else {
        return Err(ProxyError::Malformed);
    };
    let len = usize::from(u16::from_be_bytes([high, low]));
    if len > MAX_LEN {
        return Err(ProxyError::Malformed);
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body).await?;
    match command {
        0x20 => Ok(None),
        0x21 => source(family, &body),
        _ => Err(ProxyError::Malformed),
    }
}

fn source(family: u8, body: &[u8]) -> Result<Option<SocketAddr>, ProxyError> {
    match family {
        // TCP over IPv4: source, destination, source port, destination port.
        0x11 => {
            let (&address, _) = body.split_first_chunk::<4>().ok_or(ProxyError::Malformed)?;
            let port = port(body, 8)?;
            Ok(Some((IpAddr::V4(Ipv4Addr::from(address)), port).into()))
        }
        0x21 => {
            let (&address, _) = body
                .split_first_chunk::<16>()
                .ok_or(ProxyError::Malformed)?;
            let address = IpAddr::V6(Ipv6Addr::from(address)).to_canonical();
            Ok(Some((address, port(body, 32)?).into()))
        }
        // Unix sockets and the unspecified.
        0x00 | 0x31 => Ok(None),
        _ => Err(ProxyError::Malformed),
    }
}

fn port(body: &[u8], at: usize) -> Result<u16, ProxyError> {
    // The destination port stands behind it and must be there too.
    match body.get(at..at + 4) {
        Some(&[high, low, _, _]) => Ok(u16::from_be_bytes([high, low])),
        _ => Err(ProxyError::Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = SIGNATURE.to_vec();
        bytes.extend([command, family]);
        bytes.extend(u16::try_from(body.len()).unwrap().to_be_bytes());
        bytes.extend(body);
        bytes
    }

    async fn parse(bytes: &[u8]) -> Result<(Option<SocketAddr>, usize), ProxyError> {
        let mut rest = bytes;
        let found = read(&mut rest).await?;
        Ok((found, rest.len()))
    }

    const V4: [u8; 12] = [192, 0, 2, 7, 198, 51, 100, 1, 0x30, 0x39, 1, 0xbb];

    #[tokio::test]
    async fn the_source_is_found_and_what_follows_is_left() {
        let mut bytes = header(0x21, 0x11, &V4);
        bytes.extend(b"GET / HTTP/1.1");
        let expected = "192.0.2.7:12345".parse().unwrap();
        assert_eq!(parse(&bytes).await.unwrap(), (Some(expected), 14));

        let mut v6 = [0; 36];
        v6[..2].copy_from_slice(&[0x20, 0x01]);
        v6[15] = 9;
        v6[33] = 80;
        let mut with_extras = v6.to_vec();
        with_extras.extend([4, 0, 1, 0]);
        let found = parse(&header(0x21, 0x21, &with_extras)).await.unwrap();
        assert_eq!(found, (Some("[2001::9]:80".parse().unwrap()), 0));
    }

    #[tokio::test]
    async fn a_health_check_of_the_proxy_itself_has_no_other_source() {
        assert_eq!(parse(&header(0x20, 0, &[])).await.unwrap().0, None);
        assert_eq!(parse(&header(0x21, 0x31, &[0; 216])).await.unwrap().0, None);
    }

    #[tokio::test]
    async fn anything_else_is_refused() {
        let good = header(0x21, 0x11, &V4);
        for cut in 0..good.len() {
            assert!(parse(&good[..cut]).await.is_err(), "{cut} bytes");
        }
        let first = parse(b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n").await;
        assert!(matches!(first, Err(ProxyError::Missing)));
        for wrong in [
            header(0x11, 0x11, &V4),
            header(0x22, 0x11, &V4),
            header(0x21, 0x12, &V4),
            header(0x21, 0x11, &V4[..11]),
            header(0x21, 0x11, &[]),
            header(0x21, 0x21, &V4),
            header(0x21, 0x11, &[0; MAX_LEN + 1]),
        ] {
            assert!(matches!(parse(&wrong).await, Err(ProxyError::Malformed)));
        }
    }
}
