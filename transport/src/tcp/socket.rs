//! Options and the handshake of a stream.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::raw::round_trip;
use super::wire::{HELLO_BYTES, Hello, MAGIC};

/// A peer is near when an acknowledgement takes less: a stream with [`NEAR_BUFFER_BYTES`] still moves over 1 GB a second.
const NEAR: Duration = Duration::from_micros(100);
/// What a stream to a near peer has sent and not acknowledged, and about to be sent; the kernel takes it twice, for its own.
const NEAR_BUFFER_BYTES: usize = 128 << 10;
/// Keepalive probes unanswered before an idle link counts as cut.
const KEEPALIVE_PROBES: u32 = 3;

/// Sets what every stream has: no delay of small writes, and an error once the peer was silent for `silence`.
pub(super) fn prepare(stream: &TcpStream, silence: Duration) -> io::Result<()> {
    let seconds = silence.as_secs().max(2);
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(seconds.div_ceil(2)))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(seconds.div_ceil(6)))?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    let silence_ms = u32::try_from(silence.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(stream, silence_ms)?;
    Ok(())
}

/// Shortens a stream's send buffer where its peer is near. What lies there for long leaves the cache before it is sent, and a
/// kernel that grows buffers by itself lets megabytes lie there, which costs a third of the speed on loopback; a peer that is
/// further away needs them to fill its link.
pub(super) fn shorten(stream: &TcpStream) -> io::Result<()> {
    if round_trip(stream.as_fd()).is_some_and(|took| took < NEAR) {
        sockopt::set_socket_send_buffer_size(stream, NEAR_BUFFER_BYTES)?;
    }
    Ok(())
}

pub(super) async fn send_hello(stream: &mut TcpStream, hello: Hello) -> io::Result<()> {
    stream.write_all(&hello.encode()).await
}

/// The peer's hello; `InvalidData` as soon as it shows to be none.
pub(super) async fn receive_hello(stream: &mut TcpStream) -> io::Result<Hello> {
    let garbage = || io::Error::new(io::ErrorKind::InvalidData, "the peer speaks another protocol");
    let mut bytes = [0; HELLO_BYTES];
    let (magic, rest) = bytes.split_at_mut(MAGIC.len());
    stream.read_exact(magic).await?;
    if magic != MAGIC {
        return Err(garbage());
    }
    stream.read_exact(rest).await?;
    Hello::decode(&bytes).ok_or_else(garbage)
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn streams_to_near_peers_have_short_send_buffers() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let took = round_trip(stream.as_fd()).expect("the kernel knows it from the handshake");
        let before = sockopt::socket_send_buffer_size(&stream).unwrap();
        shorten(&stream).unwrap();
        let after = sockopt::socket_send_buffer_size(&stream).unwrap();
        eprintln!("{took:?} {before} {after}");
        // The handshake can take long on a machine that has much else to do.
        assert_eq!(after, if took < NEAR { 2 * NEAR_BUFFER_BYTES } else { before });
    }
}
