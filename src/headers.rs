//! Header fields that belong to one connection, or to us, and must not cross the proxy.

use http::header::{
    CONNECTION, CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, TE, TRANSFER_ENCODING, UPGRADE,
};

/// Says on every refusal which one it is; its value is a stable code.
pub const VALETKEY_ERROR: HeaderName = HeaderName::from_static("x-valetkey-error");

/// Goes with each CONNECT to a proxy in front of us: a list of those of us that have passed it on. Like `Via` (RFC
/// 9110 section 7.6.3) it shows a loop through other proxies, but some of those refuse what has a `Via`.
pub const VALETKEY_VIA: HeaderName = HeaderName::from_static("x-valetkey-via");

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");

/// Takes out what is meant for this connection only: everything that `Connection` lists, and the
/// fields that RFC 9110 section 7.6.1 names. `TE: trailers` is kept, for it is a promise that we keep.
///
/// Must run before injection, so that `Connection: authorization` cannot drop what we set.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        strip_listed(headers);
    }
    let wants_trailers = headers.get_all(TE).iter().any(accepts_trailers);
    // The coding says where the message ends, and a length beside it is wrong (RFC 9112 section 6.3).
    if headers.contains_key(TRANSFER_ENCODING) {
        headers.remove(CONTENT_LENGTH);
    }
    for name in [CONNECTION, KEEP_ALIVE, TE, TRANSFER_ENCODING, UPGRADE] {
        headers.remove(name);
    }
    strip_proxy_fields(headers);
    if wants_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// Takes out of an upstream's answer what is meant for its connection only, and what would have it look like a refusal
/// of ours.
pub fn clean_answer(headers: &mut HeaderMap) {
    headers.remove(VALETKEY_ERROR);
    strip_hop_by_hop(headers);
}

/// Takes out of trailers what frames a message or belongs to one connection (RFC 9110 section 6.5.1). HTTP/2 sends no
/// trailers that have such a field, and the message would never end.
pub fn strip_trailers(trailers: &mut HeaderMap) {
    let found: Vec<HeaderName> =
        trailers.keys().filter(|name| !may_be_injected(name)).cloned().collect();
    for name in found {
        trailers.remove(name);
    }
    trim_values(trailers);
}

/// Takes white space off both ends of every value: HTTP/2 lets it pass, HTTP/1.1 does not count it, and a message that
/// goes on must have none (RFC 9113 section 8.2.1).
pub fn trim_values(headers: &mut HeaderMap) {
    for value in headers.values_mut() {
        let trimmed = value.as_bytes().trim_ascii();
        if trimmed.len() == value.len() {
            continue;
        }
        if let Ok(mut trimmed) = HeaderValue::from_bytes(trimmed) {
            trimmed.set_sensitive(value.is_sensitive());
            *value = trimmed;
        }
    }
}

/// Whether a field that is a list has this token, in any case (RFC 9110 section 5.6.1).
pub fn lists(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    listed(headers, name).any(|listed| listed.eq_ignore_ascii_case(token))
}

fn listed<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim)
}

/// Whether a field may be set by a rule: not one that frames a message or belongs to a connection.
pub fn may_be_injected(name: &HeaderName) -> bool {
    const FRAMING: [&str; 9] = [
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    !FRAMING.contains(&name.as_str()) && !is_proxy_field(name)
}

fn strip_listed(headers: &mut HeaderMap) {
    let names: Vec<HeaderName> =
        listed(headers, &CONNECTION).filter_map(|token| token.parse().ok()).collect();
    for name in names {
        headers.remove(name);
    }
}

/// `Proxy-Authorization`, `Proxy-Connection` and their like: between the client and us.
fn strip_proxy_fields(headers: &mut HeaderMap) {
    let found: Vec<HeaderName> =
        headers.keys().filter(|name| is_proxy_field(name)).cloned().collect();
    for name in found {
        headers.remove(name);
    }
}

fn is_proxy_field(name: &HeaderName) -> bool {
    name.as_str().starts_with("proxy-")
}

fn accepts_trailers(value: &HeaderValue) -> bool {
    let is_trailers = |coding: &str| coding.trim().eq_ignore_ascii_case("trailers");
    value.to_str().is_ok_and(|text| text.split(',').any(is_trailers))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stripped(fields: &[(&str, &str)]) -> Vec<String> {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
        }
        strip_hop_by_hop(&mut headers);
        let mut left: Vec<String> = headers
            .iter()
            .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
            .collect();
        left.sort();
        left
    }

    #[test]
    fn only_end_to_end_fields_are_left() {
        type Row = (&'static [(&'static str, &'static str)], &'static [&'static str]);
        let table: &[Row] = &[
            (&[("accept", "*/*"), ("connection", "keep-alive")], &["accept: */*"]),
            (
                &[("connection", "authorization, X-Own"), ("authorization", "a"), ("x-own", "b")],
                &[],
            ),
            (
                &[("connection", "a"), ("connection", "b"), ("a", "1"), ("b", "2"), ("c", "3")],
                &["c: 3"],
            ),
            (&[("te", "gzip, Trailers")], &["te: trailers"]),
            (&[("te", "gzip"), ("transfer-encoding", "chunked"), ("upgrade", "h2c")], &[]),
            (&[("proxy-authorization", "Basic x"), ("proxy-connection", "keep-alive")], &[]),
        ];
        for (given, left) in table {
            assert_eq!(stripped(given), *left, "{given:?}");
        }
    }

    #[test]
    fn white_space_around_values_goes() {
        let mut headers = HeaderMap::new();
        for value in [" a", "b\t", "\t c d ", "e", " ", ""] {
            headers.append("x", HeaderValue::from_static(value));
        }
        trim_values(&mut headers);
        let values: Vec<_> = headers.get_all("x").iter().collect();
        assert_eq!(values, ["a", "b", "c d", "e", "", ""]);
    }

    #[test]
    fn framing_fields_are_not_for_rules() {
        for name in ["host", "content-length", "proxy-authorization", "connection"] {
            assert!(!may_be_injected(&HeaderName::from_static(name)), "{name}");
        }
        assert!(may_be_injected(&HeaderName::from_static("authorization")));
    }
}
