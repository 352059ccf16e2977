//! The pages that the pretend issuer shows to people: plain, and with nothing from elsewhere.

use http::{Response, StatusCode};

use crate::sandbox::{Body, reply};

/// A page with this inside; what came from a request is [`escaped`] in it.
pub(super) fn page(status: StatusCode, inside: &str) -> Response<Body> {
    let text = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">\
         <meta name=\"color-scheme\" content=\"light dark\">\
         <title>Sandbox issuer</title><h1>Sandbox issuer</h1>{inside}</html>\n"
    );
    reply(status, "text/html; charset=utf-8", text)
}

/// The text as it may stand in a page and between the quotes of an attribute.
pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
