//! Carries bytes both ways and looks at none.

#[cfg(target_os = "linux")]
mod pipe;
#[cfg(not(target_os = "linux"))]
#[path = "tunnel/no_pipe.rs"]
mod pipe;

use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use self::pipe::{Filled, Pipe};
use super::Shared;
use super::admit::Admitted;
use super::bare::Bare;
use super::flow::{Flow, Joint, Passage};
use super::note::{self, Note};
pub(super) use pipe::Pipes;

/// Joins two streams until both directions have ended, the client is not let in any more, or the proxy is cut.
pub(super) fn carry<A, B>(
    shared: Arc<Shared>,
    (admitted, note): (Admitted, Note),
    client: A,
    upstream: B,
) -> impl Future<Output = ()>
where
    A: AsyncRead + AsyncWrite + Bare + Unpin,
    B: AsyncRead + AsyncWrite + Bare + Unpin,
{
    let lane = || Lane::new(shared.pipes.clone());
    // Made before the future, which would else have room for the streams twice.
    let mut joint = Joint::new((client, upstream), (lane(), lane()));
    async move {
        let ended = admitted.ended();
        let outcome = tokio::select! {
            outcome = joint.run() => match outcome {
                Ok(()) => note::OK,
                Err(error) => {
                    tracing::debug!(%error, "tunnel ended");
                    note::BROKEN_OFF
                }
            },
            () = ended.cancelled() => {
                tracing::debug!("the pass of a tunnel counts no more");
                note::SHUT_OUT
            }
            () = shared.closing.cut.cancelled() => note::CUT,
        };
        note.ended(outcome, joint.written());
    }
}

/// One direction of a tunnel. Between bare sockets the kernel moves what comes in bulk; all else is copied, for which small
/// messages cost less.
struct Lane {
    flow: Flow,
    pipes: Arc<Pipes>,
    /// There is one only as long as it holds something.
    pipe: Option<Pipe>,
    /// How much has lately come in large pieces.
    bulk: usize,
}

/// When the kernel is left to it: by then the direction is a download, and what was copied of it cost some 0.1 ms.
const BULK: usize = 256 * 1024;

/// A piece of this size comes from a peer that sends faster than we read.
const LARGE: usize = 16 * 1024;

impl Lane {
    fn new(pipes: Arc<Pipes>) -> Self {
        Self { flow: Flow::default(), pipes, pipe: None, bulk: 0 }
    }

    /// Two small pieces in a row, and there is no bulk any more.
    fn weigh(&mut self, len: usize) {
        self.bulk = if len < LARGE { self.bulk / 2 } else { (self.bulk + len).min(2 * BULK - 1) };
    }

    /// Moves what there is through a pipe. Nothing where there is none to be had, and where splice(2) sees nothing: whether it
    /// is the end, or a mark, or not there yet, is for the flow to see.
    fn poll_splice(
        &mut self,
        cx: &mut Context<'_>,
        (from, to): (&TcpStream, &TcpStream),
    ) -> Poll<io::Result<usize>> {
        if self.pipe.is_none() && !ready!(self.poll_fill(cx, from))? {
            return Poll::Ready(Ok(0));
        }
        let mut moved = 0;
        while let Some(mut pipe) = self.pipe.take_if(|pipe| !pipe.is_empty()) {
            let emptied = pipe.poll_empty(cx, to);
            self.pipe = Some(pipe);
            let len = ready!(emptied)?;
            self.flow.count(len);
            moved += len;
        }
        if let Some(pipe) = self.pipe.take() {
            self.pipes.give_back(pipe);
        }
        Poll::Ready(Ok(moved))
    }

    /// Whether there is something in the pipe now.
    fn poll_fill(&mut self, cx: &mut Context<'_>, from: &TcpStream) -> Poll<io::Result<bool>> {
        let Some(mut pipe) = self.pipes.take() else {
            // It is asked for again after as much as this time.
            self.bulk = 0;
            return Poll::Ready(Ok(false));
        };
        let filled = pipe.poll_fill(cx, from);
        match filled {
            Poll::Ready(Ok(Filled::With(len @ 1..))) => {
                self.weigh(len);
                self.pipe = Some(pipe);
                return Poll::Ready(Ok(true));
            }
            _ => self.pipes.give_back(pipe),
        }
        if matches!(ready!(filled)?, Filled::NotPossible) {
            self.bulk = 0;
        }
        Poll::Ready(Ok(false))
    }
}

impl<R, W> Passage<R, W> for Lane
where
    R: AsyncRead + Bare + Unpin,
    W: AsyncWrite + Bare + Unpin,
{
    fn poll_pass(
        &mut self,
        cx: &mut Context<'_>,
        (from, to): (&mut R, &mut W),
    ) -> Poll<io::Result<usize>> {
        if self.pipe.is_some() || self.bulk >= BULK {
            ready!(self.flow.poll_deliver(cx, to))?;
            if let (Some(from), Some(to)) = (from.bare(), to.bare()) {
                let moved = ready!(self.poll_splice(cx, (from, to)))?;
                if moved > 0 {
                    return Poll::Ready(Ok(moved));
                }
            }
        }
        let len = ready!(self.flow.poll_pass(cx, (from, to), |_| {}))?;
        self.weigh(len);
        Poll::Ready(Ok(len))
    }

    fn flow(&self) -> &Flow {
        &self.flow
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::pin::pin;
    use std::time::Duration;

    use bytes::Bytes;
    use proptest::prelude::*;
    use rustix::net::sockopt::set_socket_linger;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;
    use crate::proxy::listener::ClientStream;
    use crate::upstream::dial::Transport;
    use crate::upstream::early::Early;

    /// One connection, from both sides.
    #[expect(clippy::disallowed_methods, reason = "a peer that the test plays")]
    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let connecting = TcpStream::connect(listener.local_addr().unwrap());
        let (near, far) = tokio::join!(connecting, listener.accept());
        (near.unwrap(), far.unwrap().0)
    }

    type Scene = Joint<TcpStream, TcpStream, Lane, Lane>;

    /// A client, a tunnel and an upstream.
    async fn scene(pipes: &Arc<Pipes>) -> (TcpStream, Scene, TcpStream) {
        let ((client, near), (upstream, far)) = (pair().await, pair().await);
        let joint = Joint::new((near, far), (Lane::new(pipes.clone()), Lane::new(pipes.clone())));
        (client, joint, upstream)
    }

    /// Bytes that nowhere look like those a little further on.
    fn text(seed: u64, len: usize) -> Vec<u8> {
        let mut state = seed | 1;
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_be_bytes()
        };
        let mut text = std::iter::repeat_with(next).take(len / 8 + 1).collect::<Vec<_>>().concat();
        text.truncate(len);
        text
    }

    fn assert_same(heard: &[u8], sent: &[u8]) {
        if heard == sent {
            return;
        }
        let differs = heard.iter().zip(sent).position(|(heard, sent)| heard != sent);
        assert_eq!((heard.len(), differs), (sent.len(), None));
    }

    /// Says all this, ends, and gives what was heard meanwhile; both in such pieces.
    async fn exchange(peer: &mut TcpStream, sent: &[u8], pieces: &[usize]) -> Vec<u8> {
        let (mut from, mut to) = peer.split();
        let sending = async {
            let (mut rest, mut lens) = (sent, pieces.iter().cycle());
            while !rest.is_empty() {
                let (piece, later) = rest.split_at(rest.len().min(*lens.next().unwrap()));
                to.write_all(piece).await.unwrap();
                rest = later;
            }
            to.shutdown().await.unwrap();
        };
        let hearing = async {
            let (mut heard, mut lens) = (Vec::new(), pieces.iter().cycle());
            loop {
                let most = *lens.next().unwrap() as u64;
                if (&mut from).take(most).read_to_end(&mut heard).await.unwrap() == 0 {
                    return heard;
                }
            }
        };
        tokio::join!(sending, hearing).1
    }

    const MIB: usize = 1024 * 1024;

    #[tokio::test]
    async fn bulk_goes_both_ways_at_once() {
        for most in [0, 1, 4] {
            let pipes = Arc::new(Pipes::new(most));
            let (mut client, mut joint, mut upstream) = scene(&pipes).await;
            let (up, down) = (text(1, 9 * MIB), text(2, 7 * MIB + 1));
            let (to_client, to_upstream, ended) = tokio::join!(
                exchange(&mut client, &up, &[MIB]),
                exchange(&mut upstream, &down, &[MIB]),
                joint.run()
            );
            ended.unwrap();
            assert_same(&to_upstream, &up);
            assert_same(&to_client, &down);
            assert_eq!(joint.written(), (up.len() as u64, down.len() as u64));
            assert_eq!(pipes.idle() > 0, most > 0 && cfg!(target_os = "linux"), "{most}");
            assert!(pipes.idle() <= most);
        }
    }

    #[tokio::test]
    async fn small_messages_are_copied() {
        let pipes = Arc::new(Pipes::new(4));
        let (mut client, mut joint, mut upstream) = scene(&pipes).await;
        let talking = async {
            let message = text(3, LARGE - 1);
            for _ in 0..2 * BULK / LARGE {
                client.write_all(&message).await.unwrap();
                let mut heard = vec![0; message.len()];
                upstream.read_exact(&mut heard).await.unwrap();
                assert_same(&heard, &message);
            }
        };
        tokio::select! {
            () = talking => {}
            ended = joint.run() => panic!("{ended:?}"),
        }
        assert_eq!(pipes.idle(), 0);
    }

    /// Whoever ends first hears the other to the end.
    #[tokio::test]
    async fn half_of_it_may_be_closed() {
        for client_is_first in [true, false] {
            let pipes = Arc::new(Pipes::new(4));
            let (mut client, mut joint, mut upstream) = scene(&pipes).await;
            let talking = async {
                let (first, second) = match client_is_first {
                    true => (&mut client, &mut upstream),
                    false => (&mut upstream, &mut client),
                };
                let (question, answer) = (text(4, 3 * MIB), text(5, 2 * MIB));
                let asking = exchange(first, &question, &[MIB]);
                let answering = async {
                    let mut heard = Vec::new();
                    second.read_to_end(&mut heard).await.unwrap();
                    assert_same(&heard, &question);
                    second.write_all(&answer).await.unwrap();
                    second.shutdown().await.unwrap();
                };
                let (heard, ()) = tokio::join!(asking, answering);
                assert_same(&heard, &answer);
            };
            let ((), ended) = tokio::join!(talking, joint.run());
            ended.unwrap();
            let (asked, answered) = (3 * MIB as u64, 2 * MIB as u64);
            let expected = if client_is_first { (asked, answered) } else { (answered, asked) };
            assert_eq!(joint.written(), expected);
        }
    }

    #[tokio::test]
    async fn a_reset_is_an_error_and_no_end() {
        for client_resets in [true, false] {
            let pipes = Arc::new(Pipes::new(4));
            let (client, mut joint, upstream) = scene(&pipes).await;
            let (mut resets, mut stays) =
                if client_resets { (client, upstream) } else { (upstream, client) };
            let breaking = async {
                let sent = text(6, 2 * MIB);
                let (mut from, mut to) = stays.split();
                let sending = async { to.write_all(&sent).await.unwrap() };
                let mut heard = vec![0; 2 * MIB];
                let talking = async {
                    let (mut hears, mut says) = resets.split();
                    tokio::join!(says.write_all(&sent), hears.read_exact(&mut heard))
                };
                let mut back = vec![0; 2 * MIB];
                let (_, (said, heard), _) =
                    tokio::join!(sending, talking, from.read_exact(&mut back));
                assert!(said.is_ok() && heard.is_ok());
                set_socket_linger(&resets, Some(Duration::ZERO)).unwrap();
                drop(resets);
            };
            let ((), ended) = tokio::join!(breaking, joint.run());
            assert!(ended.is_err(), "{client_resets}");
            assert_eq!(joint.written(), (2 * MIB as u64, 2 * MIB as u64));
        }
    }

    /// Meanwhile what is in between stays where it is, and others are passed without a pipe.
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_slow_reader_gets_all_and_holds_nobody_up() {
        let pipes = Arc::new(Pipes::new(1));
        let (mut client, mut joint, mut upstream) = scene(&pipes).await;
        let sent = text(7, 16 * MIB);
        let mut rest = &sent[..];
        while joint.up.pipe.is_none() {
            rest = client.try_write(rest).map_or(rest, |len| &rest[len..]);
            assert!(futures_util::future::poll_immediate(joint.run()).await.is_none());
            tokio::task::yield_now().await;
        }
        assert!(!rest.is_empty());
        let (mut another_client, mut another, mut another_upstream) = scene(&pipes).await;
        let others = text(8, 3 * MIB);
        let (_, heard, ended) = tokio::join!(
            exchange(&mut another_client, &others, &[MIB]),
            exchange(&mut another_upstream, &[], &[MIB]),
            another.run()
        );
        ended.unwrap();
        assert_same(&heard, &others);
        assert_eq!(pipes.idle(), 0);
        let (_, heard, ended) = tokio::join!(
            exchange(&mut client, rest, &[MIB]),
            exchange(&mut upstream, &[], &[MIB]),
            joint.run()
        );
        ended.unwrap();
        assert_same(&heard, &sent);
        assert_eq!(joint.written(), (sent.len() as u64, 0));
        assert!(joint.up.pipe.is_none());
    }

    /// An urgent byte is no part of the stream (RFC 6093 section 3), and what is behind it is.
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn what_is_behind_an_urgent_byte_arrives() {
        let (mut client, mut joint, mut upstream) = scene(&Arc::new(Pipes::new(1))).await;
        let sent = text(7, 4 * MIB);
        joint.up.bulk = BULK;
        rustix::net::send(&client, b"!", rustix::net::SendFlags::OOB).unwrap();
        let sending = exchange(&mut client, &sent, &[MIB]);
        let all =
            async { tokio::join!(sending, exchange(&mut upstream, &[], &[MIB]), joint.run()) };
        let limit = Duration::from_secs(10);
        let (_, heard, ended) = tokio::time::timeout(limit, all).await.expect("it hangs");
        ended.unwrap();
        assert_same(&heard, &sent);
    }

    #[tokio::test]
    async fn what_came_early_goes_first() {
        let pipes = Arc::new(Pipes::new(4));
        let ((mut client, near), (mut upstream, far)) = (pair().await, pair().await);
        let sent = text(9, 5 * MIB);
        let (early, late) = sent.split_at(BULK + 1);
        let near = Early::new(Bytes::copy_from_slice(early), near);
        let mut joint =
            Joint::new((near, far), (Lane::new(pipes.clone()), Lane::new(pipes.clone())));
        let (_, heard, ended) = tokio::join!(
            exchange(&mut client, late, &[MIB]),
            exchange(&mut upstream, &[], &[MIB]),
            joint.run()
        );
        ended.unwrap();
        assert_same(&heard, &sent);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// However often it is left and taken up again.
        #[test]
        fn what_arrives_is_what_was_sent(
            (up, down) in (0_usize..3_000_000, 0_usize..3_000_000),
            pieces in prop::collection::vec(prop_oneof![1000_usize..5000, 1_usize..400_000], 1..8),
            (stops, polls, most) in (0_usize..60, 1_usize..4, 0_usize..3),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let pipes = Arc::new(Pipes::new(most));
                let (mut client, mut joint, mut upstream) = scene(&pipes).await;
                let (up, down) = (text(10, up), text(11, down));
                let carrying = async {
                    for _ in 0..stops {
                        if left_after(polls, joint.run()).await {
                            break;
                        }
                    }
                    joint.run().await.unwrap();
                };
                let (to_client, to_upstream, ()) = tokio::join!(
                    exchange(&mut client, &up, &pieces),
                    exchange(&mut upstream, &down, &pieces),
                    carrying
                );
                assert_same(&to_upstream, &up);
                assert_same(&to_client, &down);
                assert_eq!(joint.written(), (up.len() as u64, down.len() as u64));
                assert!(joint.up.pipe.is_none() && joint.down.pipe.is_none());
            });
        }
    }

    /// Leaves a future after so many polls; whether it had come to its end.
    async fn left_after(polls: usize, running: impl Future<Output = io::Result<()>>) -> bool {
        let (mut left, mut running) = (polls, pin!(running));
        poll_fn(|cx| {
            if left == 0 {
                return Poll::Ready(false);
            }
            left -= 1;
            running.as_mut().poll(cx).map(|ended| ended.map(|()| true).unwrap())
        })
        .await
    }

    /// Thousands of them wait for days.
    #[test]
    fn an_idle_tunnel_is_small() {
        fn size_of_future<N, F>(
            _: fn(Arc<Shared>, N, Early<ClientStream>, Transport) -> F,
        ) -> usize {
            size_of::<F>()
        }
        let size = size_of_future(carry);
        assert!(size <= 640, "{size}");
    }
}
