//! How much of the proxy one request, one connection or all clients together may take.

use std::time::Duration;

/// Bounds for clients, in force from the next connection on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest head of a request, in bytes.
    pub head_size: u32,
    /// Longest wait for the head of a request at a listener, idling included. In a tunnel, whose client was let in, it has
    /// as long as a connection may idle there (`proxy/resting.rs`).
    pub head_time: Duration,
    /// Longest time for a client's TLS handshake.
    pub handshake_time: Duration,
    /// Client connections at one time. While there are as many, none is accepted.
    pub connections: usize,
    /// Of these, the ones whose client needs a pass and has not shown one yet. Whoever comes then takes the place of the
    /// one that has waited longest.
    pub strangers: usize,
    /// Streams that one HTTP/2 connection of a client may have open.
    pub streams: u32,
    /// What a client may send on a stream before the upstream has taken it, in bytes.
    pub stream_window: u32,
    /// Responses before the final one that an upstream may send.
    pub interim_responses: u32,
    /// Passes that do not count which one address or user may show in [`WRONG_PASSES_IN`].
    pub wrong_passes: u32,
}

impl Limits {
    /// The usual ones, on a machine that sets none.
    pub const USUAL: Self = Self {
        head_size: HEAD_SIZE,
        head_time: HEAD_TIME,
        handshake_time: HANDSHAKE_TIME,
        connections: MOST_CONNECTIONS,
        strangers: MOST_STRANGERS,
        streams: STREAMS,
        stream_window: STREAM_WINDOW,
        interim_responses: INTERIM_RESPONSES,
        wrong_passes: WRONG_PASSES,
    };

    /// The same for a process that may still open so many descriptors.
    #[must_use]
    pub fn within(self, descriptors: u64) -> Self {
        let pairs = descriptors.saturating_sub(RESERVED_DESCRIPTORS) / DESCRIPTORS_OF_A_CLIENT;
        let pairs = usize::try_from(pairs).unwrap_or(usize::MAX);
        // With none there would be no word from it at all.
        let room = (pairs - pipes_of(pairs)).max(1);
        let connections = self.connections.min(room);
        let strangers = self.strangers.min((connections / SHARE_OF_STRANGERS).max(1));
        Self { connections, strangers, ..self }
    }

    /// Most pipes at one time through which the kernel moves what comes in bulk (`proxy/tunnel/pipe.rs`). A pipe has two
    /// descriptors, too.
    pub fn pipes(&self) -> usize {
        pipes_of(self.connections)
    }
}

fn pipes_of(clients: usize) -> usize {
    (clients / CLIENTS_OF_A_PIPE).min(MOST_PIPES)
}

impl Default for Limits {
    fn default() -> Self {
        Self::USUAL
    }
}

/// A token of 16 KiB and the metadata that Codex sends, with room to spare; answers have as much. Over HTTP/2 up to a quarter more in CONTINUATION
/// frames is read before h2 ends the connection with ENHANCE_YOUR_CALM (h2 0.4.20, `codec/framed_read.rs`), which
/// bounds a CONTINUATION flood (CERT VU#421644).
pub const HEAD_SIZE: u32 = 64 * 1024;

/// Envoy's guide for proxies at the edge has as much; real clients send a head in one piece, and CONNECT at once.
const HEAD_TIME: Duration = Duration::from_secs(10);

/// A handshake is two round trips and some milliseconds of arithmetic, on a slow machine a second.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);

/// As many as the descriptors allow: see [`Limits::within`].
const MOST_CONNECTIONS: usize = usize::MAX;

/// Real holders of a pass show it with the first packet, so that few of them wait at one time.
const MOST_STRANGERS: usize = 1024;

/// Common clients (hyper, Go) keep to one connection per host and queue what is above it, so that it is more than a tool
/// with many agents needs. It bounds what such a connection can make us hold, which is 80 MiB: a stream's window and
/// the buffers for sending on both sides. What upstreams may send ahead has its own bound.
const STREAMS: u32 = 256;

/// RFC 9113's own default: the way is short, so that more would not be faster.
const STREAM_WINDOW: u32 = 64 * 1024;

/// A 100, some 103, and a 102 now and then while the upstream works. One that sends more would hold a client for ever,
/// and neither hyper nor h2 has a limit of its own.
pub const INTERIM_RESPONSES: u32 = 16;

/// What of a body waits beside the socket's buffer for the window of an HTTP/2 peer, client or upstream.
pub const HTTP2_SEND_BUFFER: usize = 128 * 1024;

/// Largest HTTP/2 frame: the least that RFC 9113 section 4.2 allows to ask for. A larger one is held whole
/// before any of it can be passed on.
pub const HTTP2_FRAME: u32 = 16 * 1024;

/// How many streams a peer may make us reset by breaking the protocol on them, before the HTTP/2 connection is given up
/// (RUSTSEC-2024-0003).
///
/// Pings and SETTINGS are counted by `upstream/calm.rs`: h2 reads the next frame only when the answer to the last one is
/// in its buffer for the socket, so a peer that sends them without reading stops itself, but one that reads the answers
/// would go on for ever. Of empty DATA frames h2 takes 100, of small ones as many as have
/// a cost of half the connection's window; then it ends the connection.
pub const HTTP2_BROKEN_STREAMS: usize = 64;

/// A tool that was given a wrong pass tries a few times; each try looks at a file.
const WRONG_PASSES: u32 = 10;

/// How long a pass that did not count is held against whoever showed it: long enough that asking again in a loop is of no
/// use, short enough to wait for.
pub const WRONG_PASSES_IN: Duration = Duration::from_secs(60);

/// What clients leave of the descriptors: for refreshes, the log, the files that are followed, reading the configuration
/// again, and an accepted client of each listener that waits for its turn.
const RESERVED_DESCRIPTORS: u64 = 32;

/// There is a pipe for each so many clients: where descriptors are few, clients are worth more than what pipes save.
const CLIENTS_OF_A_PIPE: usize = 32;

/// What is in them is memory of the kernel, 4 MiB in all. Only a direction whose reader is slow holds one for longer than a
/// moment; what there is no pipe for is copied.
const MOST_PIPES: usize = 16;

/// The client's own, and that of the upstream that it speaks with.
const DESCRIPTORS_OF_A_CLIENT: u64 = 2;

/// One of so many connections may be a stranger's, so that those who are let in find room.
const SHARE_OF_STRANGERS: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_follow_the_descriptors() {
        for (descriptors, connections, strangers) in [
            (0, 1, 1),
            (32, 1, 1),
            (36, 2, 1),
            (64, 16, 4),
            (1024, 481, 120),
            (65_536, 32_736, 1024),
        ] {
            let limits = Limits::USUAL.within(descriptors);
            let found = (limits.connections, limits.strangers);
            assert_eq!(found, (connections, strangers), "{descriptors}");
        }
    }

    #[test]
    fn what_is_asked_for_is_the_most_there_is() {
        let asked = Limits { connections: 100, strangers: 3, ..Limits::USUAL };
        assert_eq!(asked.clone().within(1024), asked);
        assert_eq!(asked.within(64).connections, 16);
    }

    #[test]
    fn pipes_leave_the_clients_their_descriptors() {
        for descriptors in [0, 32, 64, 96, 100, 1024, 2048, 65_536, u64::MAX] {
            let limits = Limits::USUAL.within(descriptors);
            let all = 2 * (limits.connections as u64 + limits.pipes() as u64);
            assert!(
                all <= descriptors.saturating_sub(RESERVED_DESCRIPTORS).max(2),
                "{descriptors}"
            );
            assert_eq!(limits.pipes() > 0, descriptors >= 100, "{descriptors}");
        }
    }
}
