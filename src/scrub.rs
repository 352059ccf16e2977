//! Finds a secret in what an upstream answers, in the encodings in which one is repeated, and puts filler in its place.

mod form;
#[cfg(test)]
mod tests;
mod trace;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::secret::Secret;
use form::Form;
use trace::Trace;

/// Knows a secret, or several, when it sees one: as it is, in hexadecimal, and in Base64 of either alphabet behind
/// whatever it stands; in each of them any character may be percent-encoded or escaped as JSON has it, in any case.
///
/// Of Base64 it is the characters that the secret alone decides: those at either end, which it shares with what
/// stands before and behind, tell at most four bits of a byte.
///
/// Made once for each value of a credential. Filler is as long as what it replaces, so that every length stays right.
pub struct Scrubber {
    forms: Vec<Arc<Form>>,
    begins: Begins,
}

impl Scrubber {
    /// A scrubber of this secret.
    ///
    /// # Errors
    ///
    /// [`TooShort`] for one that would be found in much that has nothing to do with it.
    pub fn new(secret: &Secret) -> Result<Self, TooShort> {
        let text = secret.expose().as_bytes();
        if text.len() < SHORTEST {
            return Err(TooShort);
        }
        let forms: Vec<_> = Form::all(text).map(Arc::new).collect();
        Ok(Self { begins: Begins::of(&forms), forms })
    }

    /// A scrubber of what either of the two knows.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        let forms: Vec<_> = self.forms.iter().chain(&other.forms).cloned().collect();
        Self { begins: Begins::of(&forms), forms }
    }

    /// The same text with filler for the secret; `None` where it is not in it.
    pub fn clean(self: &Arc<Self>, text: &[u8]) -> Option<Vec<u8>> {
        let mut scrubbing = Scrubbing::new(self.clone());
        let passed = scrubbing.pass(Bytes::copy_from_slice(text));
        let cleaned = [passed, scrubbing.end()].concat();
        (cleaned != text).then_some(cleaned)
    }
}

impl fmt::Debug for Scrubber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scrubber(..)")
    }
}

/// The secret is too short to be scrubbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is shorter than {SHORTEST} characters, too short to be scrubbed from answers")]
pub struct TooShort;

/// The shortest secret that is scrubbed: fewer characters stand in texts by chance, whose filler would spoil them, and
/// what somebody can find by reading filler's place and length off is no secret.
const SHORTEST: usize = 8;

const FILLER: u8 = b'*';

/// Scrubs one text that comes in pieces.
///
/// Invariant: what has come and not been given back is the longest end of it that may be the beginning of a secret. That
/// is at most twelve times as long as the secret: two digits for each of its bytes, each of them escaped with six.
#[derive(Debug)]
pub struct Scrubbing {
    scrubber: Arc<Scrubber>,
    held: Vec<u8>,
    /// Every reading of an end of the text as the beginning of a secret; those that began earlier come first.
    traces: Vec<Trace>,
    /// Kept for its room.
    next: Vec<Trace>,
}

impl Scrubbing {
    /// Nothing has come yet.
    pub fn new(scrubber: Arc<Scrubber>) -> Self {
        Self { scrubber, held: Vec::new(), traces: Vec::new(), next: Vec::new() }
    }

    /// Takes the next piece, and gives back what may go on now, which may be nothing.
    pub fn pass(&mut self, mut piece: Bytes) -> Bytes {
        let before = self.held.len();
        let found = self.look(&piece);
        let decided = self.traces.first().map_or(before + piece.len(), |trace| trace.start);
        self.traces.iter_mut().for_each(|trace| trace.start -= decided);
        if before == 0 && found.is_empty() {
            self.held.extend_from_slice(&piece.split_off(decided));
            return piece;
        }
        self.held.extend_from_slice(&piece);
        found.into_iter().for_each(|found| self.held[found].fill(FILLER));
        let rest = self.held.split_off(decided);
        std::mem::replace(&mut self.held, rest).into()
    }

    /// The text is at its end: gives back what was held. A secret that is cut off after as much as could be a secret
    /// of its own is no less one.
    pub fn end(&mut self) -> Bytes {
        let cut = self.traces.iter().find(|trace| trace.matched >= SHORTEST);
        if let Some(start) = cut.map(|trace| trace.start) {
            self.held[start..].fill(FILLER);
        }
        self.traces.clear();
        std::mem::take(&mut self.held).into()
    }

    /// How much is held.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Follows every reading through a piece; where secrets are, counted from the beginning of what is held.
    fn look(&mut self, piece: &[u8]) -> Vec<Range<usize>> {
        let before = self.held.len();
        let mut found = Vec::new();
        let mut at = 0;
        while at < piece.len() {
            if self.traces.is_empty() {
                at += self.scrubber.begins.skip(&piece[at..]);
            }
            if let Some(start) = self.step(before + at, piece[at]) {
                found.push(start..before + at + 1);
            }
            at += 1;
        }
        found
    }

    /// Reads one more byte, which stands at `at`; where the longest secret begins that it ends.
    fn step(&mut self, at: usize, byte: u8) -> Option<usize> {
        let forms = &self.scrubber.forms;
        let begun = (0..forms.len()).map(|form| Trace::at(form, at));
        let mut ended = None;
        for trace in self.traces.drain(..).chain(begun) {
            if trace.read(&forms[trace.form], byte, &mut self.next) {
                ended.get_or_insert(trace.start);
            }
        }
        std::mem::swap(&mut self.traces, &mut self.next);
        ended
    }
}

/// Which two bytes may begin a secret: what most texts are passed over by.
struct Begins(Box<[u64]>);

impl Begins {
    fn of(forms: &[Arc<Form>]) -> Self {
        let mut pairs = vec![0; (1 << 16) / 64].into_boxed_slice();
        let (mut first, mut second) = (Vec::new(), Vec::new());
        for byte in 0..=u8::MAX {
            first.clear();
            for (at, form) in forms.iter().enumerate() {
                Trace::at(at, 0).read(form, byte, &mut first);
            }
            // Most bytes begin nothing.
            for next in (0..=u8::MAX).filter(|_| !first.is_empty()) {
                second.clear();
                for trace in &first {
                    trace.read(&forms[trace.form], next, &mut second);
                }
                let pair = usize::from(u16::from_be_bytes([byte, next]));
                pairs[pair / 64] |= u64::from(!second.is_empty()) << (pair % 64);
            }
        }
        Self(pairs)
    }

    /// How many bytes of a text that is not empty are sure to begin no secret, all but the last.
    fn skip(&self, text: &[u8]) -> usize {
        let may_begin = |pair: &[u8]| {
            let pair = usize::from(pair[0]) << 8 | usize::from(pair[1]);
            self.0[pair / 64] >> (pair % 64) & 1 == 1
        };
        text.windows(2).position(may_begin).unwrap_or(text.len() - 1)
    }
}
