//! Chunked bodies: each arrives octet by octet as the oracle reads it, or breaks off.

use std::cell::RefCell;
use std::convert::Infallible;
use std::rc::Rc;

use bytes::Bytes;
use http::{Request, Response, Version};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use valetkey::upstream::body::Inbound;

use super::attack::{Attack, Verdict};
use super::strict::{self, Reading};
use crate::rounds;

/// Through hyper's server and our own reading of its bodies, which is what the data path has; on a pipe and not behind
/// TLS, because a million handshakes take an hour.
#[test]
fn a_chunked_body_arrives_as_it_is_or_breaks_off() {
    let attack = Attack { name: "chunks", rounds: rounds(1_000_000, 20_000_000), words: WORDS };
    attack.run(|input, _| RUNTIME.with(|runtime| runtime.block_on(judge(input))));
}

thread_local! {
    static RUNTIME: tokio::runtime::Runtime =
        tokio::runtime::Builder::new_current_thread().build().unwrap();
}

async fn judge(input: &[u8]) -> Verdict {
    let sent = [HEAD, input].concat();
    let came = came(&sent).await;
    let said = match strict::read(&sent) {
        Reading::Whole { message, in_doubt, .. } => Some((message, in_doubt)),
        Reading::Frayed(message) => Some((message, true)),
        Reading::Begun | Reading::Broken(_) => None,
    };
    match (came, said) {
        (Some((body, trailers)), Some((message, _))) => {
            if body != message.body {
                return Err(format!("{} came", body.escape_ascii()));
            }
            match trailers.iter().find(|trailer| !message.trailers.contains(trailer)) {
                Some((name, value)) => Err(format!("nobody said {name}: {}", value.escape_ascii())),
                None => Ok(true),
            }
        }
        (Some((body, _)), None) => Err(format!("{} came of what is no body", body.escape_ascii())),
        (None, Some((_, false))) => Err("it did not come".to_owned()),
        (None, _) => Ok(false),
    }
}

type Body = (Vec<u8>, Vec<(String, Vec<u8>)>);

/// The body of the first request, when it came to its end.
async fn came(sent: &[u8]) -> Option<Body> {
    let (client, server) = tokio::io::duplex(64 * 1024);
    let found: Rc<RefCell<Option<Body>>> = Rc::default();
    let noted = found.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let noted = noted.clone();
        async move {
            let body = Inbound::new(request.into_body(), Version::HTTP_11).collect().await;
            if let Ok(body) = body
                && noted.borrow().is_none()
            {
                let trailers = body.trailers().cloned().unwrap_or_default();
                let trailers = trailers
                    .iter()
                    .map(|(name, value)| (name.to_string(), value.as_bytes().to_vec()));
                let trailers = trailers.collect();
                noted.replace(Some((body.to_bytes().to_vec(), trailers)));
            }
            Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
        }
    });
    let serving = http1::Builder::new()
        .auto_date_header(false)
        .max_buf_size(64 * 1024)
        .keep_alive(false)
        .serve_connection(TokioIo::new(server), service);
    let (mut reader, mut writer) = tokio::io::split(client);
    let talking = async {
        let _written = writer.write_all(sent).await;
        let mut answer = Vec::new();
        let mut reading = std::pin::pin!(reader.read_to_end(&mut answer));
        for _ in 0..TURNS {
            tokio::select! {
                biased;
                _ended = &mut reading => return,
                () = tokio::task::yield_now() => (),
            }
        }
        // It waits for more.
        let _closed = writer.shutdown().await;
        let _ended = reading.await;
    };
    let (_served, ()) = tokio::join!(serving, talking);
    found.take()
}

/// hyper gives a request up whose client has ended: first it has so many turns for what there is, one for each chunk.
const TURNS: usize = 64;

const HEAD: &[u8] = b"POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n";

const WORDS: &[&str] = &[
    "\r\n",
    "\n",
    "\r",
    "0",
    "00",
    "0\r\n\r\n",
    "5\r\nhello\r\n",
    "a",
    "A",
    "f",
    "FFFFFFFFFFFFFFFF",
    "10000000000000000",
    ";",
    ";a=b",
    ";a=\"b\"",
    "\"",
    " ",
    "\t",
    "-",
    "+",
    "0x",
    "X-A: b\r\n",
    "Content-Length: 3\r\n",
    ":",
    "GET / HTTP/1.1\r\n",
    "\0",
    "1\r\n",
    "7fffffffffffffff",
];
