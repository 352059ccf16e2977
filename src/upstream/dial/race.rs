//! Tries the addresses of a host one soon after the other, and takes the first that answers (RFC 8305).

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;

/// How long an attempt has before the next one begins beside it (RFC 8305 section 5). The first goes on meanwhile.
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// The families in turns, the one that the system put first before the other (RFC 8305 section 4), so that one dead
/// family costs one delay and not one for each of its addresses.
pub(super) fn in_turns(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first_is_ipv6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let mut counts = [0; 2];
    let place = |address: SocketAddr| {
        let is_second = address.is_ipv6() != first_is_ipv6;
        let count = &mut counts[usize::from(is_second)];
        *count += 1;
        ((*count, is_second), address)
    };
    let mut placed: Vec<_> = addresses.into_iter().map(place).collect();
    placed.sort_by_key(|(place, _)| *place);
    placed.into_iter().map(|(_, address)| address).collect()
}

/// The first connection that is made. The next attempt begins when the delay is over or one has failed; all that
/// have begun go on, and end with the first success.
///
/// # Errors
///
/// That of the first attempt that failed, when all have; there is no limit of time.
pub(super) async fn race<A, T>(
    addresses: Vec<A>,
    connect: impl AsyncFn(A) -> io::Result<T>,
) -> io::Result<T> {
    let (mut waiting, mut attempts) = (addresses.into_iter(), FuturesUnordered::new());
    let mut failed = None;
    loop {
        attempts.extend(waiting.next().map(|address| connect(address)));
        tokio::select! {
            biased;
            Some(outcome) = attempts.next() => match outcome {
                Ok(connection) => return Ok(connection),
                Err(error) => failed = failed.or(Some(error)),
            },
            () = tokio::time::sleep(ATTEMPT_DELAY), if waiting.len() > 0 => {}
            else => return Err(failed.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::future::pending;

    use tokio::time::{Instant, sleep};

    use super::*;

    #[test]
    fn families_take_turns_and_keep_their_order() {
        for (given, expected) in [
            ("", ""),
            ("4a 4b", "4a 4b"),
            ("6a 6b 6c 4a 4b", "6a 4a 6b 4b 6c"),
            ("4a 6a 6b", "4a 6a 6b"),
            ("6a 4a 4b 4c 6b", "6a 4a 6b 4b 4c"),
        ] {
            let address = |name: &str| {
                let host = match name.strip_prefix('4') {
                    Some(letter) => format!("192.0.2.{}", letter.as_bytes()[0]),
                    None => format!("[2001:db8::{}]", &name[1..]),
                };
                format!("{host}:443").parse::<SocketAddr>().unwrap()
            };
            let read = |text: &str| text.split_whitespace().map(address).collect::<Vec<_>>();
            assert_eq!(in_turns(read(given)), read(expected), "{given}");
        }
    }

    /// When each attempt began, and the outcome with its time, in milliseconds of the paused clock. An address is
    /// what happens there: after so many milliseconds it answers (above 0) or refuses (below), and 0 is dead.
    async fn run(addresses: &[i64]) -> (Vec<u128>, Result<i64, String>, u128) {
        let (clock, begun) = (Instant::now(), RefCell::new(Vec::new()));
        let outcome = race(addresses.to_vec(), async |address: i64| {
            begun.borrow_mut().push(clock.elapsed().as_millis());
            if address == 0 {
                pending::<()>().await;
            }
            sleep(Duration::from_millis(address.unsigned_abs())).await;
            if address < 0 { Err(io::Error::other(address.to_string())) } else { Ok(address) }
        });
        let outcome = outcome.await.map_err(|error| error.to_string());
        (begun.into_inner(), outcome, clock.elapsed().as_millis())
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_begins_after_a_delay_or_a_failure_and_the_first_answer_wins() {
        assert_eq!(run(&[5, 1]).await, (vec![0], Ok(5), 5));
        assert_eq!(run(&[0, 0, 0, 7]).await, (vec![0, 250, 500, 750], Ok(7), 757));
        assert_eq!(run(&[-10, -20, 7]).await, (vec![0, 10, 30], Ok(7), 37));
        // The slow one is not given up.
        assert_eq!(run(&[300, 0]).await, (vec![0, 250], Ok(300), 300));
        assert_eq!(run(&[400, 300, 0]).await, (vec![0, 250], Ok(400), 400));
        assert_eq!(run(&[-300, -10]).await, (vec![0, 250], Err("-10".to_owned()), 300));
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_to_try_is_a_failure() {
        assert!(run(&[]).await.1.is_err());
    }
}
