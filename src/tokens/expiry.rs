//! Says when an access token is due to be refreshed and when it must no longer be sent.

use std::time::{Duration, Instant};

use time::OffsetDateTime;

use super::rotation::spread;
use crate::clock::Clock;
use crate::credential::TokenSet;
use crate::credential::claims::Claims;
use crate::oauth::Answer;
use crate::store::Header;

/// A point in time, on the clock that it is known by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Moment {
    /// This process's monotonic clock: for a token that it received itself.
    Here(Instant),
    /// This machine's wall clock: for a token that another process on it received.
    Local(OffsetDateTime),
    /// The issuer's wall clock: for what a token says of itself.
    Issuer(OffsetDateTime),
}

/// The two moments of an access token; `None` where nothing is known, which then never comes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Times {
    /// From when on it is refreshed in the background.
    pub(super) due: Option<Moment>,
    /// From when on it is known to be worthless.
    pub(super) expires: Option<Moment>,
}

/// What a process knows of a token because it received it itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Received {
    /// When.
    pub(super) at: Instant,
    /// How long it lives from then on.
    pub(super) lifetime: Option<Duration>,
}

impl Times {
    /// A token that nothing is known of, or that needs no refresh.
    pub(super) const NEVER: Self = Self { due: None, expires: None };

    /// The moments of a set that its header speaks of, and that this process may have received.
    pub(super) fn of(set: &TokenSet, header: &Header, received: Option<Received>) -> Self {
        let claims = Claims::of(&set.access).unwrap_or_default();
        let jitter = spread(&header.owner, header.generation);
        match (received, header.lifetime, set.last_refresh, claims.expires_at) {
            (Some(Received { at, lifetime: Some(lifetime) }), ..) => {
                let lifetime = lifetime.min(LONGEST_LIFETIME);
                Self {
                    due: Some(Moment::Here(at + lifetime - margin(lifetime, jitter))),
                    expires: Some(Moment::Here(at + lifetime)),
                }
            }
            (_, Some(lifetime), Some(since), _) => {
                let expires = later(since, lifetime.min(LONGEST_LIFETIME));
                Self {
                    due: Some(Moment::Local(earlier(expires, margin(lifetime, jitter)))),
                    expires: Some(Moment::Local(expires)),
                }
            }
            (_, _, since, Some(expires)) => {
                let lived = claims.issued_at.or(since).map(|since| expires - since);
                let lived = lived.and_then(|lived| Duration::try_from(lived).ok());
                let margin = margin(lived.unwrap_or(LONGEST_LIFETIME), jitter);
                Self {
                    due: Some(Moment::Issuer(earlier(expires, margin))),
                    expires: Some(Moment::Issuer(expires)),
                }
            }
            (_, _, Some(since), None) => {
                Self { due: Some(Moment::Local(later(since, UNKNOWN_LIFETIME))), expires: None }
            }
            (_, _, None, None) => Self::NEVER,
        }
    }
}

/// How long the access token of an answer lives from now on: as the issuer says, else as the token
/// says of itself.
pub(super) fn lifetime(answer: &Answer, now: OffsetDateTime) -> Option<Duration> {
    let by_itself = || {
        let claims = Claims::of(&answer.access)?;
        let (expires, issued) = (claims.expires_at?, claims.issued_at);
        let of = |since: Option<OffsetDateTime>| Duration::try_from(expires - since?).ok();
        // An issuer that hands out the same token again: it has lived for a while already.
        let left = of(answer.date).filter(|left| !left.is_zero());
        let whole = of(issued).or_else(|| of(Some(now))).filter(|whole| !whole.is_zero())?;
        Some(left.map_or(whole, |left| left.min(whole)))
    };
    answer.expires_in.or_else(by_itself).map(|lives| lives.min(LONGEST_LIFETIME))
}

impl Moment {
    /// How long until this comes; zero when it has.
    pub(super) fn left(self, clock: &Clock, skew: time::Duration) -> Duration {
        let left = |moment: OffsetDateTime, now: OffsetDateTime| {
            Duration::try_from(moment - now).unwrap_or(Duration::ZERO)
        };
        match self {
            Self::Here(moment) => moment.saturating_duration_since(clock.instant()),
            Self::Local(moment) => left(moment, clock.now()),
            Self::Issuer(moment) => left(moment, clock.now().saturating_add(skew)),
        }
    }

    /// This moment on the wall clock of this machine, for people.
    pub(super) fn on_the_wall(self, clock: &Clock, skew: time::Duration) -> OffsetDateTime {
        match self {
            Self::Here(_) => later(clock.now(), self.left(clock, skew)),
            Self::Local(moment) => moment,
            Self::Issuer(moment) => moment.saturating_sub(skew),
        }
    }
}

/// How long before its end a token is due. Codex refreshes 5 minutes before the end, so a token that
/// lives for long is due well before that, and Codex never needs to. `jitter` (0 to 1) makes it up to
/// a tenth earlier. Never more than half of a life, or a short one would be refreshed for ever.
fn margin(lifetime: Duration, jitter: f64) -> Duration {
    let margin = (lifetime / 5).min(LONGEST_MARGIN).max(SHORTEST_MARGIN);
    (margin + margin.mul_f64(jitter / 10.0)).min(lifetime / 2)
}

// A cache may hold any date: none may overflow.
fn earlier(moment: OffsetDateTime, by: Duration) -> OffsetDateTime {
    moment.saturating_sub(time::Duration::try_from(by).unwrap_or(time::Duration::MAX))
}

pub(super) fn later(moment: OffsetDateTime, by: Duration) -> OffsetDateTime {
    moment.saturating_add(time::Duration::try_from(by).unwrap_or(time::Duration::MAX))
}

/// Twice the 5 minutes of Codex, so that an issuer that is in trouble for a few does not leave the refresh to it.
const LONGEST_MARGIN: Duration = Duration::from_secs(10 * 60);

/// A refresh that meets no trouble has ended by then, so that nobody waits for the successor of a short life.
const SHORTEST_MARGIN: Duration = Duration::from_secs(5);

/// Longest life of an access token that is believed: a year.
const LONGEST_LIFETIME: Duration = Duration::from_secs(366 * 86_400);

/// When a set is refreshed whose life nobody knows; Codex does it after 8 days.
const UNKNOWN_LIFETIME: Duration = Duration::from_secs(7 * 86_400);

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;

    use super::*;
    use crate::credential::Login;
    use crate::secret::Secret;
    use crate::store::{RecordStore as _, memory::MemoryStore};

    const MINUTE: u64 = 60;
    const HOUR: u64 = 60 * MINUTE;
    const DAY: u64 = 24 * HOUR;

    fn jwt(claims: &str) -> Secret {
        Secret::new(format!("e30.{}.s", URL_SAFE_NO_PAD.encode(claims)))
    }

    /// A token issued at `iat` and stored at `last_refresh`; seconds of the wall clock, 0 for absent.
    fn set(iat: u64, exp: u64, last_refresh: i64) -> TokenSet {
        let claim = |name: &str, at: u64| match at {
            0 => String::new(),
            at => format!(r#","{name}":{at}"#),
        };
        TokenSet {
            access: jwt(&format!(r#"{{"x":0{}{}}}"#, claim("iat", iat), claim("exp", exp))),
            refresh: Some(Secret::new("r")),
            id: None,
            account_id: None,
            last_refresh: (last_refresh != 0)
                .then(|| OffsetDateTime::from_unix_timestamp(last_refresh).unwrap()),
        }
    }

    async fn header(set: &TokenSet, lifetime: Option<u64>) -> Header {
        let store = MemoryStore::new(Some(Login::ChatGpt(set.clone())));
        let header = store.get().await.unwrap().1.header;
        Header { lifetime: lifetime.map(Duration::from_secs), ..header }
    }

    #[tokio::test]
    async fn due_before_codex_and_before_the_end() {
        const T: u64 = 1_800_000_000;
        let wall = |moment: Option<Moment>| match moment {
            Some(Moment::Issuer(at) | Moment::Local(at)) => Some(at.unix_timestamp() - T as i64),
            Some(Moment::Here(_)) => panic!("received by nobody here"),
            None => None,
        };
        // iat, exp, last_refresh, lifetime of the header; seconds from T: due (latest), expiry.
        let (t, hour, day) = (T, HOUR as i64, DAY as i64);
        let table = [
            (t, t + HOUR, T as i64, None, Some(hour - 600), Some(hour)),
            (t, t + 10 * DAY, T as i64, None, Some(10 * day - 600), Some(10 * day)),
            (t, t + 10 * MINUTE, 0, None, Some(480), Some(600)),
            (t, t + 20, 0, None, Some(15), Some(20)),
            (t, t + 4, 0, None, Some(2), Some(4)),
            (0, t + HOUR, 0, None, Some(hour - 600), Some(hour)),
            (0, t + 100, T as i64, None, Some(80), Some(100)),
            (0, 0, T as i64, None, Some(7 * day), None),
            (0, 0, 0, None, None, None),
            // What we received on this machine is told by this machine's clock.
            (t + DAY, t + DAY + HOUR, T as i64, Some(HOUR), Some(hour - 600), Some(hour)),
            (0, 0, T as i64, Some(100), Some(80), Some(100)),
        ];
        for (iat, exp, last_refresh, lifetime, due, expires) in table {
            let set = set(iat, exp, last_refresh);
            let times = Times::of(&set, &header(&set, lifetime).await, None);
            let case = format!("{iat} {exp} {last_refresh} {lifetime:?}");
            assert_eq!(wall(times.expires), expires, "{case}");
            let (found, latest) = (wall(times.due), due);
            assert!(found <= latest && found.is_some() == latest.is_some(), "{case}: {found:?}");
            if let (Some(found), Some(latest)) = (found, latest) {
                let tenth = expires.map_or(0, |expires| (expires - latest) / 10);
                assert!(found >= latest - tenth - 1, "{case}: {found} is too early");
            }
        }
    }

    #[tokio::test]
    async fn no_date_is_too_strange() {
        const LAST: u64 = 253_402_300_799;
        let (clock, skew) = (Clock::system(), time::Duration::days(-3_000_000));
        let last = LAST as i64;
        for (iat, exp, last_refresh) in
            [(1, LAST, last), (LAST, 1, -last), (0, LAST, -last), (0, 0, last), (0, 0, -last)]
        {
            for lifetime in [None, Some(0), Some(u64::MAX)] {
                let set = set(iat, exp, last_refresh);
                let times = Times::of(&set, &header(&set, lifetime).await, None);
                for moment in [times.due, times.expires].into_iter().flatten() {
                    for skew in [skew, -skew, time::Duration::ZERO] {
                        moment.left(&clock, skew);
                        moment.on_the_wall(&clock, skew);
                    }
                }
            }
        }
    }

    #[tokio::test]
    async fn what_was_received_here_ages_here() {
        let clock = Clock::system();
        let set = set(1_000_000_000, 1_000_003_600, 1_000_000_000);
        let lifetime = Some(Duration::from_secs(HOUR));
        let received = Some(Received { at: clock.instant(), lifetime });
        let header = header(&set, Some(HOUR)).await;
        let left = |times: Times| times.expires.unwrap().left(&clock, time::Duration::ZERO);
        assert_eq!(left(Times::of(&set, &header, None)), Duration::ZERO);
        let times = Times::of(&set, &header, received);
        assert!(left(times) > Duration::from_secs(HOUR - 5));
        clock.advance(time::Duration::minutes(51));
        assert!(times.due.unwrap().left(&clock, time::Duration::ZERO).is_zero());
        assert!(left(times) > Duration::from_secs(8 * MINUTE));
        clock.advance(time::Duration::minutes(10));
        assert_eq!(left(times), Duration::ZERO);
    }

    #[test]
    fn an_issuer_is_believed_before_its_token() {
        let now = OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap();
        let hour = r#"{"iat":1800000000,"exp":1800003600}"#;
        let at = |seconds: i64| Some(now + time::Duration::seconds(seconds));
        let table = [
            (hour, Some(60), None, Some(60)),
            (hour, None, None, Some(3600)),
            (hour, None, at(600), Some(3000)),
            (hour, None, at(-600), Some(3600)),
            (hour, None, at(7200), Some(3600)),
            (r#"{"exp":1800000100}"#, None, None, Some(100)),
            (r#"{"exp":1700000000}"#, None, None, None),
            (r#"{"iat":0,"exp":253402300799}"#, None, None, Some(366 * DAY)),
            ("{}", None, None, None),
        ];
        for (claims, expires_in, date, expected) in table {
            let expires_in = expires_in.map(Duration::from_secs);
            let answer = Answer { access: jwt(claims), refresh: None, id: None, expires_in, date };
            let seconds = lifetime(&answer, now).map(|lives| lives.as_secs());
            assert_eq!(seconds, expected, "{claims} {date:?}");
        }
    }
}
