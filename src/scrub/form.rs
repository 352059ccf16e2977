//! One form in which a secret may stand: for each place, the characters that may be there.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use zeroize::Zeroizing;

/// The characters of a secret in one form; at each place there may be one or the other of two, which are mostly the
/// same.
pub(super) struct Form(Zeroizing<Vec<[u8; 2]>>);

impl Form {
    /// Every form of a secret of at least eight bytes. Each has at least as many characters.
    pub(super) fn all(secret: &[u8]) -> impl Iterator<Item = Self> {
        let plain = [Self::plain(secret), Self::hex(secret)];
        plain.into_iter().chain((0..3).map(|behind| Self::base64(secret, behind)))
    }

    fn plain(secret: &[u8]) -> Self {
        Self::of(secret.len(), secret.iter().map(|byte| [*byte, *byte]))
    }

    fn hex(secret: &[u8]) -> Self {
        let halves = secret.iter().flat_map(|byte| [byte >> 4, byte & 0xf]);
        let digit = |half: u8, digits: &[u8; 16]| digits[usize::from(half)];
        let digits = [b"0123456789abcdef", b"0123456789ABCDEF"];
        Self::of(secret.len() * 2, halves.map(|half| digits.map(|digits| digit(half, digits))))
    }

    /// The characters that the secret alone decides when it stands `behind` bytes behind a boundary between groups of
    /// three.
    fn base64(secret: &[u8], behind: usize) -> Self {
        let text = Zeroizing::new([&vec![0; behind], secret].concat());
        let encoded = Zeroizing::new(STANDARD_NO_PAD.encode(&*text));
        // Six bits are a character.
        let (first, last) = ((behind * 8).div_ceil(6), text.len() * 8 / 6);
        let either = |character: &u8| match character {
            b'+' => *b"+-",
            b'/' => *b"/_",
            other => [*other, *other],
        };
        Self::of(last - first, encoded.as_bytes()[first..last].iter().map(either))
    }

    /// So many characters: with room for them from the beginning, no copy of them is left behind in memory.
    fn of(len: usize, characters: impl Iterator<Item = [u8; 2]>) -> Self {
        let mut places = Zeroizing::new(Vec::with_capacity(len));
        places.extend(characters);
        Self(places)
    }

    /// How many characters it has.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether this character may stand there.
    pub(super) fn has(&self, place: usize, character: u8) -> bool {
        self.0[place].contains(&character)
    }

    /// Whether a character may stand there that these four bits are the upper half of.
    pub(super) fn has_upper_half(&self, place: usize, half: u8) -> bool {
        self.0[place].iter().any(|character| character >> 4 == half)
    }
}
