//! Long transfers, with a hash at both ends.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use aws_lc_rs::digest::{Context, SHA256};

use crate::ns::Ns;
use crate::topology::at;

const CHUNK: usize = 256 * 1024;
/// A transfer that stands still this long has failed.
const STALLED: Duration = Duration::from_secs(30);

/// What was sent or received: bytes and their hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sum {
    pub bytes: u64,
    pub sha256: Vec<u8>,
}

/// How far a transfer is, for whoever watches it.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<AtomicU64>);

impl Progress {
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Sends so many bytes that never repeat, and ends the stream.
pub fn send(mut to: impl Write, bytes: u64, progress: &Progress) -> io::Result<Sum> {
    let mut hash = Context::new(&SHA256);
    let mut chunk = vec![0; CHUNK];
    let (mut state, mut sent) = (bytes | 1, 0);
    while sent < bytes {
        for word in chunk.as_chunks_mut::<8>().0 {
            // Fast, and different from each other is all they need to be.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            *word = (state ^ (state >> 29)).to_ne_bytes();
        }
        let part = chunk
            .len()
            .min(usize::try_from(bytes - sent).unwrap_or(CHUNK));
        to.write_all(&chunk[..part])?;
        hash.update(&chunk[..part]);
        sent += part as u64;
        progress.0.store(sent, Ordering::Relaxed);
    }
    to.flush()?;
    Ok(Sum {
        bytes: sent,
        sha256: hash.finish().as_ref().to_vec(),
    })
}

/// Reads to the end.
pub fn receive(mut from: impl Read, progress: &Progress) -> io::Result<Sum> {
    let mut hash = Context::new(&SHA256);
    let mut chunk = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        let n = from.read(&mut chunk)?;
        if n == 0 {
            break;
        }
        hash.update(&chunk[..n]);
        bytes += n as u64;
        progress.0.store(bytes, Ordering::Relaxed);
    }
    Ok(Sum {
        bytes,
        sha256: hash.finish().as_ref().to_vec(),
    })
}

/// Which end sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Upload,
    Download,
}

/// A transfer under way, one thread at each end.
pub struct Transfer {
    here: JoinHandle<io::Result<Sum>>,
    there: JoinHandle<io::Result<Sum>>,
    pub progress: Progress,
}

/// Starts one between a client and a server's address.
pub fn start(client: &Ns, server: &Ns, address: &str, port: u16, way: Way, bytes: u64) -> Transfer {
    let progress = Progress::default();
    let listener = server.tcp(&at(address, port));
    let seen = progress.clone();
    let there = std::thread::spawn(move || {
        let (stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(STALLED))?;
        stream.set_write_timeout(Some(STALLED))?;
        match way {
            Way::Upload => receive(stream, &Progress::default()),
            Way::Download => send(stream, bytes, &Progress::default()),
        }
    });
    let to = at(address, port);
    let stream = client.run(|| TcpStream::connect(&to).unwrap_or_else(|e| panic!("{to}: {e}")));
    let here = std::thread::spawn(move || {
        stream.set_read_timeout(Some(STALLED))?;
        stream.set_write_timeout(Some(STALLED))?;
        match way {
            Way::Upload => send(stream, bytes, &seen),
            Way::Download => receive(stream, &seen),
        }
    });
    Transfer {
        here,
        there,
        progress,
    }
}

impl Transfer {
    /// Waits for the end; both ends must have the same bytes, and all of them.
    #[track_caller]
    pub fn whole(self, bytes: u64) {
        let here = self
            .here
            .join()
            .expect("client's end")
            .expect("client's end");
        let there = self
            .there
            .join()
            .expect("server's end")
            .expect("server's end");
        assert_eq!(here.bytes, bytes);
        assert_eq!(here, there);
    }
}

/// How much to send: a little, or what the environment says, as `dev-bin/soak` does.
pub fn size() -> u64 {
    let asked = std::env::var("RVPN_FILE_BYTES").ok();
    asked.map_or(48 * 1024 * 1024, |n| {
        n.parse().expect("RVPN_FILE_BYTES is a number of bytes")
    })
}
