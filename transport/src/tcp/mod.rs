//! Our own framing over TCP: several streams a link, bytes straight from and into frames.
