//! Options and the handshake of a stream.

use std::io;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::wire::{HELLO_BYTES, Hello, MAGIC};

/// What a stream within this host has sent and not delivered; the kernel takes it twice, for its own.
pub const HOST_BUFFER_BYTES: usize = 128 << 10;
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

/// Shortens the send buffer of a stream that does not leave this host. The kernel lets megabytes lie in it there, which leave
/// the cache before they are read: a quarter of the speed. Over a network it sizes buffers by what the link holds.
pub(super) fn shorten(stream: &TcpStream) {
    let is_here = matches!((stream.local_addr(), stream.peer_addr()), (Ok(own), Ok(peer)) if own.ip() == peer.ip());
    if is_here && let Err(error) = sockopt::set_socket_send_buffer_size(stream, HOST_BUFFER_BYTES) {
        tracing::debug!(%error, "a stream keeps its send buffer");
    }
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
    async fn streams_within_a_host_have_short_send_buffers() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        shorten(&stream);
        assert!(sockopt::socket_send_buffer_size(&stream).unwrap() <= 2 * HOST_BUFFER_BYTES);
    }
}
