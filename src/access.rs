//! What a pass is: who holds it may use the proxy, for so long, so often, and to reach so much.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use aws_lc_rs::rand;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::secret::{Fingerprint, Secret};

/// The name of a pass: letters, digits, `-` and `_`, 1 to 64 of them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PassName(Arc<str>);

impl PassName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PassName {
    type Err = BadPassName;

    fn from_str(text: &str) -> Result<Self, BadPassName> {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if (1..=64).contains(&text.len()) && text.bytes().all(fits) {
            Ok(Self(text.into()))
        } else {
            Err(BadPassName)
        }
    }
}

impl fmt::Display for PassName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A text that cannot name a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected letters, digits, `-` and `_`, at most 64")]
pub struct BadPassName;

/// What every pass begins with, so that people and scanners of leaked secrets know it.
const PREFIX: &str = "vkp_";

/// A new pass: 256 random bits.
///
/// # Errors
///
/// When the system gives no random bytes.
pub fn mint() -> Result<Zeroizing<String>, NoRandom> {
    let mut random = Zeroizing::new([0; 32]);
    rand::fill(&mut *random).map_err(|_| NoRandom)?;
    // With room for all of it, so that no copy is left behind by growing.
    let mut pass = Zeroizing::new(String::with_capacity(64));
    pass.push_str(PREFIX);
    URL_SAFE_NO_PAD.encode_string(*random, &mut pass);
    Ok(pass)
}

/// The system gives no random bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the system gives no random bytes")]
pub struct NoRandom;

/// What is kept of a pass: enough to recognise it, and nothing to show it with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassRecord {
    /// Unique among all passes.
    pub name: PassName,
    /// That of the pass. It is random over 256 bits, so that a hash without salt and cost hides it.
    pub digest: Fingerprint,
    /// What it lets its holder reach.
    pub reach: Reach,
    /// When it was made.
    pub created: OffsetDateTime,
    /// Until when it counts; `None` until it is revoked.
    pub expires: Option<OffsetDateTime>,
    /// How many requests it is good for; `None` for any number.
    pub max_requests: Option<u64>,
    /// How many it was used for.
    pub used: u64,
}

impl PassRecord {
    /// Whether its time is over.
    pub fn has_expired(&self, now: OffsetDateTime) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }

    /// Whether it was used as often as it may be.
    pub fn is_used_up(&self) -> bool {
        self.max_requests.is_some_and(|most| self.used >= most)
    }
}

/// What a pass lets its holder reach: the origins of its rules, and more only where it says so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// The names of its rules; `None` for all that there are.
    pub rules: Option<Vec<String>>,
    /// Other hosts too, untouched.
    pub tunnel: bool,
    /// Of the other hosts also those of this machine and of private networks.
    pub allow_private: bool,
}

impl Reach {
    /// Whether the rule of this name is one of its own.
    pub fn has_rule(&self, name: &str) -> bool {
        self.rules.as_ref().is_none_or(|rules| rules.iter().any(|rule| rule == name))
    }
}

/// A pass that is in force. Clients that were let in with it hold it.
#[derive(Debug)]
pub struct Pass {
    /// But for how often it was used, which is in `uses`.
    record: PassRecord,
    uses: Mutex<Uses>,
    ended: CancellationToken,
    /// That of [`Passes::counted`].
    counted: Arc<Notify>,
}

/// How many requests a pass was used for; both change together, or one that is being saved would count as none.
#[derive(Debug)]
struct Uses {
    /// That the store knows of.
    saved: u64,
    /// That it does not know of yet.
    unsaved: u64,
}

impl Pass {
    fn new(record: PassRecord, counted: Arc<Notify>) -> Self {
        let uses = Mutex::new(Uses { saved: record.used, unsaved: 0 });
        Self { record, uses, ended: CancellationToken::new(), counted }
    }

    fn uses(&self) -> MutexGuard<'_, Uses> {
        self.uses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it is called.
    pub fn name(&self) -> &PassName {
        &self.record.name
    }

    /// What it lets its holder reach.
    pub fn reach(&self) -> &Reach {
        &self.record.reach
    }

    /// Cancelled when it counts no more: revoked, changed, or over.
    pub fn ended(&self) -> &CancellationToken {
        &self.ended
    }

    /// Why it has ended.
    pub fn why_ended(&self, now: OffsetDateTime) -> Refused {
        if self.record.has_expired(now) { Refused::Expired } else { Refused::Unknown }
    }

    /// Counts one request.
    ///
    /// # Errors
    ///
    /// [`Refused`] when it counts no more, and for one request too many, which is not counted.
    pub fn take(&self, now: OffsetDateTime) -> Result<(), Refused> {
        if self.record.has_expired(now) {
            return Err(Refused::Expired);
        }
        if self.ended.is_cancelled() {
            return Err(Refused::Unknown);
        }
        let mut uses = self.uses();
        let most = self.record.max_requests.unwrap_or(u64::MAX);
        if uses.saved.saturating_add(uses.unsaved) >= most {
            return Err(Refused::UsedUp);
        }
        uses.unsaved += 1;
        drop(uses);
        self.counted.notify_one();
        Ok(())
    }

    /// Whether a record is that of this pass, however often it was used.
    fn is_of(&self, record: &PassRecord) -> bool {
        PassRecord { used: record.used, ..self.record.clone() } == *record
    }
}

/// Why a pass is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Its time is over.
    #[error("this pass has expired")]
    Expired,
    /// There is none like it, or it was revoked: who guesses is not told which.
    #[error("this pass is not known, or was revoked")]
    Unknown,
    /// It was used as often as it may be.
    #[error("this pass was used for as many requests as it was made for")]
    UsedUp,
}

/// The passes in force.
#[derive(Debug, Default)]
pub struct Passes {
    now: ArcSwap<Vec<Arc<Pass>>>,
    /// Told of each request that is counted.
    counted: Arc<Notify>,
}

impl Passes {
    /// These and no others from now on. One that is not among them, or says something else than before, ends, and with
    /// it all that goes on under it. `counted` are requests that the records know of now
    /// ([`Passes::unsaved`]).
    pub fn replace(&self, records: Vec<PassRecord>, counted: &[(Fingerprint, u64)]) {
        let before = self.now.load_full();
        let renewed = |record: PassRecord| match before.iter().find(|pass| pass.is_of(&record)) {
            Some(pass) => {
                let counted = counted.iter().filter(|(digest, _)| *digest == record.digest);
                let counted = counted.map(|(_, count)| count).sum();
                let mut uses = pass.uses();
                let unsaved = uses.unsaved.saturating_sub(counted);
                *uses = Uses { saved: record.used, unsaved };
                drop(uses);
                pass.clone()
            }
            None => Arc::new(Pass::new(record, self.counted.clone())),
        };
        let now: Vec<Arc<Pass>> = records.into_iter().map(renewed).collect();
        self.now.store(Arc::new(now.clone()));
        for pass in before.iter().filter(|pass| !now.iter().any(|kept| Arc::ptr_eq(kept, pass))) {
            pass.ended.cancel();
        }
    }

    /// The pass that a client shows. Takes as long for a wrong one as for a right one.
    ///
    /// # Errors
    ///
    /// [`Refused`].
    pub fn find(&self, shown: &Secret, now: OffsetDateTime) -> Result<Arc<Pass>, Refused> {
        let digest = shown.fingerprint();
        let mut found = None;
        for pass in self.now.load().iter() {
            // None is left out, so that the time does not tell which one was near.
            if pass.record.digest.is_same(&digest) {
                found = Some(pass.clone());
            }
        }
        let found = found.ok_or(Refused::Unknown)?;
        if found.record.has_expired(now) { Err(Refused::Expired) } else { Ok(found) }
    }

    /// Ends those whose time is over, and says when the next one's will be.
    pub fn end_expired(&self, now: OffsetDateTime) -> Option<OffsetDateTime> {
        let passes = self.now.load();
        for pass in passes.iter().filter(|pass| pass.record.has_expired(now)) {
            pass.ended.cancel();
        }
        passes.iter().filter_map(|pass| pass.record.expires).filter(|at| *at > now).min()
    }

    /// Whether there is one.
    pub fn has_any(&self) -> bool {
        !self.now.load().is_empty()
    }

    /// Waits until a request was counted since this ended last.
    pub async fn counted(&self) {
        self.counted.notified().await;
    }

    /// What was counted and no record knows of, where there is something.
    pub fn unsaved(&self) -> Vec<(Fingerprint, u64)> {
        let counted = |pass: &Arc<Pass>| (pass.record.digest, pass.uses().unsaved);
        self.now.load().iter().map(counted).filter(|(_, count)| *count > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    const NOW: OffsetDateTime = datetime!(2026-11-29 12:00 UTC);

    fn record(name: &str) -> PassRecord {
        PassRecord {
            name: name.parse().unwrap(),
            digest: Secret::new(format!("vkp_{name}")).fingerprint(),
            reach: Reach::default(),
            created: NOW,
            expires: None,
            max_requests: None,
            used: 0,
        }
    }

    fn find(passes: &Passes, name: &str) -> Result<Arc<Pass>, Refused> {
        passes.find(&Secret::new(format!("vkp_{name}")), NOW)
    }

    #[test]
    fn names() {
        for (text, is_name) in
            [("ci", true), ("Dev_1-b", true), ("", false), ("a b", false), ("a/b", false)]
        {
            assert_eq!(text.parse::<PassName>().is_ok(), is_name, "{text}");
        }
        assert!("x".repeat(65).parse::<PassName>().is_err());
    }

    #[test]
    fn only_the_very_pass_is_found() {
        let passes = Passes::default();
        assert_eq!(find(&passes, "a").unwrap_err(), Refused::Unknown);
        passes.replace(vec![record("a"), record("b")], &[]);
        assert_eq!(find(&passes, "b").unwrap().record.name.as_str(), "b");
        for wrong in ["", "B", "b ", "c"] {
            assert_eq!(find(&passes, wrong).unwrap_err(), Refused::Unknown, "{wrong:?}");
        }
    }

    #[test]
    fn one_that_is_revoked_or_changed_ends_and_the_others_stay() {
        let passes = Passes::default();
        passes.replace(vec![record("a"), record("b"), record("c")], &[]);
        let [a, b, c] = ["a", "b", "c"].map(|name| find(&passes, name).unwrap());
        let narrower = Reach { rules: Some(vec![]), ..Reach::default() };
        passes.replace(vec![record("a"), PassRecord { reach: narrower, ..record("b") }], &[]);
        assert_eq!([&a, &b, &c].map(|pass| pass.ended().is_cancelled()), [false, true, true]);
        assert_eq!([&a, &b, &c].map(|pass| pass.take(NOW).is_ok()), [true, false, false]);
        assert!(
            !find(&passes, "b").unwrap().reach().has_rule("any"),
            "it is in force as it is now"
        );
        assert_eq!(find(&passes, "c").unwrap_err(), Refused::Unknown);
    }

    #[test]
    fn a_pass_ends_with_its_time() {
        let passes = Passes::default();
        let later = NOW + time::Duration::HOUR;
        passes.replace(vec![PassRecord { expires: Some(later), ..record("a") }, record("b")], &[]);
        let [a, b] = ["a", "b"].map(|name| find(&passes, name).unwrap());
        assert_eq!(passes.end_expired(NOW), Some(later));
        assert!(a.take(later - time::Duration::NANOSECOND).is_ok());
        assert_eq!(a.take(later), Err(Refused::Expired));
        assert_eq!(passes.end_expired(later), None);
        assert_eq!([a, b].map(|pass| pass.ended().is_cancelled()), [true, false]);
        let found = passes.find(&Secret::new("vkp_a"), later);
        assert_eq!(found.unwrap_err(), Refused::Expired);
    }

    #[test]
    fn no_request_too_many_while_it_is_saved() {
        const MOST: u64 = 20_000;
        let passes = Passes::default();
        let limited = |used| PassRecord { max_requests: Some(MOST), used, ..record("a") };
        passes.replace(vec![limited(0)], &[]);
        let pass = find(&passes, "a").unwrap();
        let taken: u64 = std::thread::scope(|scope| {
            let takers: Vec<_> = (0..2)
                .map(|_| scope.spawn(|| (0..MOST).filter(|_| pass.take(NOW).is_ok()).count()))
                .collect();
            let mut used = 0;
            while takers.iter().any(|taker| !taker.is_finished()) {
                let counted = passes.unsaved();
                used += counted.iter().map(|(_, count)| count).sum::<u64>();
                passes.replace(vec![limited(used)], &counted);
            }
            takers.into_iter().map(|taker| taker.join().unwrap() as u64).sum()
        });
        assert_eq!(taken, MOST);
    }

    #[test]
    fn requests_are_counted_once_and_across_saving() {
        let passes = Passes::default();
        let five = |used| PassRecord { max_requests: Some(5), used, ..record("a") };
        passes.replace(vec![five(1)], &[]);
        let pass = find(&passes, "a").unwrap();
        let take = || pass.take(NOW).is_ok();
        assert!(take() && take());
        let counted = passes.unsaved();
        assert_eq!(counted, [(five(0).digest, 2)]);
        assert!(take(), "one more while it is saved");
        // Another proxy has counted none meanwhile.
        passes.replace(vec![five(3)], &counted);
        assert_eq!(passes.unsaved(), [(five(0).digest, 1)]);
        assert!(take() && !take(), "five in all");
        assert_eq!(pass.take(NOW), Err(Refused::UsedUp));
        passes.replace(vec![five(0)], &[]);
        assert_eq!(pass.take(NOW), Ok(()), "the record says so");
    }
}
