//! One reading of the text that has come as the beginning of a secret.

use super::form::Form;

/// A reading that began at `start` and has read so many characters of a form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Trace {
    pub(super) form: usize,
    pub(super) matched: usize,
    pub(super) start: usize,
    within: Within,
}

/// What of the next character was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Within {
    /// Nothing.
    Nothing,
    /// A backslash.
    Escape,
    /// `\u`, or `\u0`.
    Unicode { zeros: u8 },
    /// `%`, or `\u00`, or `\x`: two digits follow.
    Code,
    /// The first of the two digits.
    Upper(u8),
}

impl Trace {
    /// One that begins here.
    pub(super) fn at(form: usize, start: usize) -> Self {
        Self { form, matched: 0, start, within: Within::Nothing }
    }

    /// Adds to `next` every way to read one more byte; whether one of them ends the secret.
    pub(super) fn read(&self, form: &Form, byte: u8, next: &mut Vec<Self>) -> bool {
        let place = self.matched;
        match self.within {
            Within::Nothing => {
                match byte {
                    b'%' => self.goes_on(Within::Code, next),
                    b'\\' => self.goes_on(Within::Escape, next),
                    _ => {}
                }
                form.has(place, byte) && self.advance(form, byte, next)
            }
            Within::Escape => {
                match byte {
                    b'u' => self.goes_on(Within::Unicode { zeros: 0 }, next),
                    b'x' => self.goes_on(Within::Code, next),
                    _ => {}
                }
                let is_itself = byte.is_ascii_punctuation() && form.has(place, byte);
                is_itself && self.advance(form, byte, next)
            }
            Within::Unicode { zeros } => {
                match (byte, zeros) {
                    (b'0', 0) => self.goes_on(Within::Unicode { zeros: 1 }, next),
                    (b'0', _) => self.goes_on(Within::Code, next),
                    _ => {}
                }
                false
            }
            Within::Code => {
                if let Some(half) = half(byte).filter(|half| form.has_upper_half(place, *half)) {
                    self.goes_on(Within::Upper(half), next);
                }
                false
            }
            Within::Upper(upper) => {
                let character = half(byte).map(|lower| upper << 4 | lower);
                character.is_some_and(|it| form.has(place, it)) && self.advance(form, byte, next)
            }
        }
    }

    fn goes_on(self, within: Within, next: &mut Vec<Self>) {
        next.push(Self { within, ..self });
    }

    /// One more character is read; whether it was the last.
    fn advance(self, form: &Form, byte: u8, next: &mut Vec<Self>) -> bool {
        let advanced = Self { matched: self.matched + 1, within: Within::Nothing, ..self };
        if advanced.matched == form.len() {
            return true;
        }
        // Backslashes alone can be read in many ways that come to the same; the first began first.
        if byte != b'\\' || !next.iter().any(|other| other.is_as_far_as(&advanced)) {
            next.push(advanced);
        }
        false
    }

    fn is_as_far_as(&self, other: &Self) -> bool {
        (self.form, self.matched, self.within) == (other.form, other.matched, other.within)
    }
}

/// The four bits of a digit.
fn half(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|half| u8::try_from(half).ok())
}
