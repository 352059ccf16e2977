//! Malformed and ambiguous HTTP/2 inside a tunnel: the upstream gets what the frames say, clean, or nothing.

use futures_util::StreamExt as _;
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use valetkey::sandbox::client::{HTTP1, HTTP2, Visit};

use super::hpack;
use super::http1::{id, is_of, is_same, signed_once};
use super::recorder::{self, Got, HOST};
use super::strict::{self, Message};
use super::support::{Scene, within};
use super::wire::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, RST_STREAM, Wire, frame,
};

type Field = (Vec<u8>, Vec<u8>);

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_gets_one_clean_request_or_nothing() {
    let cases = cases();
    println!("{} cases of HTTP/2", cases.len());
    assert!(cases.len() >= 300);
    for alpn in [HTTP2, HTTP1] {
        let (scene, record, tasks) = recorder::scene(&[alpn[0], HTTP1[0]]).await;
        let attempts = cases.iter().enumerate().map(|(at, case)| attempt(&scene, at, case));
        let ends: Vec<_> = futures_util::stream::iter(attempts).buffered(16).collect().await;
        scene.assert_alive().await;
        let got = recorder::in_the_end(scene, &record, &tasks).await;
        let (mut counts, mut wrong) = ([0; 2], Vec::new());
        for (at, (case, end)) in cases.iter().zip(ends).enumerate() {
            let got: Vec<&Got> = got.iter().filter(|got| is_of(got, at)).collect();
            match judge(case, at, &got, &end) {
                Ok(came) => counts[usize::from(came)] += 1,
                Err(what) => {
                    wrong.push(format!("{what}: {case}\nends: {end:?}\ngot: {got:?}\n"));
                }
            }
        }
        let stray: Vec<&Got> =
            got.iter().filter(|got| !(0..cases.len()).any(|at| is_of(got, at))).collect();
        assert!(wrong.is_empty(), "{} cases:\n{}", wrong.len(), wrong.concat());
        assert!(stray.is_empty(), "of no case: {stray:#?}");
        println!("{:?}: {counts:?} cases with no request, one", alpn[0].escape_ascii().to_string());
        assert!(counts.iter().all(|count| *count >= 50), "{counts:?}");
    }
}

/// A request as its frames, in which `{id}` is the case.
#[derive(Clone, Default)]
struct Case {
    name: &'static str,
    head: Vec<Field>,
    data: Vec<Vec<u8>>,
    trailers: Option<Vec<Field>>,
    /// No frame of it says that it ends; the stream is reset behind it.
    is_cut: bool,
    /// The head comes in CONTINUATION frames of so many octets.
    pieces: Option<usize>,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{}", self.name)?;
        for (name, value) in self.head.iter().chain(self.trailers.iter().flatten()) {
            let short = &value[..value.len().min(60)];
            writeln!(
                f,
                "  {}: {}",
                name[..name.len().min(60)].escape_ascii(),
                short.escape_ascii()
            )?;
        }
        write!(f, "  {} pieces of data, trailers {}", self.data.len(), self.trailers.is_some())
    }
}

impl Case {
    fn frames(&self, at: usize) -> Vec<u8> {
        let block = |fields: &[Field]| {
            let fields: Vec<Field> =
                fields.iter().map(|(name, value)| (name.clone(), marked(value, at))).collect();
            let fields: Vec<(&[u8], &[u8])> =
                fields.iter().map(|(name, value)| (name.as_slice(), value.as_slice())).collect();
            hpack::block(&fields)
        };
        let ends = |is_last: bool| if is_last && !self.is_cut { END_STREAM } else { 0 };
        let head_ends = ends(self.data.is_empty() && self.trailers.is_none());
        let mut bytes = in_frames(&block(&self.head), head_ends, self.pieces.unwrap_or(MOST_FRAME));
        for (number, data) in self.data.iter().enumerate() {
            let is_last = number + 1 == self.data.len() && self.trailers.is_none();
            bytes.extend(frame(DATA, ends(is_last), STREAM, data));
        }
        if let Some(trailers) = &self.trailers {
            bytes.extend(in_frames(&block(trailers), ends(true), MOST_FRAME));
        }
        bytes
    }
}

const STREAM: u32 = 1;
const BEHIND: u32 = 3;

/// RFC 9113 section 6.5.2.
const MOST_FRAME: usize = 16 * 1024;

fn in_frames(block: &[u8], flags: u8, most: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    let last = block.chunks(most).count().max(1) - 1;
    for (number, piece) in block.chunks(most).enumerate() {
        let kind = if number == 0 { HEADERS } else { CONTINUATION };
        let end = if number == last { END_HEADERS } else { 0 };
        bytes.extend(frame(kind, end | if number == 0 { flags } else { 0 }, STREAM, piece));
    }
    if block.is_empty() {
        bytes.extend(frame(HEADERS, END_HEADERS | flags, STREAM, &[]));
    }
    bytes
}

fn marked(value: &[u8], at: usize) -> Vec<u8> {
    let text: String = value.iter().map(|byte| char::from(*byte)).collect();
    text.replace("{id}", &id(at)).chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect()
}

/// How the streams ended.
#[derive(Debug, Default)]
struct Ends {
    /// The case's own, and that of the request behind it.
    answered: [bool; 2],
    reset: [bool; 2],
    has_gone_away: bool,
}

/// Sends the case and a good request behind it on another stream.
async fn attempt(scene: &Scene, at: usize, case: &Case) -> Ends {
    let visit = Visit::to("peer.example.com:443", HTTP2);
    let tls: TlsStream<TcpStream> = within(scene.client.greet(visit)).await.unwrap();
    let mut wire = within(Wire::client(tls)).await.unwrap();
    let mut ends = Ends::default();
    let path = format!("/v1/{}/behind", id(at));
    let behind: [(&[u8], &[u8]); 4] = [
        (b":method", b"GET"),
        (b":scheme", b"https"),
        (b":authority", HOST.as_bytes()),
        (b":path", path.as_bytes()),
    ];
    let mut bytes = case.frames(at);
    if case.is_cut {
        bytes.extend(super::wire::reset(STREAM, super::wire::CANCEL));
    }
    bytes.extend(frame(HEADERS, END_HEADERS | END_STREAM, BEHIND, &hpack::block(&behind)));
    // Who is refused early may find the door closed.
    let _written = within(wire.write(&bytes)).await;
    let is_over = |ends: &Ends, which: usize| ends.answered[which] || ends.reset[which];
    while !((is_over(&ends, 0) || case.is_cut) && is_over(&ends, 1)) {
        let Ok(got) = within(wire.read()).await else { break };
        let which = usize::from(got.stream == BEHIND);
        match got.kind {
            HEADERS => ends.answered[which] = true,
            RST_STREAM => ends.reset[which] = true,
            GOAWAY => ends.has_gone_away = true,
            _ => (),
        }
    }
    ends
}

/// Compares what came with what the frames say; whether the case's own request came.
fn judge(case: &Case, at: usize, got: &[&Got], ends: &Ends) -> Result<bool, String> {
    let behind = format!("/v1/{}/behind", id(at));
    let mut own = Vec::new();
    let mut behinds = 0;
    for got in got {
        match got {
            Got::Whole(message) => {
                signed_once(&message.fields)?;
                match message.target == behind {
                    true => behinds += 1,
                    false => own.push(message),
                }
            }
            Got::Cut(fields, _) => signed_once(fields)?,
            Got::Unclean(what) => return Err(format!("the upstream got {what}")),
        }
    }
    // An error of the stream leaves the others alone; one of the connection ends them all.
    if behinds > 1 || behinds == 0 && !ends.has_gone_away {
        return Err(format!("{behinds} requests behind it came"));
    }
    match (own[..].first(), reading(case, at)) {
        _ if own.len() > 1 => Err("it came more than once".to_owned()),
        (Some(came), Some((said, _))) if is_same(came, &said) => Ok(true),
        (Some(came), Some((said, _))) => Err(format!("{came:?} came and not {said:?}")),
        (Some(came), None) => Err(format!("{came:?} is of no request")),
        (None, Some((said, false))) => Err(format!("it did not come: {said:?}")),
        (None, _) => Ok(false),
    }
}

/// The request that the frames are (RFC 9113 sections 8.1 to 8.3), and whether it need not be taken.
fn reading(case: &Case, at: usize) -> Option<(Message, bool)> {
    if case.is_cut {
        return None;
    }
    let mut pseudo = [const { None }; 4];
    let (mut fields, mut may_be_refused) = (Vec::new(), false);
    for (name, value) in &case.head {
        let value = marked(value, at);
        let name = String::from_utf8(name.clone()).ok()?;
        if let Some(pseudo_name) = name.strip_prefix(':') {
            let which = ["method", "scheme", "authority", "path"]
                .iter()
                .position(|it| *it == pseudo_name)?;
            let value = String::from_utf8(value).ok()?;
            if !fields.is_empty() || pseudo[which].replace(value).is_some() {
                return None;
            }
            continue;
        }
        check_field(&name, &value, &mut may_be_refused)?;
        fields.push((name, value.trim_ascii().to_vec()));
    }
    let [method, scheme, authority, path] = pseudo;
    let (method, target) = (method?, path?);
    if !strict::is_token(method.as_bytes()) || method == "CONNECT" || scheme? != "https" {
        return None;
    }
    let is_host = |name: &str| {
        let name = name.strip_suffix(":443").or_else(|| name.strip_suffix(':')).unwrap_or(name);
        name.strip_suffix('.').unwrap_or(name).eq_ignore_ascii_case(HOST)
    };
    let hosts: Vec<&[u8]> = fields
        .iter()
        .filter(|(name, _)| name == "host")
        .map(|(_, value)| value.as_slice())
        .collect();
    let names = || hosts.iter().map(|host| std::str::from_utf8(host).ok());
    let is_named =
        authority.as_deref().is_some_and(is_host) || authority.is_none() && hosts.len() == 1;
    if !is_named || hosts.len() > 1 || !names().all(|host| host.is_some_and(is_host)) {
        return None;
    }
    // Without `:authority` it is a request converted from HTTP/1.1, which is rare.
    may_be_refused |= authority.is_none() || method.eq_ignore_ascii_case("TRACE");
    let is_star = target == "*" && method == "OPTIONS";
    let stripped = target.split_once('#').map_or(target.as_str(), |(target, _)| target);
    may_be_refused |= stripped != target.as_str() || !target.bytes().all(strict::is_of_uri);
    // One without its slash has one more reading, which is that of an absolute URI.
    let stripped = match stripped {
        bare if bare.is_empty() && target.starts_with('#') || bare.starts_with('?') => {
            may_be_refused = true;
            format!("/{bare}")
        }
        other => other.to_owned(),
    };
    let is_target = stripped.bytes().all(|it| strict::is_of_uri(it) || strict::is_left_in_uris(it));
    if !(stripped.starts_with('/') || is_star) || !is_target {
        return None;
    }
    let body = case.data.concat();
    let told: Vec<_> = fields.iter().filter(|(name, _)| name == "content-length").collect();
    for (_, told) in &told {
        let told = std::str::from_utf8(told).ok()?;
        let told = told.trim();
        let is_right = told.bytes().all(|it| it.is_ascii_digit()) && told.parse() == Ok(body.len());
        if !is_right {
            return None;
        }
    }
    may_be_refused |= told.len() > 1;
    let trailers = case.trailers.clone().unwrap_or_default();
    let mut said = Vec::new();
    for (name, value) in trailers {
        let (name, value) = (String::from_utf8(name).ok()?, marked(&value, at));
        if [":method", ":path", ":status"].contains(&name.as_str()) {
            // It is passed over, or the stream ends.
            may_be_refused = true;
            continue;
        }
        let value = value.trim_ascii().to_vec();
        check_field(&name, &value, &mut may_be_refused)?;
        said.push((name, value));
    }
    let is_large =
        case.head.iter().map(|(name, value)| name.len() + value.len() + 32).sum::<usize>() > 60_000;
    let fields = fields.into_iter().filter(|(name, _)| name != "host").collect();
    let target = stripped;
    let message = Message { method, target, version: "2", fields, body, trailers: said };
    // h2 takes a head in a few pieces, and not one that is nothing else.
    let is_minced = case.pieces.is_some_and(|pieces| pieces < 50);
    Some((message, may_be_refused || is_large || is_minced))
}

/// `None` for a field that makes a message malformed. White space around a value does, and yet many take it off.
fn check_field(name: &str, value: &[u8], may_be_refused: &mut bool) -> Option<()> {
    let is_name =
        strict::is_token(name.as_bytes()) && !name.bytes().any(|it| it.is_ascii_uppercase());
    let is_value = value.iter().all(|byte| matches!(byte, b'\t' | b' '..=b'~' | 0x80..));
    let of_http1 = ["connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"];
    let is_odd_te = name == "te" && value != b"trailers";
    if !is_name || !is_value || of_http1.contains(&name) || is_odd_te {
        return None;
    }
    *may_be_refused |= value.trim_ascii() != value;
    Some(())
}

fn field(name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Field {
    (name.as_ref().to_vec(), value.as_ref().to_vec())
}

/// A good request with this method.
fn good(name: &'static str, method: &str) -> Case {
    let head = vec![
        field(":method", method),
        field(":scheme", "https"),
        field(":authority", HOST),
        field(":path", "/v1/{id}"),
        field("x-case", "{id}"),
        field("authorization", "Bearer the-clients-own"),
    ];
    Case { name, head, ..Case::default() }
}

fn cases() -> Vec<Case> {
    let mut cases = pseudo();
    cases.extend(fields());
    cases.extend(bodies());
    cases
}

fn pseudo() -> Vec<Case> {
    let mut cases = vec![
        good("good", "GET"),
        good("good", "OPTIONS"),
        good("good", "HEAD"),
        good("good", "DELETE"),
    ];
    let with = |name: &'static str, edit: &dyn Fn(&mut Vec<Field>)| {
        let mut case = good(name, "GET");
        edit(&mut case.head);
        case
    };
    for at in 0..4 {
        cases.push(with("missing", &|head| drop(head.remove(at))));
        cases.push(with("twice", &|head| head.insert(at, head[at].clone())));
        cases.push(with("late", &|head| {
            let late = head.remove(at);
            head.push(late);
        }));
        cases.push(with("empty", &|head| head[at].1.clear()));
        cases.push(with("upper case", &|head| head[at].0 = head[at].0.to_ascii_uppercase()));
        cases.push(with("a space in it", &|head| head[at].1.insert(0, b' ')));
        cases.push(with("a space behind it", &|head| head[at].1.push(b' ')));
        for other in 0..4 {
            cases.push(with("in another order", &|head| head.swap(at, other)));
        }
        for octet in b"\0\r\n\t \"#<>\\^`{|}\x7f\x80\xff" {
            cases.push(with("an octet at its end", &|head| head[at].1.push(*octet)));
            cases.push(with("an octet in it", &|head| {
                let value = &mut head[at].1;
                value.insert(value.len().min(2), *octet);
            }));
        }
        cases.push(with("twice, and different", &|head| {
            head.insert(
                at + 1,
                field(&head[at].0, ["POST", "http", "other.example.com", "/v1/{id}/other"][at]),
            );
        }));
    }
    for name in [
        ":status",
        ":protocol",
        ":unknown",
        ":",
        "::path",
        ":path ",
        " :path",
        ":Path",
        ":authority\0",
        ":host",
    ] {
        for value in ["200", "websocket", "/v1/{id}/other", ""] {
            cases.push(with("another pseudo-header", &|head| head.insert(4, field(name, value))));
        }
    }
    let paths = [
        "/",
        "",
        "*",
        "v1/{id}",
        "//",
        "//other.example.com/v1/{id}",
        "https://peer.example.com/v1/{id}",
        "https://other.example.com/v1/{id}",
        "http://peer.example.com/v1/{id}",
        "/v1/{id}#x",
        "#x",
        "?x",
        "/v1/{id}?a b",
        "/v1/{id} HTTP/1.1",
        "/v1/{id}\r\nX-A: b",
        "/v1/{id} HTTP/1.1\r\nHost: other.example.com\r\n\r\n",
        "/v1/{id}\0",
        "/v1/{id}\t",
        "/v1/{id}/../x",
        "/v1/{id}/%2e%2e/x",
        "/v1/{id}%",
        "/v1/{id}%zz",
        "/v1/{id}%00",
        "/v1/{id}\\x",
        "/v1/{id};x",
        "/v1/{id}\u{e9}",
        "peer.example.com:443",
        "/v1/{id}@x",
        " /v1/{id}",
        "/v1/{id}??",
        "/v1/{id}?",
        "/v1/{id}[]{}|",
        "\\v1\\{id}",
        "/\\other.example.com",
    ];
    for path in paths {
        cases.push(with("path", &|head| head[3].1 = path.into()));
        cases.push(with("path of OPTIONS", &|head| {
            head[0].1 = b"OPTIONS".to_vec();
            head[3].1 = path.into();
        }));
    }
    let authorities = [
        "PEER.example.com",
        "peer.example.com.",
        "peer.example.com:443",
        "peer.example.com:80",
        "peer.example.com:",
        "other.example.com",
        "user@peer.example.com",
        "peer.example.com@other.example.com",
        "peer.example.com/",
        "peer.example.com/v1",
        "peer.example.com, other.example.com",
        "peer.example.com other.example.com",
        "peer.example.com\r\nX-A: b",
        "peer.example.com\0",
        "[::1]",
        "127.0.0.1",
        "peer.example.com..",
        "*",
        "peer%2eexample.com",
        "https://peer.example.com",
    ];
    for authority in authorities {
        cases.push(with("authority", &|head| head[2].1 = authority.into()));
        cases.push(with("host", &|head| head.push(field("host", authority))));
        cases.push(with("host alone", &|head| {
            head.remove(2);
            head.push(field("host", authority));
        }));
        cases.push(with("two hosts", &|head| {
            head.push(field("host", HOST));
            head.push(field("host", authority));
        }));
    }
    for scheme in ["http", "HTTPS", "wss", "ftp", "https:", "https ", "http\r\nx: y", "", "file"] {
        cases.push(with("scheme", &|head| head[1].1 = scheme.into()));
    }
    for method in [
        "CONNECT",
        "TRACE",
        "trace",
        "connect",
        "G T",
        "GET /v1 HTTP/1.1",
        "GET\r\nX-A: b",
        "",
        "G\0T",
        "PRI",
        "get",
        "\u{e9}",
        "GET:",
        "SEARCH",
        "M!#$%&'*+-.^_`|~",
    ] {
        cases.push(with("method", &|head| head[0].1 = method.into()));
    }
    // RFC 9113 section 8.5: only an authority. RFC 8441: all of them and a protocol.
    for (scheme, path, protocol) in [
        (false, false, None),
        (true, true, None),
        (false, false, Some("websocket")),
        (true, false, Some("websocket")),
        (true, true, Some("x")),
        (true, true, Some("")),
    ] {
        let mut case = good("CONNECT", "CONNECT");
        if !path {
            case.head.remove(3);
        }
        if !scheme {
            case.head.remove(1);
        }
        if let Some(protocol) = protocol {
            case.head.insert(1, field(":protocol", protocol));
        }
        cases.push(case);
    }
    cases
}

fn fields() -> Vec<Case> {
    let mut cases = Vec::new();
    let with = |name: &'static str, fields: &[Field]| {
        let mut case = good(name, "GET");
        case.head.extend_from_slice(fields);
        case
    };
    for octet in 0..=255_u8 {
        if !octet.is_ascii_lowercase() && !octet.is_ascii_digit() {
            cases.push(with("octet in a name", &[field([b'x', octet, b'y'], "a")]));
            cases.push(with("octet in a value", &[field("x-a", [b'b', octet, b'c'])]));
        }
    }
    let odd: &[(&str, &str)] = &[
        ("X-A", "b"),
        ("x-A", "b"),
        ("", "b"),
        (":", "b"),
        ("x-a:", "b"),
        ("x-a", ""),
        ("x-a", " b"),
        ("x-a", "b "),
        ("x-a", "\tb"),
        ("x-a", " "),
        ("connection", "close"),
        ("connection", "x-case"),
        ("connection", "authorization"),
        ("Connection", "close"),
        ("keep-alive", "timeout=5"),
        ("proxy-connection", "keep-alive"),
        ("transfer-encoding", "chunked"),
        ("transfer-encoding", "identity"),
        ("transfer-encoding", ""),
        ("upgrade", "websocket"),
        ("upgrade", "h2c"),
        ("te", "trailers"),
        ("te", "gzip"),
        ("te", "trailers, gzip"),
        ("te", ""),
        ("te", "Trailers"),
        ("http2-settings", "AAMAAABk"),
        ("proxy-authorization", "Basic eDp5"),
        ("authorization", "Bearer another"),
        ("Authorization", "Bearer another"),
        ("authorization\0", "Bearer another"),
        ("authorization ", "Bearer another"),
        ("cookie", "a=b"),
        ("expect", "100-continue"),
        ("expect", "x"),
        ("trailer", "x"),
        ("content-length", ""),
        ("content-length", "0"),
        ("content-length", "1"),
        ("content-length", "-0"),
        ("content-length", "+0"),
        ("content-length", "0x0"),
        ("content-length", "0, 0"),
        ("content-length", " 0"),
        ("content-length", "00"),
        ("x-a", "b\r\nx-b: c"),
        ("x-a", "b\nx-b: c"),
        ("x-a", "b\rx-b: c"),
        ("x-a", "b\0c"),
        ("x-a\r\nx-b", "c"),
        ("x-a: b\r\nx-b", "c"),
        ("x-a", "b\r\n\r\nGET /v1/{id}/smuggled HTTP/1.1\r\nHost: peer.example.com\r\n\r\n"),
        ("x-valetkey-error", "x"),
        ("via", "1.1 x"),
        ("forwarded", "for=x"),
        ("sec-websocket-key", "x"),
        ("max-forwards", "0"),
        ("priority", "u=1"),
    ];
    for (name, value) in odd {
        cases.push(with("field", &[field(name, value)]));
        cases.push(with("field, twice", &[field(name, value), field(name, value)]));
        let mut case = with("field of a body", &[field(name, value)]);
        case.data = vec![b"hello".to_vec()];
        cases.push(case);
    }
    for count in [10, 100, 300, 1000, 5000] {
        cases.push(with("many fields", &vec![field("x-a", "b"); count]));
    }
    for len in [1000, 8000, 16_000, 16_400, 40_000, 62_000, 70_000, 200_000] {
        cases.push(with("a long value", &[field("x-a", "x".repeat(len))]));
        cases.push(with("a long name", &[field("x".repeat(len), "a")]));
    }
    for pieces in [1, 2, 7, 100] {
        cases.push(Case { pieces: Some(pieces), ..good("in pieces", "GET") });
    }
    cases
}

fn bodies() -> Vec<Case> {
    let mut cases = Vec::new();
    let post = |name: &'static str, length: Option<&str>, data: &[&str]| {
        let mut case = good(name, "POST");
        case.head.extend(length.map(|length| field("content-length", length)));
        case.data = data.iter().map(|data| data.as_bytes().to_vec()).collect();
        case
    };
    let smuggled = "0\r\n\r\nGET /v1/{id}/smuggled HTTP/1.1\r\nHost: peer.example.com\r\n\r\n";
    for length in [
        None,
        Some("0"),
        Some("4"),
        Some("5"),
        Some("6"),
        Some("05"),
        Some("+5"),
        Some("5, 5"),
        Some("5x"),
        Some("18446744073709551621"),
        Some("-5"),
        Some(""),
    ] {
        for data in [
            &["hello"][..],
            &["he", "llo"],
            &["", "hello", ""],
            &[],
            &[""],
            &["hello, hello"],
            &[smuggled],
        ] {
            cases.push(post("length", length, data));
        }
        let mut case = post("two lengths", length, &["hello"]);
        case.head.push(field("content-length", "5"));
        cases.push(case);
    }
    let trailers: &[(&str, &str)] = &[
        ("x-trailer", "a"),
        ("X-Trailer", "a"),
        ("", "a"),
        (":path", "/v1/{id}/other"),
        (":method", "DELETE"),
        (":status", "200"),
        (":x", "y"),
        ("authorization", "Bearer mine"),
        ("content-length", "5"),
        ("content-length", "6"),
        ("transfer-encoding", "chunked"),
        ("connection", "close"),
        ("host", "other.example.com"),
        ("te", "gzip"),
        ("te", "trailers"),
        ("upgrade", "x"),
        ("proxy-authorization", "Basic x"),
        ("x-trailer", "a\r\nb: c"),
        ("x-trailer", "a\0"),
        ("x-trailer", " a"),
        ("cookie", "a=b"),
        ("trailer", "x"),
        ("expect", "100-continue"),
        ("keep-alive", "5"),
    ];
    for (name, value) in trailers {
        for length in [None, Some("5")] {
            let mut case = post("trailers", length, &["hello"]);
            case.trailers = Some(vec![field(name, value)]);
            cases.push(case.clone());
            case.trailers = Some(vec![field("x-first", "y"), field(name, value)]);
            cases.push(case);
        }
    }
    cases.push(Case {
        trailers: Some(Vec::new()),
        ..post("no trailers in trailers", None, &["hello"])
    });
    cases.push(Case {
        trailers: Some(vec![field("x-trailer", "a")]),
        ..post("trailers alone", None, &[])
    });
    for length in [None, Some("5"), Some("500")] {
        cases.push(Case { is_cut: true, ..post("cut", length, &["hello"]) });
        cases.push(Case { is_cut: true, ..post("cut", length, &[]) });
    }
    cases
}
