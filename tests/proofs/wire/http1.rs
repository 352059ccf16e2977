//! Malformed and ambiguous HTTP/1.1 inside a tunnel: the upstream gets what everybody reads in it, or nothing.

use futures_util::StreamExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use valetkey::sandbox::client::{HTTP1, HTTP2, Visit};

use super::recorder::{self, Got, HOST};
use super::strict::{self, Message, Reading};
use super::support::{KEY, Scene, within};

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_gets_one_clean_request_or_nothing() {
    let cases = cases();
    println!("{} cases of HTTP/1.1", cases.len());
    assert!(cases.len() >= 300);
    for alpn in [HTTP2, HTTP1] {
        let (scene, record, tasks) = recorder::scene(&[alpn[0], HTTP1[0]]).await;
        let attempts = cases.iter().enumerate().map(|(at, case)| attempt(&scene, at, case));
        // Many at a time, so that those which wait do not wait for each other.
        let answers: Vec<_> = futures_util::stream::iter(attempts).buffered(16).collect().await;
        scene.assert_alive().await;
        let got = recorder::in_the_end(scene, &record, &tasks).await;
        let (mut counts, mut wrong) = ([0; 3], Vec::new());
        for (at, (case, answer)) in cases.iter().zip(answers).enumerate() {
            let got: Vec<&Got> = got.iter().filter(|got| is_of(got, at)).collect();
            let verdict = judge(&case.bytes(at), &got, &answer);
            let seen = verdict.unwrap_or_else(|what| {
                let sent = case.bytes(at);
                wrong.push(format!(
                    "{}: {what}\n{}\nanswered: {answer}\ngot: {got:?}\n",
                    case.name,
                    sent.escape_ascii()
                ));
                0
            });
            counts[seen.min(2)] += 1;
        }
        let stray: Vec<&Got> =
            got.iter().filter(|got| !(0..cases.len()).any(|at| is_of(got, at))).collect();
        assert!(wrong.is_empty(), "{} cases:\n{}", wrong.len(), wrong.concat());
        assert!(stray.is_empty(), "of no case: {stray:#?}");
        println!(
            "{:?}: {counts:?} cases with no request, one, two",
            alpn[0].escape_ascii().to_string()
        );
        assert!(counts.iter().all(|count| *count >= 20), "{counts:?}");
    }
}

/// One input, in which `{id}` is the case.
struct Case {
    name: String,
    raw: Vec<u8>,
}

impl Case {
    fn new(name: &str, raw: impl Into<Vec<u8>>) -> Self {
        Self { name: name.to_owned(), raw: raw.into() }
    }

    /// All that the client sends: the input, and behind it a request that is the last one.
    fn bytes(&self, at: usize) -> Vec<u8> {
        let mut bytes = replaced(&self.raw, b"{id}", id(at).as_bytes());
        let behind = format!(
            "GET /v1/{}/behind HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n",
            id(at)
        );
        bytes.extend_from_slice(behind.as_bytes());
        bytes
    }
}

/// As long for each.
pub(super) fn id(at: usize) -> String {
    format!("c{at:05}")
}

fn replaced(text: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.windows(from.len()).position(|piece| piece == from) {
        out.extend_from_slice(&rest[..at]);
        out.extend_from_slice(to);
        rest = &rest[at + from.len()..];
    }
    out.extend_from_slice(rest);
    out
}

/// Sends the case; all that comes back until the proxy closes the connection.
async fn attempt(scene: &Scene, at: usize, case: &Case) -> String {
    let bytes = case.bytes(at);
    let visit = Visit::to("peer.example.com:443", HTTP1);
    let mut tls = within(scene.client.greet(visit)).await.unwrap();
    let mut answer = Vec::new();
    // Whoever is refused early may find the door closed while it still speaks.
    let written = within(tls.write_all(&bytes)).await.is_ok() && within(tls.flush()).await.is_ok();
    if written && !is_complete(&bytes) {
        let _closed = within(tls.shutdown()).await;
    }
    // Of an end by force, too, what came before it has been read.
    let end = tokio::time::timeout(LIMIT, tls.read_to_end(&mut answer)).await;
    assert!(end.is_ok(), "{} is left open: {}", case.name, bytes.escape_ascii());
    String::from_utf8_lossy(&answer).into_owned()
}

/// Longest wait for the end of a connection.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(30);

/// Whether a client that has sent this waits for the proxy alone.
fn is_complete(bytes: &[u8]) -> bool {
    let mut rest = bytes;
    loop {
        match strict::read(rest) {
            Reading::Whole { is_last: true, .. } => return true,
            // Nobody knows how much more of such a body there will be.
            Reading::Broken(why) => return !why.starts_with("chunk"),
            Reading::Whole { len, .. } => rest = &rest[len..],
            Reading::Begun | Reading::Frayed(_) => return false,
        }
    }
}

/// Compares what came with what the oracle reads; how many requests came.
fn judge(bytes: &[u8], got: &[&Got], answer: &str) -> Result<usize, String> {
    let mut came = Vec::new();
    for got in got {
        match got {
            Got::Whole(message) => {
                signed_once(&message.fields)?;
                came.push(message);
            }
            Got::Cut(fields, _) => signed_once(fields)?,
            Got::Unclean(what) => return Err(format!("the upstream got {what}")),
        }
    }
    // What a client breaks off may be given up.
    let (mut rest, mut found, mut may_have_ended) = (bytes, 0, !is_complete(bytes));
    while let Reading::Whole { message, len, in_doubt, is_last } = strict::read(rest) {
        // After another name or a form that does not fit, nothing is read any more.
        let Some(expected) = as_sent_on(&message) else { break };
        let is_large =
            len > MOST_HEAD || message.fields.len() + message.trailers.len() > MOST_FIELDS;
        match came.iter().position(|came| is_same(came, &expected)) {
            Some(at) => {
                if may_have_ended && !answer.contains("HTTP/1.1 4") && is_complete(bytes) {
                    return Err("something before it was passed over".to_owned());
                }
                came.remove(at);
                found += 1;
            }
            None if in_doubt || is_large || may_have_ended || may_be_refused(&message) => {
                may_have_ended = true
            }
            None => return Err(format!("it did not come: {expected:?}")),
        }
        if is_last {
            break;
        }
        rest = &rest[len..];
    }
    if let Reading::Frayed(message) = strict::read(rest)
        && let Some(at) = came
            .iter()
            .position(|came| is_same(came, &Message { trailers: Vec::new(), ..message.clone() }))
    {
        came.remove(at);
        found += 1;
    }
    match came.first() {
        Some(other) => Err(format!("nobody said {other:?}")),
        None => Ok(found),
    }
}

/// More than this need not be taken.
const MOST_HEAD: usize = 60_000;

/// hyper has room for a hundred.
const MOST_FIELDS: usize = 95;

/// The credential is there once, and it is ours.
pub(super) fn signed_once(fields: &[(String, Vec<u8>)]) -> Result<(), String> {
    let values: Vec<_> = fields.iter().filter(|(name, _)| name == "authorization").collect();
    match values[..] {
        [(_, value)] if *value == format!("Bearer {KEY}").into_bytes() => Ok(()),
        _ => Err(format!("authorized by {values:?}")),
    }
}

/// What is refused though it is well-formed: what would show the credential, a tunnel in a tunnel, a WebSocket without
/// its key; and what no URI has, though browsers send it.
fn may_be_refused(message: &Message) -> bool {
    let asks_to_upgrade = !message.all("upgrade").is_empty();
    ["TRACE", "CONNECT"].contains(&message.method.to_uppercase().as_str())
        || asks_to_upgrade && message.all("sec-websocket-key").is_empty()
        || !message.target.bytes().all(strict::is_of_uri)
}

/// What of a client's message is for the upstream; `None` when it names another host or none.
fn as_sent_on(message: &Message) -> Option<Message> {
    let names = |authority: &str| {
        let name = match authority.rsplit_once(':') {
            Some((name, port)) if port.trim_start_matches('0') == "443" || port.is_empty() => name,
            _ => authority,
        };
        name.strip_suffix('.').unwrap_or(name).eq_ignore_ascii_case(HOST)
    };
    let hosts = message.all("host");
    let host = match hosts[..] {
        [host] => std::str::from_utf8(host).ok()?,
        _ => return None,
    };
    let target = match message.target.split_once("://") {
        _ if message.target.starts_with('/') => message.target.clone(),
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => {
            let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
            if !names(authority) {
                return None;
            }
            if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
        }
        _ if message.target == "*" && message.method == "OPTIONS" => "*".to_owned(),
        _ => return None,
    };
    names(host).then(|| Message { target, ..message.clone() })
}

type Fields = Vec<(String, Vec<u8>)>;

/// Whether the upstream got this, at its own name. Trailers may be left out.
pub(super) fn is_same(came: &Message, expected: &Message) -> bool {
    let (left, right) = (normal(came), normal(expected));
    came.all("host") == [HOST.as_bytes()]
        && (left.0, left.1, left.2) == (right.0, right.1, right.2)
        && came.target == expected.target
        && left.3.iter().all(|trailer| right.3.contains(trailer))
}

/// Fields that go from end to end, in one order; and the body.
fn normal(message: &Message) -> (String, Fields, Vec<u8>, Fields) {
    let options = message.all("connection").join(&b","[..]);
    let options = String::from_utf8_lossy(&options).to_ascii_lowercase();
    let nominated: Vec<&str> = options.split(',').map(str::trim).collect();
    let is_kept = |(name, _): &&(String, Vec<u8>)| {
        !HOP_BY_HOP.contains(&name.as_str())
            && !name.starts_with("proxy-")
            && !nominated.contains(&name.as_str())
    };
    let sorted = |fields: &[(String, Vec<u8>)]| {
        let (cookies, mut kept): (Vec<_>, Vec<_>) =
            fields.iter().filter(is_kept).cloned().partition(|(name, _)| name == "cookie");
        // HTTP/2 may have each in a field of its own.
        let cookies: Vec<Vec<u8>> = cookies.into_iter().map(|(_, value)| value).collect();
        if !cookies.is_empty() {
            kept.push(("cookie".to_owned(), cookies.join(&b"; "[..])));
        }
        kept.sort();
        kept
    };
    (
        message.method.clone(),
        sorted(&message.fields),
        message.body.clone(),
        sorted(&message.trailers),
    )
}

/// What belongs to a connection, frames a message, is the proxy's to set, or is the credential.
const HOP_BY_HOP: [&str; 10] = [
    "authorization",
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

/// Whether something is of this case: its mark is in the target or in a field.
pub(super) fn is_of(got: &Got, at: usize) -> bool {
    let mark = id(at);
    let in_fields = |fields: &[(String, Vec<u8>)]| {
        fields.iter().any(|(name, value)| name == "x-case" && value == mark.as_bytes())
    };
    match got {
        Got::Whole(message) => message.target.contains(&mark) || in_fields(&message.fields),
        Got::Cut(fields, line) => line.contains(&mark) || in_fields(fields),
        Got::Unclean(what) => what.contains(&mark),
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(lengths_and_codings());
    cases.extend(chunks());
    cases.extend(lines());
    cases.extend(fields());
    cases.extend(hosts_and_targets());
    cases.extend(the_rest());
    cases
}

/// A head with the right names in it.
fn head(line: &str, fields: &str) -> String {
    format!(
        "{line}\r\nHost: {HOST}\r\nX-Case: {{id}}\r\nAuthorization: Bearer the-clients-own\r\n{fields}\r\n"
    )
}

fn post(fields: &str, body: &str) -> Vec<u8> {
    (head("POST /v1/{id} HTTP/1.1", fields) + body).into_bytes()
}

fn get(fields: &str) -> Vec<u8> {
    head("GET /v1/{id} HTTP/1.1", fields).into_bytes()
}

/// A request that is smuggled where two readings of a length differ.
const SMUGGLED: &str = "GET /v1/{id}/smuggled HTTP/1.1\r\nHost: peer.example.com\r\n\r\n";

fn lengths_and_codings() -> Vec<Case> {
    let mut cases = Vec::new();
    let smuggled = SMUGGLED.len() + 2; // `{id}` is four long, the mark six
    let chunked = "5\r\nhello\r\n0\r\n\r\n";
    let values = [
        "0",
        "5",
        "+5",
        "-5",
        "-0",
        "05",
        "0000000000000005",
        "5 ",
        " 5",
        "\t5",
        "5,5",
        "5, 5",
        "5,6",
        "0,5",
        "5;5",
        "0x5",
        "5.0",
        "5e0",
        "",
        " ",
        "five",
        "\u{665}",
        "5 5",
        "5\u{b}",
        "18446744073709551615",
        "18446744073709551616",
        "18446744073709551621",
        "99999999999999999999999999",
        "9223372036854775808",
        "4294967301",
        "'5'",
        "\"5\"",
        "5\0",
    ];
    for value in values {
        cases.push(Case::new("length", post(&format!("Content-Length: {value}\r\n"), "hello")));
        cases.push(Case::new(
            "length and coding",
            post(&format!("Content-Length: {value}\r\nTransfer-Encoding: chunked\r\n"), chunked),
        ));
        cases.push(Case::new(
            "coding and length",
            post(&format!("Transfer-Encoding: chunked\r\nContent-Length: {value}\r\n"), chunked),
        ));
    }
    for (one, other) in [
        ("5", "5"),
        ("5", "6"),
        ("0", "5"),
        ("5", "0"),
        ("5", ""),
        ("", "5"),
        ("5", "+5"),
        ("5", "05"),
        ("5", "x"),
    ] {
        let fields = format!("Content-Length: {one}\r\nX: y\r\nContent-Length: {other}\r\n");
        cases.push(Case::new("two lengths", post(&fields, "hello")));
        let fields = format!(
            "Content-Length: {one}\r\nContent-Length: {other}\r\nTransfer-Encoding: chunked\r\n"
        );
        cases.push(Case::new("two lengths and a coding", post(&fields, chunked)));
    }
    let codings = [
        "chunked",
        "Chunked",
        "CHUNKED",
        " chunked",
        "chunked ",
        "\tchunked\t",
        "chunked,",
        ",chunked",
        "chunked,chunked",
        "chunked, chunked",
        "identity",
        "gzip",
        "gzip, chunked",
        "chunked, gzip",
        "identity, chunked",
        "chunked, identity",
        "chunked;q=1",
        "chunked; a=b",
        "xchunked",
        "chunkedx",
        "chunk",
        "\"chunked\"",
        "'chunked'",
        "chunked\u{b}",
        "\u{b}chunked",
        "chunked\0",
        "",
        "chunked identity",
        "c\u{68}unked",
        "trailers",
        "x",
        "chu\u{212a}ed",
        "chunked\u{a0}",
        "chunked\r",
    ];
    for value in codings {
        cases.push(Case::new("coding", post(&format!("Transfer-Encoding: {value}\r\n"), chunked)));
        cases.push(Case::new(
            "coding beside a length",
            post(
                &format!("Transfer-Encoding: {value}\r\nContent-Length: {}\r\n", chunked.len()),
                chunked,
            ),
        ));
    }
    for (one, other) in [
        ("chunked", "chunked"),
        ("chunked", "identity"),
        ("identity", "chunked"),
        ("gzip", "chunked"),
        ("chunked", "gzip"),
        ("", "chunked"),
        ("chunked", ""),
    ] {
        let fields = format!("Transfer-Encoding: {one}\r\nTransfer-Encoding: {other}\r\n");
        cases.push(Case::new("two codings", post(&fields, chunked)));
    }
    for name in [
        "Transfer_Encoding",
        "Transfer-Encoding ",
        "Transfer-Encoding\t",
        " Transfer-Encoding",
        "Transfer-Encoding\0",
        "\u{b}Transfer-Encoding",
        "Transfer-Encodin\u{130}",
    ] {
        // Who takes it for the coding reads a smuggled request in the body.
        let fields = format!("Content-Length: {}\r\n{name}: chunked\r\n", smuggled + 5);
        cases.push(Case::new("nearly a coding", post(&fields, &format!("0\r\n\r\n{SMUGGLED}"))));
    }
    let smuggling = [
        format!("Content-Length: {}\r\nTransfer-Encoding: chunked\r\n", smuggled + 5),
        format!("Transfer-Encoding: chunked\r\nContent-Length: {}\r\n", smuggled + 5),
        format!("Transfer-Encoding: identity\r\nContent-Length: {}\r\n", smuggled + 5),
        format!("Content-Length: {}\r\n", smuggled + 5),
        format!("Content-Length: 0\r\nContent-Length: {}\r\n", smuggled + 5),
        format!("Content-Length: {}\r\nContent-Length: 0\r\n", smuggled + 5),
        format!("Connection: content-length\r\nContent-Length: {}\r\n", smuggled + 5),
        format!("Connection: close, content-length\r\nContent-Length: {}\r\n", smuggled + 5),
        "Connection: transfer-encoding\r\nTransfer-Encoding: chunked\r\n".to_owned(),
    ];
    for fields in smuggling {
        cases.push(Case::new("smuggling", post(&fields, &format!("0\r\n\r\n{SMUGGLED}"))));
        let get = head("GET /v1/{id} HTTP/1.1", &fields) + "0\r\n\r\n" + SMUGGLED;
        cases.push(Case::new("smuggling behind a GET", get));
    }
    for version in ["HTTP/1.0", "HTTP/1.1"] {
        let with =
            |fields: &str, body: &str| head(&format!("POST /v1/{{id}} {version}"), fields) + body;
        cases.push(Case::new("coding by version", with("Transfer-Encoding: chunked\r\n", chunked)));
        cases.push(Case::new(
            "coding by version",
            with("Connection: keep-alive\r\nTransfer-Encoding: chunked\r\n", chunked),
        ));
        cases.push(Case::new(
            "length by version",
            with("Connection: keep-alive\r\nContent-Length: 5\r\n", "hello"),
        ));
        cases.push(Case::new("no length by version", with("Connection: keep-alive\r\n", "")));
        cases.push(Case::new("no length, and a body", with("", "hello")));
    }
    cases
}

fn chunks() -> Vec<Case> {
    let sizes = [
        "5",
        "05",
        "00000000000000005",
        "0000000000000000000000000000000000005",
        "+5",
        "-5",
        "0x5",
        "5h",
        " 5",
        "5 ",
        "\t5",
        "5\t",
        "",
        "x",
        "g",
        "5\u{b}",
        "5\0",
        "5,5",
        "5.",
        "\u{ff15}",
        "FFFFFFFFFFFFFFFF",
        "10000000000000000",
        "10000000000000005",
        "ffffffffffffffff5",
        "7fffffffffffffff",
        "8000000000000000",
        "5;",
        "5;a",
        "5;a=b",
        "5;a=\"b\"",
        "5;a=\"b;c\"",
        "5 ;a=b",
        "5;a=b;c",
        "5;\0",
        "5;\u{1}",
        "5;a=\u{e9}",
        "5;a\nb",
        "5;a\rb",
        "5\n",
        "5\r",
        "5;a=\"\n",
    ];
    let body = |size: &str| format!("{size}\r\nhello\r\n0\r\n\r\n");
    let mut bodies: Vec<String> = sizes.iter().map(|size| body(size)).collect();
    bodies.push(body(&format!("5;{}", "x".repeat(5000))));
    bodies.push(body(&format!("5;{}", "x".repeat(50_000))));
    bodies.push(body(&format!("{}5", "0".repeat(5000))));
    bodies.extend(
        [
            "5\nhello\n0\n\n",
            "5\r\nhello\n0\r\n\r\n",
            "5\r\nhello0\r\n\r\n",
            "5\r\nhell\r\n0\r\n\r\n",
            "5\r\nhelloo\r\n0\r\n\r\n",
            "5\r\nhello\r0\r\n\r\n",
            "5\r\nhello\r\n0\r\n\n",
            "5\r\nhello\r\n0\n\r\n",
            "5\r\nhello\r\n00\r\n\r\n",
            "5\r\nhello\r\n0;x\r\n\r\n",
            "5\r\nhello\r\n000000000000000000000\r\n\r\n",
            "\r\n5\r\nhello\r\n0\r\n\r\n",
            "5\r\nhello\r\n\r\n0\r\n\r\n",
            "5\r\nhello\r\n-0\r\n\r\n",
            "5\r\nhello\r\n+0\r\n\r\n",
            "0\r\n\r\n",
            "5\rhello\r\n0\r\n\r\n",
            "1\r\nh\r\n4\r\nello\r\n0\r\n\r\n",
            "a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n",
            // Trailers.
            "0\r\nX-Trailer: a\r\n\r\n",
            "0\r\nAuthorization: Bearer mine\r\n\r\n",
            "0\r\nContent-Length: 5\r\n\r\n",
            "0\r\nTransfer-Encoding: chunked\r\n\r\n",
            "0\r\nHost: evil.example\r\n\r\n",
            "0\r\nX Y: z\r\n\r\n",
            "0\r\n: z\r\n\r\n",
            "0\r\nX-Trailer : a\r\n\r\n",
            "0\r\nX-Trailer\r\n\r\n",
            "0\r\nX: a\r\n b\r\n\r\n",
            "0\r\nX: a\0\r\n\r\n",
            "0\r\nX: a\rb\r\n\r\n",
            "0\r\nX: a\nY: b\r\n\r\n",
            "0\r\n\0\r\n\r\n",
            "0\r\n GET / HTTP/1.1\r\n\r\n",
            "0\r\nConnection: x-trailer\r\nX-Trailer: b\r\n\r\n",
            // No end.
            "5\r\nhel",
            "5\r\nhello",
            "5\r\nhello\r\n",
            "5",
            "",
            "5\r\nhello\r\n0",
            "5\r\nhello\r\n0\r\nX: a",
        ]
        .map(str::to_owned),
    );
    bodies.push(format!("0\r\n{}\r\n", "X-Trailer: a\r\n".repeat(1000)));
    bodies.push(format!("0\r\nX-Trailer: {}\r\n\r\n", "x".repeat(100_000)));
    bodies.push(format!("0\r\n{SMUGGLED}"));
    bodies.push(format!("0\r\n\r\n{SMUGGLED}"));
    bodies.push(format!("1;\r\nx\r\n0;\n{SMUGGLED}"));
    let coding = "Transfer-Encoding: chunked\r\n";
    bodies.iter().map(|body| Case::new("chunks", post(coding, body))).collect()
}

fn lines() -> Vec<Case> {
    let fields = format!("Host: {HOST}\r\nX-Case: {{id}}\r\n");
    let lines = [
        "GET /v1/{id} HTTP/1.1\n",
        "GET /v1/{id} HTTP/1.1\r",
        "GET /v1/{id} HTTP/1.1\r\r\n",
        "GET  /v1/{id} HTTP/1.1\r\n",
        "GET /v1/{id}  HTTP/1.1\r\n",
        "GET\t/v1/{id}\tHTTP/1.1\r\n",
        " GET /v1/{id} HTTP/1.1\r\n",
        "GET /v1/{id} HTTP/1.1 \r\n",
        "GET /v1/{id}\r\n",
        "GET /v1/{id} \r\n",
        "GET\r\n",
        "\r\nGET /v1/{id} HTTP/1.1\r\n",
        "\n\nGET /v1/{id} HTTP/1.1\r\n",
        "\r\n\r\n\r\nGET /v1/{id} HTTP/1.1\r\n",
        "\rGET /v1/{id} HTTP/1.1\r\n",
        "\0GET /v1/{id} HTTP/1.1\r\n",
        "GET /v1/{id} HTTP/1.2\r\n",
        "GET /v1/{id} HTTP/1.0\r\n",
        "GET /v1/{id} HTTP/0.9\r\n",
        "GET /v1/{id} HTTP/2.0\r\n",
        "GET /v1/{id} HTTP/1.10\r\n",
        "GET /v1/{id} HTTP/1\r\n",
        "GET /v1/{id} http/1.1\r\n",
        "GET /v1/{id} HTTP /1.1\r\n",
        "GET /v1/{id} XTTP/1.1\r\n",
        "GET /v1/{id} HTTP/1.1x\r\n",
        "get /v1/{id} HTTP/1.1\r\n",
        "G(ET /v1/{id} HTTP/1.1\r\n",
        "G\0ET /v1/{id} HTTP/1.1\r\n",
        "G:ET /v1/{id} HTTP/1.1\r\n",
        "G\u{e9}T /v1/{id} HTTP/1.1\r\n",
        "/v1/{id} HTTP/1.1\r\n",
        "GET /v1/{id} HTTP/1.1 GET /v1/{id} HTTP/1.1\r\n",
        "GET /v1/{id} x HTTP/1.1\r\n",
        "PRI * HTTP/2.0\r\n",
        "M-SEARCH /v1/{id} HTTP/1.1\r\n",
        "!#$%&'*+-.^_`|~ /v1/{id} HTTP/1.1\r\n",
        "DELETE /v1/{id} HTTP/1.1\r\n",
        "GET /v1/{id} HTTP/1.1\u{b}\r\n",
        "GET /v1/{id}\u{c}HTTP/1.1\r\n",
        "GET /v1/{id}\u{a0}HTTP/1.1\r\n",
    ];
    let mut cases: Vec<Case> =
        lines.iter().map(|line| Case::new("line", format!("{line}{fields}\r\n"))).collect();
    cases.push(Case::new(
        "method",
        format!("{} /v1/{{id}} HTTP/1.1\r\n{fields}\r\n", "M".repeat(70_000)),
    ));
    cases.push(Case::new(
        "line ends",
        format!("GET /v1/{{id}} HTTP/1.1\nHost: {HOST}\nX-Case: {{id}}\n\n"),
    ));
    cases.push(Case::new(
        "line ends",
        format!("GET /v1/{{id}} HTTP/1.1\rHost: {HOST}\rX-Case: {{id}}\r\r"),
    ));
    cases.push(Case::new("line ends", format!("GET /v1/{{id}} HTTP/1.1\r\n{fields}\n")));
    cases.push(Case::new("line ends", format!("GET /v1/{{id}} HTTP/1.1\r\n{fields}\r\r\n")));
    cases.push(Case::new("line ends", format!("GET /v1/{{id}} HTTP/1.1\r\n{fields}\n\r\n")));
    cases.push(Case::new("TLS again", b"\x16\x03\x01\x02\x00\x01\x00{id}\r\n\r\n".to_vec()));
    cases
}

fn fields() -> Vec<Case> {
    let mut cases = Vec::new();
    for byte in 0..=255_u8 {
        // Each octet in a name and in a value.
        if !byte.is_ascii_alphanumeric() {
            let mut in_name =
                b"GET /v1/{id} HTTP/1.1\r\nHost: peer.example.com\r\nX-Case: {id}\r\nX-A".to_vec();
            in_name.push(byte);
            in_name.extend_from_slice(b"B: c\r\n\r\n");
            cases.push(Case::new("octet in a name", in_name));
            let mut in_value =
                b"GET /v1/{id} HTTP/1.1\r\nHost: peer.example.com\r\nX-Case: {id}\r\nX-A: b"
                    .to_vec();
            in_value.push(byte);
            in_value.extend_from_slice(b"c\r\n\r\n");
            cases.push(Case::new("octet in a value", in_value));
        }
    }
    let odd = [
        "X-A : b\r\n",
        "X-A\t: b\r\n",
        " X-A: b\r\n",
        "\tX-A: b\r\n",
        "X-A: b\r\n c\r\n",
        "X-A: b\r\n\tc\r\n",
        "X-A:\r\n b\r\n",
        "X-A: b\r\n \r\n",
        "X-A\r\n",
        ": b\r\n",
        "X-A:\r\n",
        "X-A:b\r\n",
        "X-A: \t b \t \r\n",
        "X-A: b\n",
        "X-A: b\nX-B: c\r\n",
        "X-A: b\rX-B: c\r\n",
        "X-A: b\r\r\n",
        "X-A: b\0\r\n",
        "\0\r\n",
        "X-A:: b\r\n",
        "X-A: :b\r\n",
        "\"X-A\": b\r\n",
        "X-A b\r\n",
        "Authorization: Basic eDp5\r\nAuthorization: Bearer other\r\n",
        "authorization: a\r\nAUTHORIZATION: b\r\n",
        "Authorization : Bearer other\r\n",
        "Authorization\0: Bearer other\r\n",
        "Authorization: a\r\n b\r\n",
        "Authorization:\r\n",
        "Proxy-Authorization: Basic eDp5\r\nProxy-Connection: keep-alive\r\n",
        "Connection: authorization\r\n",
        "Connection: authorization, host, content-length\r\n",
        "Connection: close, authorization, x-case\r\n",
        "Connection: Host\r\n",
        "Connection: host\r\nConnection: authorization\r\n",
        "Connection: transfer-encoding, te\r\nTE: trailers\r\n",
        "Connection: x-a\r\nX-A: b\r\n",
        "Connection: \"x-a\"\r\nX-A: b\r\n",
        "Connection: x-a,,x-b\r\nX-A: b\r\nX-B: c\r\n",
        "Connection: keep-alive\r\nKeep-Alive: timeout=5\r\n",
        "Connection: ,\r\n",
        "Connection:\r\n",
        "Connection: \0\r\n",
        "TE: trailers\r\n",
        "TE: gzip, trailers\r\n",
        "TE: gzip\r\n",
        "Trailer: x\r\n",
        "Upgrade: h2c\r\nConnection: upgrade\r\n",
        "Upgrade: h2c\r\nConnection: upgrade, http2-settings\r\nHTTP2-Settings: AAMAAABk\r\n",
        "Upgrade: websocket\r\n",
        "Expect: 100-continue\r\n",
        "Expect: 100-Continue\r\n",
        "Expect: 200-ok\r\n",
        "Expect:\r\n",
        "Max-Forwards: 0\r\n",
        "Forwarded: for=x\r\n",
        "Via: 1.1 x\r\n",
        "X-Valetkey-Error: x\r\n",
        "Cookie: a=b\r\n",
        "Content-Encoding: gzip\r\n",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
        "Referer: https://x/\r\nOrigin: https://x\r\n",
    ];
    for fields in odd {
        cases.push(Case::new("field", get(fields)));
        cases.push(Case::new(
            "field of a body",
            post(&format!("{fields}Content-Length: 5\r\n"), "hello"),
        ));
        cases.push(Case::new(
            "field behind the length",
            post(&format!("Content-Length: 5\r\n{fields}"), "hello"),
        ));
    }
    for count in [50, 90, 99, 101, 200, 5000] {
        cases.push(Case::new("many fields", get(&"X-A: b\r\n".repeat(count))));
    }
    for len in [1000, 8000, 16_000, 60_000, 70_000, 500_000] {
        cases.push(Case::new("a long value", get(&format!("X-A: {}\r\n", "x".repeat(len)))));
        cases.push(Case::new("a long name", get(&format!("X-{}: a\r\n", "x".repeat(len)))));
        cases.push(Case::new(
            "a long path",
            head(&format!("GET /v1/{{id}}/{} HTTP/1.1", "x".repeat(len)), ""),
        ));
    }
    cases
}

fn hosts_and_targets() -> Vec<Case> {
    let mut cases = Vec::new();
    let hosts = [
        "",
        "Host: peer.example.com\r\n",
        "Host: PEER.example.com.\r\n",
        "Host: peer.example.com:443\r\n",
        "Host:peer.example.com\r\n",
        "Host: peer.example.com:80\r\n",
        "Host: peer.example.com:\r\n",
        "Host: other.example.com\r\n",
        "Host:\r\n",
        "Host: \r\n",
        "Host: peer.example.com\r\nHost: peer.example.com\r\n",
        "Host: peer.example.com\r\nhost: other.example.com\r\n",
        "Host: other.example.com\r\nHost: peer.example.com\r\n",
        "Host: peer.example.com, other.example.com\r\n",
        "Host: peer.example.com other.example.com\r\n",
        "Host: user@peer.example.com\r\n",
        "Host: peer.example.com@other.example.com\r\n",
        "Host: peer.example.com/\r\n",
        "Host: https://peer.example.com\r\n",
        "Host: peer.example.com#\r\n",
        "Host: peer.example.com?x\r\n",
        "Host: peer.example.com\\\r\n",
        "Host: peer.example.com\0\r\n",
        "Host: peer.example.com\0.other.example.com\r\n",
        "Host: peer.example.com\u{b}\r\n",
        "Host : peer.example.com\r\n",
        " Host: peer.example.com\r\n",
        "Host: peer.example.com\r\n other.example.com\r\n",
        "Host:\r\n peer.example.com\r\n",
        "Host: peer%2eexample.com\r\n",
        "Host: peer.example.com..\r\n",
        "Host: [::1]\r\n",
        "Host: 127.0.0.1\r\n",
        "Host: peer.example.com:443:443\r\n",
        "Host: peer.example.com:+443\r\n",
        "Host: peer.example.com:0443\r\n",
        "Host: *\r\n",
        "X-Host: peer.example.com\r\n",
    ];
    for host in hosts {
        cases.push(Case::new(
            "host",
            format!("GET /v1/{{id}} HTTP/1.1\r\nX-Case: {{id}}\r\n{host}\r\n"),
        ));
        cases.push(Case::new(
            "host beside an absolute form",
            format!("GET https://{HOST}/v1/{{id}} HTTP/1.1\r\nX-Case: {{id}}\r\n{host}\r\n"),
        ));
        cases.push(Case::new(
            "host of HTTP/1.0",
            format!("GET /v1/{{id}} HTTP/1.0\r\nX-Case: {{id}}\r\n{host}\r\n"),
        ));
    }
    let targets = [
        "https://peer.example.com/v1/{id}",
        "HTTPS://PEER.example.com:443/v1/{id}",
        "https://peer.example.com./v1/{id}",
        "http://peer.example.com/v1/{id}",
        "https://other.example.com/v1/{id}",
        "https://peer.example.com:80/v1/{id}",
        "https://user@peer.example.com/v1/{id}",
        "https://user:pass@peer.example.com/v1/{id}",
        "https://peer.example.com@other.example.com/v1/{id}",
        "https://other.example.com@peer.example.com/v1/{id}",
        "https://@peer.example.com/v1/{id}",
        "https://peer.example.com",
        "https://peer.example.com?{id}",
        "https://peer.example.com#/v1/{id}",
        "https:///v1/{id}",
        "https:/v1/{id}",
        "https:v1/{id}",
        "//peer.example.com/v1/{id}",
        "//other.example.com/v1/{id}",
        "ftp://peer.example.com/v1/{id}",
        "wss://peer.example.com/v1/{id}",
        "peer.example.com/v1/{id}",
        "peer.example.com:443",
        "*",
        "v1/{id}",
        "?{id}",
        "#{id}",
        "/v1/{id}#fragment",
        "/v1/{id}#",
        "/v1/{id}?a=b#c",
        "/v1/{id}?",
        "/v1/{id}??",
        "/v1/{id}?a=/../b",
        "/v1/{id}/../../x",
        "/v1/{id}/%2e%2e/x",
        "/v1/{id}//x",
        "/v1/{id}\\x",
        "/v1/{id}%",
        "/v1/{id}%zz",
        "/v1/{id}%00",
        "/v1/{id}%0d%0aX:y",
        "/v1/{id};x",
        "/v1/{id}\0",
        "/v1/{id}\t",
        "/v1/{id}\u{e9}",
        "/v1/{id}\u{7f}",
        "/v1/{id}\"",
        "/v1/{id}<>",
        "/v1/{id}{}",
        "/v1/{id}|",
        "/v1/{id}^",
        "/v1/{id}`",
        "/v1/{id}[]",
        "/v1/{id}'",
        "/v1/{id}!$&()*+,;=:@",
        "/v1/{id}?\u{e9}",
        "/v1/{id}?{}",
        "/v1/{id}?\"",
        "/v1/{id}?<>",
        "/v1/{id}?`",
        "/v1/{id}?|",
        "/v1/{id}?\\",
        "/v1/{id}?^",
        "https://peer.example.com/v1/{id}#x",
        "https://peer.example.com\\@other.example.com/v1/{id}",
        "https://peer.example.com%2eevil.example/v1/{id}",
        "https://[::1]/v1/{id}",
        "https://peer.example.com:/v1/{id}",
    ];
    for target in targets {
        cases.push(Case::new("target", head(&format!("GET {target} HTTP/1.1"), "")));
        cases.push(Case::new("target of OPTIONS", head(&format!("OPTIONS {target} HTTP/1.1"), "")));
    }
    for method in [
        "CONNECT", "TRACE", "trace", "connect", "PRI", "HEAD", "OPTIONS", "PATCH", "PUT", "DELETE",
        "SEARCH",
    ] {
        for target in ["/v1/{id}", "peer.example.com:443", "https://peer.example.com/v1/{id}", "*"]
        {
            cases.push(Case::new("method", head(&format!("{method} {target} HTTP/1.1"), "")));
        }
        let fields = "Content-Length: 5\r\n";
        cases.push(Case::new(
            "method with a body",
            head(&format!("{method} /v1/{{id}} HTTP/1.1"), fields) + "hello",
        ));
    }
    cases
}

fn the_rest() -> Vec<Case> {
    let handshake = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let mut cases = vec![
        Case::new("pipelined", [get(""), get("X-Second: y\r\n")].concat()),
        Case::new(
            "pipelined behind a body",
            [post("Content-Length: 5\r\n", "hello"), get("X-Second: y\r\n")].concat(),
        ),
        Case::new(
            "pipelined behind chunks",
            [
                post("Transfer-Encoding: chunked\r\n", "5\r\nhello\r\n0\r\n\r\n"),
                get("X-Second: y\r\n"),
            ]
            .concat(),
        ),
        Case::new(
            "pipelined behind a close",
            [get("Connection: close\r\n"), SMUGGLED.into()].concat(),
        ),
        Case::new(
            "pipelined behind HTTP/1.0",
            [head("GET /v1/{id} HTTP/1.0", "").into(), SMUGGLED.as_bytes().to_vec()].concat(),
        ),
        Case::new(
            "pipelined behind another host",
            format!("GET /v1/{{id}} HTTP/1.1\r\nHost: other.example.com\r\n\r\n{SMUGGLED}"),
        ),
        Case::new("pipelined behind a refusal", head("TRACE /v1/{id} HTTP/1.1", "") + SMUGGLED),
        Case::new(
            "pipelined behind a body refused",
            head("TRACE /v1/{id} HTTP/1.1", "Content-Length: 5\r\n") + "hello" + SMUGGLED,
        ),
        Case::new(
            "a body that is a request",
            post(&format!("Content-Length: {}\r\n", SMUGGLED.len() + 2), SMUGGLED),
        ),
        Case::new(
            "a chunk that is a request",
            post(
                "Transfer-Encoding: chunked\r\n",
                &format!("{:x}\r\n{SMUGGLED}\r\n0\r\n\r\n", SMUGGLED.len() + 2),
            ),
        ),
        Case::new("a length too short", post("Content-Length: 4\r\n", "hello")),
        Case::new("a length too long", post("Content-Length: 500000\r\n", "hello")),
        Case::new(
            "an upgrade with a body",
            post(&format!("{handshake}Content-Length: 5\r\n"), "hello"),
        ),
        Case::new(
            "an upgrade with chunks",
            post(&format!("{handshake}Transfer-Encoding: chunked\r\n"), "5\r\nhello\r\n0\r\n\r\n"),
        ),
        Case::new(
            "an upgrade without key",
            get("Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"),
        ),
        Case::new(
            "expecting, with a body",
            post("Expect: 100-continue\r\nContent-Length: 5\r\n", "hello"),
        ),
        Case::new(
            "expecting, with chunks",
            post(
                "Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n",
                "5\r\nhello\r\n0\r\n\r\n",
            ),
        ),
        Case::new(
            "expecting something else",
            post("Expect: 42-something\r\nContent-Length: 5\r\n", "hello"),
        ),
        Case::new("an HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        Case::new("nothing", ""),
    ];
    let whole = String::from_utf8(post("Content-Length: 5\r\n", "hello")).unwrap();
    for len in (0..whole.len()).step_by(17) {
        cases.push(Case::new("cut, and another begun", whole[..len].to_owned()));
    }
    cases
}
