//! An upstream that keeps every byte that it gets, over HTTP/1.1 and HTTP/2, and reads it strictly.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use valetkey::sandbox::Settings;
use valetkey::tasks::Tasks;

use super::hpack::Hpack;
use super::strict::{self, Message, Reading};
use super::support::{Options, Scene, within};
use super::wire::{
    ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PING, RST_STREAM, SETTINGS,
    STATUS_200, Wire, frame,
};

/// The host that the recorder plays; a rule signs in to it.
pub(super) const HOST: &str = "peer.example.com";

/// What the recorder got of one request.
#[derive(Clone, Debug)]
pub(super) enum Got {
    Whole(Message),
    /// It broke off; what there was of its head.
    Cut(Vec<(String, Vec<u8>)>, String),
    /// No request at all.
    Unclean(String),
}

/// What a recorder got, in no order of its connections.
#[derive(Clone, Default)]
pub(super) struct Record(Arc<Mutex<Vec<Got>>>);

impl Record {
    /// What came, which is then forgotten.
    pub(super) fn take(&self) -> Vec<Got> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }

    fn all(&self) -> Vec<Got> {
        self.0.lock().unwrap().clone()
    }

    fn add(&self, got: Got) {
        self.0.lock().unwrap().push(got);
    }
}

/// A scene with a recorder in it, and the tasks of its connections.
pub(super) async fn scene(alpn: &[&[u8]]) -> (Scene, Record, Tasks) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peers = vec![(HOST.to_owned(), listener.local_addr().unwrap())];
    let rules = format!("[[rules]]\nhost = \"{HOST}\"\ncredential = \"example\"\n");
    let settings = Settings { peers, ..Settings::default() };
    let scene = Scene::start(Options { rules, settings, ..Options::default() }).await;
    let acceptor = scene.world.acceptor(alpn).unwrap();
    let (record, tasks) = (Record::default(), Tasks::new());
    Tasks::new().spawn(accept(listener, acceptor, record.clone(), tasks.clone()));
    (scene, record, tasks)
}

/// Everything that the proxy sent, once it is gone.
pub(super) async fn in_the_end(scene: Scene, record: &Record, tasks: &Tasks) -> Vec<Got> {
    scene.proxy.shut_down(std::time::Duration::from_secs(5)).await;
    drop(scene);
    within(tasks.finished()).await;
    record.all()
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, record: Record, tasks: Tasks) {
    while let Ok((stream, _)) = listener.accept().await {
        stream.set_nodelay(true).unwrap();
        let (acceptor, record) = (acceptor.clone(), record.clone());
        tasks.spawn(async move {
            // One that the proxy gives up in its handshake has sent no request.
            let Ok(tls) = acceptor.accept(stream).await else { return };
            match tls.get_ref().1.alpn_protocol() {
                Some(b"h2") => http2(tls, &record).await,
                _ => http1(tls, &record).await,
            }
        });
    }
}

pub(super) async fn http1(mut stream: impl AsyncRead + AsyncWrite + Unpin, record: &Record) {
    let mut bytes = Vec::new();
    loop {
        match strict::read(&bytes) {
            Reading::Whole { message, len, in_doubt: false, is_last } => {
                bytes.drain(..len);
                record.add(Got::Whole(message));
                let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
                if is_last || stream.write_all(answer).await.is_err() {
                    let _closed = stream.shutdown().await;
                    return;
                }
                continue;
            }
            Reading::Begun => (),
            unclean => {
                return record.add(Got::Unclean(format!("{unclean:?}: {}", bytes.escape_ascii())));
            }
        }
        if !matches!(stream.read_buf(&mut bytes).await, Ok(1..)) {
            break;
        }
    }
    if !bytes.is_empty() {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let fields = text.lines().skip(1).take_while(|line| !line.is_empty());
        let fields = fields.filter_map(|line| line.split_once(": "));
        let fields =
            fields.map(|(name, value)| (name.to_ascii_lowercase(), value.as_bytes().to_vec()));
        record.add(Got::Cut(fields.collect(), text.lines().next().unwrap_or_default().to_owned()));
    }
}

/// A request on its way.
struct Open {
    stream: u32,
    head: Vec<(Vec<u8>, Vec<u8>)>,
    body: Vec<u8>,
}

impl Open {
    /// Its head as that of HTTP/1.1; an error is what is unclean.
    fn message(&self, trailers: Vec<(Vec<u8>, Vec<u8>)>) -> Result<Message, String> {
        let mut pseudo = [const { None }; 4];
        let mut fields = Vec::new();
        for (name, value) in &self.head {
            let text = String::from_utf8(name.clone()).map_err(|_| "a name is no text")?;
            if let Some(at) =
                [":method", ":path", ":authority", ":scheme"].iter().position(|it| *it == text)
            {
                let value =
                    String::from_utf8(value.clone()).map_err(|_| "a pseudo-header is no text")?;
                if !fields.is_empty() || pseudo[at].replace(value).is_some() {
                    return Err(format!("{text} is twice or late"));
                }
            } else {
                fields.push((text, value.clone()));
            }
        }
        let [Some(method), Some(target), Some(authority), Some(scheme)] = pseudo else {
            return Err("a pseudo-header is missing".to_owned());
        };
        let trailers: Vec<_> = trailers
            .into_iter()
            .map(|(name, value)| (String::from_utf8_lossy(&name).into_owned(), value))
            .collect();
        for (name, value) in fields.iter().chain(&trailers) {
            let is_plain = strict::is_token(name.as_bytes())
                && !name.bytes().any(|it| it.is_ascii_uppercase());
            let is_clean = value.iter().all(|byte| matches!(byte, b'\t' | b' '..=b'~' | 0x80..))
                && value.trim_ascii() == value;
            let is_of_http1 =
                ["connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"]
                    .contains(&name.as_str());
            if !is_plain || !is_clean || is_of_http1 || name == "te" && value != b"trailers" {
                return Err(format!("{name}: {}", value.escape_ascii()));
            }
        }
        let told: Vec<_> = fields.iter().filter(|(name, _)| name == "content-length").collect();
        let is_right = |told: &[u8]| {
            std::str::from_utf8(told).is_ok_and(|it| it.parse() == Ok(self.body.len()))
        };
        if told.len() > 1 || !told.iter().all(|(_, told)| is_right(told)) {
            return Err(format!("{told:?} for {} octets", self.body.len()));
        }
        let is_target = target.starts_with('/')
            && target.bytes().all(|it| strict::is_of_uri(it) || strict::is_left_in_uris(it))
            || target == "*" && method == "OPTIONS";
        if scheme != "https" || !is_target || !strict::is_token(method.as_bytes()) {
            return Err(format!("{method} {scheme} {target}"));
        }
        fields.push(("host".to_owned(), authority.into_bytes()));
        Ok(Message { method, target, version: "2", fields, body: self.body.clone(), trailers })
    }
}

async fn http2(stream: impl AsyncRead + AsyncWrite + Unpin, record: &Record) {
    let Ok(mut wire) = Wire::server(stream, &[]).await else { return };
    let (mut hpack, mut open) = (Hpack::default(), Vec::<Open>::new());
    let mut block = Vec::new();
    let mut ends = false;
    while let Ok(got) = wire.read().await {
        match got.kind {
            HEADERS | CONTINUATION => {
                if got.kind == HEADERS {
                    assert_eq!(
                        got.flags & !(END_STREAM | END_HEADERS),
                        0,
                        "padded or with a priority"
                    );
                    (block, ends) = (Vec::new(), got.flags & END_STREAM != 0);
                }
                block.extend(&got.payload);
                if got.flags & END_HEADERS == 0 {
                    continue;
                }
                let fields = hpack.decode(&block);
                match open.iter().position(|it| it.stream == got.stream) {
                    Some(at) => finish(&open.remove(at), fields, record),
                    None => {
                        open.push(Open { stream: got.stream, head: fields, body: Vec::new() });
                        if ends {
                            finish(&open.pop().unwrap(), Vec::new(), record);
                        }
                    }
                }
                if !ends {
                    continue;
                }
            }
            DATA => {
                let Some(at) = open.iter().position(|it| it.stream == got.stream) else {
                    record.add(Got::Unclean(format!("DATA for stream {}", got.stream)));
                    continue;
                };
                open[at].body.extend(&got.payload);
                if got.flags & END_STREAM == 0 {
                    continue;
                }
                finish(&open.remove(at), Vec::new(), record);
            }
            RST_STREAM => {
                if let Some(at) = open.iter().position(|it| it.stream == got.stream) {
                    cut(&open.remove(at), record);
                }
                continue;
            }
            SETTINGS | PING if got.flags & ACK != 0 => continue,
            _ => continue,
        }
        let answer = frame(HEADERS, END_HEADERS | END_STREAM, got.stream, STATUS_200);
        if wire.write(&answer).await.is_err() {
            break;
        }
    }
    open.iter().for_each(|open| cut(open, record));
}

fn finish(open: &Open, trailers: Vec<(Vec<u8>, Vec<u8>)>, record: &Record) {
    record.add(match open.message(trailers) {
        Ok(message) => Got::Whole(message),
        Err(what) => {
            let head =
                open.head.iter().map(|(name, value)| [name, &b": "[..], value, b"\n"].concat());
            Got::Unclean(format!(
                "{what} of\n{}",
                String::from_utf8_lossy(&head.collect::<Vec<_>>().concat())
            ))
        }
    });
}

fn cut(open: &Open, record: &Record) {
    let text = |it: &Vec<u8>| String::from_utf8_lossy(it).into_owned();
    let path = open.head.iter().find(|(name, _)| name == b":path").map(|(_, value)| text(value));
    let fields = open.head.iter().map(|(name, value)| (text(name), value.clone())).collect();
    record.add(Got::Cut(fields, path.unwrap_or_default()));
}
