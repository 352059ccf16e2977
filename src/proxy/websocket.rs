//! A WebSocket after its handshake: bytes both ways, and a Close from us when it may not go on.

use std::io;
use std::task::{Context, Poll};
use std::time::Duration;

use aws_lc_rs::rand;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::flow::{Flow, Joint, Passage};
use super::frames::Frames;
use super::note;

/// What ends a WebSocket from our side.
#[derive(Clone, Default)]
pub(super) struct Ends {
    /// The proxy drains: 1001.
    pub(super) draining: CancellationToken,
    /// The credential of its handshake may no longer be used: 1008. Of a WebSocket that was forwarded
    /// as it is nobody cancels this one.
    pub(super) forbidden: CancellationToken,
    /// The client is not let in any more: 1008.
    pub(super) shut_out: CancellationToken,
    /// At once, without a word.
    pub(super) cut: CancellationToken,
}

/// Joins the halves of a WebSocket until both directions have ended, or one of `ends` has come. How it ended, and how
/// many bytes went up and down.
pub(super) async fn relay<A, B>(ends: &Ends, client: A, upstream: B) -> (&'static str, (u64, u64))
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let mut joint = Joint::new((client, upstream), (Watched::default(), Watched::default()));
    let (outcome, close) = tokio::select! {
        biased;
        () = ends.cut.cancelled() => (note::CUT, None),
        () = ends.forbidden.cancelled() => (note::FORBIDDEN, Some(POLICY)),
        () = ends.shut_out.cancelled() => (note::SHUT_OUT, Some(POLICY)),
        () = ends.draining.cancelled() => (note::GOING_AWAY, Some(GOING_AWAY)),
        outcome = joint.run() => match outcome {
            Ok(()) => (note::OK, None),
            Err(error) => {
                tracing::debug!(%error, "websocket broken");
                (note::BROKEN_OFF, None)
            }
        }
    };
    if let Some(close) = &close {
        // Boxed, because few come to this.
        tokio::select! {
            () = ends.cut.cancelled() => {}
            () = Box::pin(part(close, &mut joint)) => {}
        }
    }
    let (up, down) = (&joint.up.frames, &joint.down.frames);
    tracing::debug!(
        messages_up = up.messages(),
        messages_down = down.messages(),
        controls_up = up.controls(),
        controls_down = down.controls(),
        closed = close.map(|close| close.code),
        "websocket ended"
    );
    // After both have said goodbye it does not matter how they go.
    let parted = up.has_closed() && down.has_closed();
    let outcome = if outcome == note::BROKEN_OFF && parted { note::OK } else { outcome };
    (outcome, joint.written())
}

/// One direction, and where its frames end.
#[derive(Default)]
struct Watched {
    flow: Flow,
    frames: Frames,
}

impl<R, W> Passage<R, W> for Watched
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    fn poll_pass(
        &mut self,
        cx: &mut Context<'_>,
        ends: (&mut R, &mut W),
    ) -> Poll<io::Result<usize>> {
        let frames = &mut self.frames;
        self.flow.poll_pass(cx, ends, |bytes| frames.pass(bytes))
    }

    fn flow(&self) -> &Flow {
        &self.flow
    }
}

/// Both directions of a WebSocket that is relayed.
type Relayed<A, B> = Joint<A, B, Watched, Watched>;

/// One direction that comes to its end by us.
struct Direction<'a, R, W> {
    flow: &'a mut Flow,
    frames: &'a mut Frames,
    from: R,
    to: W,
}

impl<'a, R, W> Direction<'a, R, W>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    fn new(watched: &'a mut Watched, from: R, to: W) -> Self {
        Self { flow: &mut watched.flow, frames: &mut watched.frames, from, to }
    }

    /// Ends the direction with this frame, and then reads on until the peer that it comes from has said
    /// its own goodbye. `tell` is sent to where the frame was written or has passed before, and dropped
    /// where it was not; `told` is that of the other direction. Whether the peer at its end was told.
    async fn part(
        &mut self,
        frame: Option<Vec<u8>>,
        tell: oneshot::Sender<()>,
        told: oneshot::Receiver<()>,
    ) -> bool {
        let finished = timeout(FINISH_LIMIT, self.finish(frame.as_deref())).await;
        let has_told = matches!(finished, Ok(Ok(true)));
        if has_told {
            // Where the other direction has gone it does not matter.
            let _gone = tell.send(());
        } else {
            drop(tell);
        }
        // Also where we could not tell: a peer may take nothing as long as nobody reads what it sends.
        tokio::select! {
            heard = self.hear() => {
                if let Err(error) = heard {
                    tracing::debug!(%error, "a peer of a websocket has gone without a goodbye");
                }
            }
            () = patience(told) => {}
        }
        has_told
    }

    /// Passes on what was read, and no more than the rest of a frame that is half sent, and then a Close
    /// if none has passed. `false` where none may follow.
    async fn finish(&mut self, close: Option<&[u8]>) -> io::Result<bool> {
        self.flow.deliver(&mut self.to).await?;
        while let Some(short @ 1..) = self.frames.short_of_boundary()
            && !self.flow.has_ended()
        {
            let short = usize::try_from(short).unwrap_or(usize::MAX);
            let rest = self.flow.take(&mut self.from, short).await?;
            self.frames.pass(rest);
            self.flow.deliver(&mut self.to).await?;
        }
        if self.frames.has_closed() {
            return Ok(true);
        }
        let Some(close) = close.filter(|_| self.frames.is_at_boundary() && !self.flow.has_ended())
        else {
            return Ok(false);
        };
        self.to.write_all(close).await?;
        self.to.flush().await?;
        Ok(true)
    }

    /// Reads up to a Close or to the end, and throws it away.
    async fn hear(&mut self) -> io::Result<()> {
        // What nobody gets is not counted.
        let mut frames = self.frames.clone();
        while !frames.has_closed() && !self.flow.has_ended() {
            frames.pass(self.flow.take(&mut self.from, usize::MAX).await?);
        }
        Ok(())
    }
}

/// A peer may take its time to answer once it was told; one that cannot be told is not waited for.
async fn patience(told: oneshot::Receiver<()>) {
    if told.await.is_ok() {
        tokio::time::sleep(GOODBYE_LIMIT).await;
    }
}

/// Ends both directions at a boundary with a Close, and waits for the peers' answers. A peer to which no
/// frame of ours may be sent hears nothing; it sees the connection end.
async fn part<A, B>(close: &Close, joint: &mut Relayed<A, B>)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (from_client, to_client) = tokio::io::split(&mut joint.client);
    let (from_upstream, to_upstream) = tokio::io::split(&mut joint.upstream);
    let mut up = Direction::new(&mut joint.up, from_client, to_upstream);
    let mut down = Direction::new(&mut joint.down, from_upstream, to_client);
    let (tell_upstream, upstream_told) = oneshot::channel();
    let (tell_client, client_told) = oneshot::channel();
    let told = tokio::join!(
        up.part(close.masked(), tell_upstream, client_told),
        down.part(Some(close.plain()), tell_client, upstream_told),
    );
    let end = async {
        let upstream = async { if told.0 { up.to.shutdown().await } else { Ok(()) } };
        let client = async { if told.1 { down.to.shutdown().await } else { Ok(()) } };
        tokio::join!(upstream, client)
    };
    // A peer that does not let us end is left as it is.
    let _ended = timeout(GOODBYE_LIMIT, end).await;
}

/// The last frame of a WebSocket (RFC 6455 section 5.5.1): why we end it, for programs and for people.
struct Close {
    code: u16,
    /// At most 123 bytes: with the code it must fit into a control frame.
    reason: &'static str,
}

impl Close {
    /// As a server sends it.
    fn plain(&self) -> Vec<u8> {
        let payload = self.payload();
        [&[FINAL_CLOSE, payload.len() as u8], &payload[..]].concat()
    }

    /// As a client sends it, whose frames are masked with what nobody can foresee.
    fn masked(&self) -> Option<Vec<u8>> {
        let mut mask = [0; 4];
        rand::fill(&mut mask).ok()?;
        let mut payload = self.payload();
        payload.iter_mut().zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
        Some([&[FINAL_CLOSE, MASKED | payload.len() as u8], &mask[..], &payload[..]].concat())
    }

    fn payload(&self) -> Vec<u8> {
        [&self.code.to_be_bytes(), self.reason.as_bytes()].concat()
    }
}

const GOING_AWAY: Close = Close { code: 1001, reason: "going away" };
const POLICY: Close = Close { code: 1008, reason: "policy" };

/// FIN, and the opcode of a Close.
const FINAL_CLOSE: u8 = 0x88;
const MASKED: u8 = 0x80;

/// How long a half-sent frame may take to come to its end, and our Close to be written behind it. Longer
/// than any that is really on its way.
const FINISH_LIMIT: Duration = Duration::from_secs(1);

/// How long a peer may take to answer a Close. Together with the other limit well below the time that
/// draining has.
const GOODBYE_LIMIT: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, DuplexStream, duplex};
    use tokio::task::JoinHandle;
    use tokio::time::Instant;

    use super::*;
    use crate::tasks::Tasks;

    /// A relay between two peers that the test plays.
    struct Scene {
        client: DuplexStream,
        upstream: DuplexStream,
        ends: Ends,
        relay: JoinHandle<(&'static str, (u64, u64))>,
        began: Instant,
    }

    /// `room` is how much either peer can send that nobody reads.
    fn scene(room: usize) -> Scene {
        let ((client, near), (upstream, far)) = (duplex(room), duplex(room));
        let ends = Ends::default();
        let ours = ends.clone();
        let relay = Tasks::new().spawn(async move { relay(&ours, near, far).await });
        Scene { client, upstream, ends, relay, began: Instant::now() }
    }

    impl Scene {
        /// Waits for the relay; how long it took since the scene began, by the paused clock.
        async fn ended(self) -> Duration {
            self.relay.await.unwrap();
            self.began.elapsed()
        }
    }

    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let len = u16::try_from(payload.len()).unwrap().to_be_bytes();
        [&[first, 126], &len[..], payload].concat()
    }

    async fn read(from: &mut DuplexStream, len: usize) -> Vec<u8> {
        let mut read = vec![0; len];
        from.read_exact(&mut read).await.unwrap();
        read
    }

    async fn rest(from: &mut DuplexStream) -> Vec<u8> {
        let mut read = Vec::new();
        from.read_to_end(&mut read).await.unwrap();
        read
    }

    /// What a masked Close says.
    fn unmasked(frame: &[u8]) -> (u16, String) {
        assert_eq!(frame[0], FINAL_CLOSE);
        assert_eq!(frame[1], MASKED | (frame.len() - 6) as u8);
        let mask = frame[2..6].iter().cycle();
        let payload: Vec<u8> =
            frame[6..].iter().zip(mask).map(|(byte, mask)| byte ^ mask).collect();
        let code = u16::from_be_bytes([payload[0], payload[1]]);
        (code, String::from_utf8(payload[2..].to_vec()).unwrap())
    }

    const PLAIN_AWAY: &[u8] = b"\x88\x0c\x03\xe9going away";
    const PLAIN_POLICY: &[u8] = b"\x88\x08\x03\xf0policy";
    const MASKED_AWAY: usize = 18;
    const ANSWER: &[u8] = b"\x88\x00";

    #[tokio::test(start_paused = true)]
    async fn a_close_comes_after_the_frame_that_is_half_sent() {
        let mut scene = scene(64 * 1024);
        let (message, next) = (frame(0x02, &[7; 1000]), frame(0x80, &[8; 1000]));
        scene.client.write_all(&message[..600]).await.unwrap();
        assert_eq!(read(&mut scene.upstream, 600).await, message[..600]);
        scene.ends.draining.cancel();
        scene.client.write_all(&message[600..]).await.unwrap();
        scene.client.write_all(&next).await.unwrap();
        assert_eq!(read(&mut scene.upstream, 404).await, message[600..]);
        let close = read(&mut scene.upstream, MASKED_AWAY).await;
        assert_eq!(unmasked(&close), (1001, "going away".to_owned()));
        assert_eq!(read(&mut scene.client, PLAIN_AWAY.len()).await, PLAIN_AWAY);
        scene.upstream.write_all(&frame(0x81, b"late")).await.unwrap();
        scene.upstream.write_all(ANSWER).await.unwrap();
        scene.client.write_all(ANSWER).await.unwrap();
        assert_eq!(rest(&mut scene.upstream).await, b"", "the next frame goes nowhere");
        assert_eq!(rest(&mut scene.client).await, b"");
        assert_eq!(scene.ended().await, Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_forbidden_credential_is_policy_and_comes_before_draining() {
        let mut scene = scene(1024);
        scene.ends.draining.cancel();
        scene.ends.forbidden.cancel();
        assert_eq!(read(&mut scene.client, PLAIN_POLICY.len()).await, PLAIN_POLICY);
        let close = read(&mut scene.upstream, MASKED_AWAY - 4).await;
        assert_eq!(unmasked(&close), (1008, "policy".to_owned()));
        scene.client.write_all(ANSWER).await.unwrap();
        drop(scene.upstream);
        scene.relay.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_frame_that_never_ends_gets_no_close_behind_it() {
        let mut scene = scene(1024);
        let message = frame(0x82, &[7; 100]);
        scene.client.write_all(&message[..50]).await.unwrap();
        assert_eq!(read(&mut scene.upstream, 50).await, message[..50]);
        scene.ends.draining.cancel();
        assert_eq!(read(&mut scene.client, PLAIN_AWAY.len()).await, PLAIN_AWAY);
        assert_eq!(rest(&mut scene.upstream).await, b"");
        assert!(scene.ended().await <= FINISH_LIMIT + GOODBYE_LIMIT + SLACK);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_no_websocket_passes_and_is_only_ended() {
        let mut scene = scene(1024);
        scene.client.write_all(b"\x83what is this").await.unwrap();
        scene.upstream.write_all(b"\x8fno idea").await.unwrap();
        assert_eq!(read(&mut scene.upstream, 13).await, b"\x83what is this");
        assert_eq!(read(&mut scene.client, 8).await, b"\x8fno idea");
        scene.client.write_all(ANSWER).await.unwrap();
        assert_eq!(read(&mut scene.upstream, 2).await, ANSWER);
        scene.ends.draining.cancel();
        assert_eq!(rest(&mut scene.upstream).await, b"");
        assert_eq!(rest(&mut scene.client).await, b"");
        assert_eq!(scene.ended().await, Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_has_gone_holds_nothing_up() {
        let mut scene = scene(1024);
        scene.client.write_all(&frame(0x81, b"bye")).await.unwrap();
        drop(scene.client);
        assert_eq!(rest(&mut scene.upstream).await, frame(0x81, b"bye"));
        scene.ends.draining.cancel();
        scene.relay.await.unwrap();
        assert_eq!(scene.began.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_breaks_off_in_parting_leaves_the_upstream_a_close() {
        let mut scene = scene(1024);
        scene.upstream.write_all(&frame(0x81, &[7; 100])[..60]).await.unwrap();
        read(&mut scene.client, 60).await;
        scene.ends.draining.cancel();
        drop(scene.client);
        scene.upstream.write_all(&frame(0x81, &[7; 100])[60..]).await.unwrap();
        let heard = rest(&mut scene.upstream).await;
        assert_eq!(unmasked(&heard).0, 1001);
        scene.relay.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_upstream_is_not_waited_for_long() {
        let mut scene = scene(1024);
        scene.ends.draining.cancel();
        let close = read(&mut scene.upstream, MASKED_AWAY).await;
        assert_eq!(unmasked(&close).0, 1001);
        assert_eq!(read(&mut scene.client, PLAIN_AWAY.len()).await, PLAIN_AWAY);
        scene.client.write_all(ANSWER).await.unwrap();
        assert_eq!(rest(&mut scene.client).await, b"");
        let silent = scene.upstream;
        scene.relay.await.unwrap();
        assert!(scene.began.elapsed() <= GOODBYE_LIMIT + SLACK);
        drop(silent);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_gets_all_that_is_in_flight_and_then_the_close() {
        let mut scene = scene(64);
        let messages: Vec<u8> = (0..20).flat_map(|number| frame(0x82, &[number; 500])).collect();
        let (tasks, sent) = (Tasks::new(), messages.clone());
        let (mut answers, mut upstream) = tokio::io::split(scene.upstream);
        // It is stopped in the middle, like the relay.
        tasks.spawn(async move { upstream.write_all(&sent).await });
        let mut heard = read(&mut scene.client, 700).await;
        scene.ends.draining.cancel();
        let close = tasks.spawn(async move {
            let mut close = vec![0; MASKED_AWAY];
            answers.read_exact(&mut close).await.map(|_| close)
        });
        heard.extend(rest(&mut scene.client).await);
        assert_eq!(unmasked(&close.await.unwrap().unwrap()).0, 1001);
        let whole = heard.strip_suffix(PLAIN_AWAY).unwrap();
        assert!(whole.len() >= 1008 && whole.len() % 504 == 0, "{}", whole.len());
        assert_eq!(whole, &messages[..whole.len()]);
        scene.relay.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_upstream_that_reads_only_when_it_has_written_gets_its_close() {
        let scene = scene(64);
        let tasks = Tasks::new();
        let (mut answers, mut client) = tokio::io::split(scene.client);
        tasks.spawn(async move { client.write_all(&frame(0x82, &[1; 1000])).await });
        let (mut asked, mut upstream) = tokio::io::split(scene.upstream);
        let upstream = tasks.spawn(async move {
            for message in [[2; 1000], [3; 1000]] {
                upstream.write_all(&frame(0x82, &message)).await.unwrap();
            }
            let mut heard = vec![0; 1004 + MASKED_AWAY];
            asked.read_exact(&mut heard).await.map(|_| heard)
        });
        let mut heard = vec![0; 1004 + PLAIN_AWAY.len()];
        answers.read_exact(&mut heard[..100]).await.unwrap();
        scene.ends.draining.cancel();
        answers.read_exact(&mut heard[100..]).await.unwrap();
        assert_eq!(heard, [&frame(0x82, &[2; 1000]), PLAIN_AWAY].concat());
        let heard = upstream.await.unwrap().unwrap();
        assert_eq!(heard[..1004], frame(0x82, &[1; 1000]));
        assert_eq!(unmasked(&heard[1004..]).0, 1001);
        scene.relay.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_nothing_is_left_behind() {
        let mut scene = scene(64);
        scene.upstream.write_all(&frame(0x82, &[7; 60])).await.unwrap();
        scene.upstream.write_all(&frame(0x82, &[7; 60])).await.unwrap();
        scene.ends.draining.cancel();
        let close = read(&mut scene.upstream, MASKED_AWAY).await;
        assert_eq!(unmasked(&close).0, 1001);
        let deaf = scene.client;
        scene.relay.await.unwrap();
        assert!(scene.began.elapsed() <= FINISH_LIMIT + GOODBYE_LIMIT + SLACK);
        drop(deaf);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_sent_a_second_close() {
        let mut scene = scene(1024);
        scene.client.write_all(ANSWER).await.unwrap();
        assert_eq!(read(&mut scene.upstream, 2).await, ANSWER);
        scene.ends.draining.cancel();
        assert_eq!(read(&mut scene.client, PLAIN_AWAY.len()).await, PLAIN_AWAY);
        scene.upstream.write_all(ANSWER).await.unwrap();
        assert_eq!(rest(&mut scene.upstream).await, b"");
        assert_eq!(rest(&mut scene.client).await, b"");
        assert_eq!(scene.ended().await, Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_word_from_us_it_ends_when_the_peers_end_it() {
        let mut scene = scene(1024);
        scene.client.write_all(&frame(0x81, b"hello")).await.unwrap();
        assert_eq!(read(&mut scene.upstream, 9).await, frame(0x81, b"hello"));
        scene.client.shutdown().await.unwrap();
        assert_eq!(rest(&mut scene.upstream).await, b"");
        scene.upstream.write_all(&frame(0x81, b"after")).await.unwrap();
        drop(scene.upstream);
        assert_eq!(rest(&mut scene.client).await, frame(0x81, b"after"));
        scene.relay.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_cut_is_a_cut_also_while_parting() {
        for is_parting in [false, true] {
            let mut scene = scene(1024);
            if is_parting {
                scene.ends.draining.cancel();
                read(&mut scene.client, PLAIN_AWAY.len()).await;
            }
            scene.ends.cut.cancel();
            assert_eq!(rest(&mut scene.client).await, b"");
            assert_eq!(scene.ended().await, Duration::ZERO);
        }
    }

    #[test]
    fn every_close_fits_into_a_control_frame() {
        for close in [GOING_AWAY, POLICY] {
            assert!(close.payload().len() <= 125);
            assert_ne!(close.masked().unwrap()[2..6], close.masked().unwrap()[2..6]);
        }
    }

    /// The paused clock advances in steps of a millisecond.
    const SLACK: Duration = Duration::from_millis(5);
}
