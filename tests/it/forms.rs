//! Looks for secrets in every form in which one may be written.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use memchr::memmem;

/// The first secret that a text holds in any of the forms in which one may be written.
pub(crate) fn leak<'a>(secrets: &'a [String], text: &str) -> Option<&'a String> {
    leak_in_bytes(secrets, text.as_bytes())
}

/// The same, of what need not be text.
pub(crate) fn leak_in_bytes<'a>(secrets: &'a [String], bytes: &[u8]) -> Option<&'a String> {
    let holds = |form: &String| memmem::find(bytes, form.as_bytes()).is_some();
    secrets.iter().find(|secret| forms(secret).iter().any(holds))
}

/// Those forms.
pub(crate) fn forms(secret: &str) -> Vec<String> {
    let hex: String = secret.bytes().map(|byte| format!("{byte:02x}")).collect();
    let percent: String = secret.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let json = serde_json::Value::from(secret).to_string().trim_matches('"').to_owned();
    // What stands before a secret shifts its Base64 by a byte or two, and spoils both ends.
    let middle = |text: String| text[4..text.len() - 4].to_owned();
    let shifted = (0..3).flat_map(|skip| {
        let rest = &secret.as_bytes()[skip..];
        [middle(STANDARD.encode(rest)), middle(URL_SAFE_NO_PAD.encode(rest))]
    });
    let (reversed, upper) = (secret.chars().rev().collect(), secret.to_uppercase());
    let plain = [secret.to_owned(), json, hex.to_uppercase(), hex, percent, reversed, upper];
    shifted.chain(plain).collect()
}

#[test]
fn the_scan_finds_what_is_planted() {
    let secrets = ["vk-canary-planted-on-purpose/+".to_owned()];
    assert_eq!(leak(&secrets, "nothing here"), None);
    for form in forms(&secrets[0]) {
        assert!(leak(&secrets, &format!("before {form} after")).is_some(), "{form}");
    }
    for before in ["", "a", "ab"] {
        let basic = STANDARD.encode(format!("{before}{} and more", secrets[0]));
        assert!(leak(&secrets, &basic).is_some(), "{before}");
    }
}
