//! Holds a secret so that it can be used but not shown: wiped on drop, no `Display`, redacted `Debug`.

use std::fmt;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use zeroize::Zeroizing;

/// A secret string: a token, an API key, a password.
///
/// Invariant: the only way to the text is [`Secret::expose`], which the shape test allows in the few
/// rooms that write a secret to its destination. Not serialisable; equal secrets cannot be compared
/// with `==`, compare their [`Fingerprint`]s.
#[derive(Clone)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Takes ownership of the text. An empty secret is allowed; callers decide what it means.
    pub fn new(text: impl Into<String>) -> Self {
        Self(Zeroizing::new(text.into()))
    }

    /// The text itself. Everything that calls this is a place where a secret leaves the program.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// What may be stored and compared in place of the secret.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(self.0.as_bytes())
    }

    /// Whether the text is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The secret as people may see it: the first 8 and the last 5 characters, or `***` for one of 13
    /// characters or fewer. Codex masks its API keys the same way.
    pub fn masked(&self) -> String {
        let chars = self.0.chars().count();
        if chars <= 13 {
            return "***".to_owned();
        }
        let head: String = self.0.chars().take(8).collect();
        let tail: String = self.0.chars().skip(chars - 5).collect();
        format!("{head}***{tail}")
    }

    /// Checks that the text can stand in a header field: visible ASCII only, 1 byte to 16 KiB.
    ///
    /// # Errors
    ///
    /// [`UnfitSecret`] names the first reason found and never quotes the text.
    pub fn check_field_value(&self) -> Result<(), UnfitSecret> {
        if self.is_empty() {
            return Err(UnfitSecret::Empty);
        }
        if self.0.len() > MAX_SECRET_BYTES {
            return Err(UnfitSecret::TooLong);
        }
        match self.0.bytes().position(|byte| !byte.is_ascii_graphic()) {
            Some(at) => Err(UnfitSecret::Octet { at }),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(***)")
    }
}

/// Longest secret that is put into a header field: 16 KiB, twice the largest token seen (a ChatGPT
/// access token is about 2 KiB) and below the head limit of common servers.
const MAX_SECRET_BYTES: usize = 16 * 1024;

/// Why a secret cannot be sent in a header field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnfitSecret {
    /// Nothing in it.
    #[error("the value is empty")]
    Empty,
    /// A control character, a space or a byte outside ASCII.
    #[error("byte {} of the value is not a visible ASCII character", .at + 1)]
    Octet {
        /// Offset of the byte, from 0.
        at: usize,
    },
    /// The end of a line, behind which there is more, if only another one.
    #[error("there is a line's end in the value: one line is all of it")]
    LineEnd,
    /// Longer than a header field may reasonably be.
    #[error("the value is longer than 16 KiB")]
    TooLong,
}

/// SHA-256 of a secret: says whether two are the same without holding either.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// The fingerprint of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let mut out = [0; 32];
        out.copy_from_slice(digest(&SHA256, bytes).as_ref());
        Self(out)
    }

    /// Whether the two are the same, in a time that does not tell how much of them is. For one that somebody else
    /// chose; `==` is for our own.
    pub fn is_same(&self, other: &Self) -> bool {
        verify_slices_are_equal(&self.0, &other.0).is_ok()
    }

    /// Lower-case hexadecimal, 64 characters.
    pub fn to_hex(self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// As `openssl x509 -fingerprint -sha256` and browsers show it: upper case, a colon between bytes.
    pub fn with_colons(self) -> String {
        let bytes: Vec<String> = self.0.iter().map(|byte| format!("{byte:02X}")).collect();
        bytes.join(":")
    }

    /// Reads what [`Fingerprint::to_hex`] wrote; `None` for anything else.
    pub fn from_hex(hex: &str) -> Option<Self> {
        if hex.len() != 64 || !hex.is_ascii() {
            return None;
        }
        let mut out = [0; 32];
        for (byte, pair) in out.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).ok()?;
            *byte = u8::from_str_radix(pair, 16).ok()?;
        }
        Some(Self(out))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_hex()[..12])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_nothing() {
        assert_eq!(format!("{:?}", Secret::new("sk-very-secret")), "Secret(***)");
    }

    #[test]
    fn masks_as_codex_does() {
        let table = [
            ("sk-test-abcdefghij", "sk-test-***fghij"),
            ("0123456789abc", "***"),
            ("", "***"),
            ("0123456789abcd", "01234567***9abcd"),
        ];
        for (plain, masked) in table {
            assert_eq!(Secret::new(plain).masked(), masked);
        }
    }

    #[test]
    fn refuses_what_cannot_stand_in_a_header() {
        let long = "x".repeat(MAX_SECRET_BYTES + 1);
        let table = [
            ("", Some(UnfitSecret::Empty)),
            ("abc\r\nHost: evil", Some(UnfitSecret::Octet { at: 3 })),
            ("a b", Some(UnfitSecret::Octet { at: 1 })),
            ("nul\0", Some(UnfitSecret::Octet { at: 3 })),
            ("caf\u{e9}", Some(UnfitSecret::Octet { at: 3 })),
            (long.as_str(), Some(UnfitSecret::TooLong)),
            ("sk-ok_123.~", None),
        ];
        for (text, expected) in table {
            assert_eq!(Secret::new(text).check_field_value().err(), expected, "{text:?}");
        }
    }

    #[test]
    fn fingerprints_survive_hex() {
        let one = Secret::new("a").fingerprint();
        assert_eq!(Fingerprint::from_hex(&one.to_hex()), Some(one));
        assert_eq!(Fingerprint::from_hex("zz"), None);
        let colons = one.with_colons();
        assert_eq!((colons.len(), &colons[..6]), (95, "CA:97:"));
        assert_ne!(one, Secret::new("b").fingerprint());
    }
}
