//! Waits on loopback for the browser that comes back from signing in (RFC 8252 section 7.3), and shows it one
//! page. The listener is there only while somebody signs in.

use std::convert::Infallible;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, HeaderValue, LOCATION,
    REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::LoginError;
use super::authorize::Attempt;
use super::provider::Dialect;
use crate::peer;
use crate::secret::Secret;
use crate::tasks::Tasks;

/// A listener that waits for a browser.
pub struct Callback {
    listener: TcpListener,
    address: SocketAddr,
}

impl Callback {
    /// Listens where the issuer will send the browser: for Codex's on the two ports that it is registered
    /// with, for every other on a free one.
    ///
    /// A login that holds Codex's port is asked to go, as Codex does it: `GET /cancel`, once for each port.
    ///
    /// # Errors
    ///
    /// [`LoginError::PortTaken`], or what the system says.
    pub async fn open(dialect: Dialect) -> Result<Self, LoginError> {
        let listener = match dialect {
            Dialect::Standard => bind(0).await.map_err(machine)?,
            Dialect::Codex => codex_port().await?,
        };
        let address = listener.local_addr().map_err(machine)?;
        Ok(Self { listener, address })
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// The redirect URI of this listener, as it is registered.
    pub fn redirect_uri(&self) -> String {
        format!("http://{}{PATH}", self.address)
    }

    /// Waits for the answer to this attempt. Another answer gets a 400, and the waiting goes on.
    ///
    /// # Errors
    ///
    /// [`LoginError::Cancelled`] when another login wants the port, [`LoginError::TimedOut`] after ten
    /// minutes.
    pub async fn redirected(self, attempt: &Attempt) -> Result<Arrival, LoginError> {
        let (queries, mut arrived) = mpsc::channel(1);
        let desk = Arc::new(Desk {
            address: self.address,
            queries,
            page: Mutex::new(None),
            shown: watch::Sender::new(false),
        });
        let stop = CancellationToken::new();
        let tasks = Tasks::new();
        let serving = Arc::clone(&desk).accept(self.listener, tasks.clone(), stop.clone());
        tasks.spawn(stop.clone().run_until_cancelled_owned(serving));
        let browser = Browser { desk, _stop: stop.drop_guard() };
        let answer = async {
            loop {
                match arrived.recv().await {
                    Some(Knock::Cancel) | None => return Err(LoginError::Cancelled),
                    Some(Knock::Redirect(query, judged)) => {
                        let read = attempt.read(&query);
                        // A browser that has gone does not change what it brought.
                        let _gone = judged.send(read.is_some());
                        if let Some(read) = read {
                            return Ok(read);
                        }
                    }
                }
            }
        };
        match timeout(LIMIT, answer).await {
            Ok(answer) => Ok(Arrival { code: answer?, browser }),
            Err(_late) => Err(LoginError::TimedOut(LIMIT.as_secs() / 60)),
        }
    }
}

/// A browser that came back.
pub struct Arrival {
    /// What it brought: a code, or the issuer's no.
    pub code: Result<Secret, LoginError>,
    /// The browser, which waits for a page.
    pub browser: Browser,
}

/// A browser that waits to be told how signing in ended. Dropped, its connections are cut.
pub struct Browser {
    desk: Arc<Desk>,
    _stop: DropGuard,
}

impl Browser {
    /// Shows a page, and waits a moment until it is there. The listener closes after this.
    pub async fn show(self, page: String) {
        let mut shown = self.desk.shown.subscribe();
        *self.desk.page() = Some(page);
        self.desk.shown.send_modify(|_| {});
        // A browser that does not come for it is no reason to wait any longer.
        drop(timeout(SHOW_LIMIT, shown.wait_for(|shown| *shown)).await);
    }
}

/// What the connections of one listener share.
struct Desk {
    address: SocketAddr,
    queries: mpsc::Sender<Knock>,
    page: Mutex<Option<String>>,
    /// Moves when there is a page; true once it was fetched.
    shown: watch::Sender<bool>,
}

/// What a request wants of the login.
enum Knock {
    Cancel,
    /// The query of a redirect, and whoever waits to hear whether it is the right one.
    Redirect(String, oneshot::Sender<bool>),
}

impl Desk {
    async fn accept(self: Arc<Self>, listener: TcpListener, tasks: Tasks, stop: CancellationToken) {
        loop {
            let Ok((stream, client)) = listener.accept().await else {
                // Descriptors have run out; others may give some back.
                sleep(PAUSE).await;
                continue;
            };
            if !self.is_for(client) {
                tracing::warn!("another user of this machine came to the login's port");
                continue;
            }
            let desk = Arc::clone(&self);
            let service = service_fn(move |request| {
                let desk = Arc::clone(&desk);
                async move { Ok::<_, Infallible>(desk.answer(request).await) }
            });
            let connection = http1::Builder::new()
                .keep_alive(false)
                .max_buf_size(MOST_HEAD)
                .serve_connection(TokioIo::new(stream), service);
            tasks.spawn(stop.clone().run_until_cancelled_owned(async move {
                // A browser opens connections that it never uses.
                drop(timeout(LIMIT, connection).await);
            }));
        }
    }

    /// Whether it is our own user, or root, who forwards ports of containers. What others of this machine can
    /// read in the arguments of a browser is enough to answer for it.
    fn is_for(&self, client: SocketAddr) -> bool {
        let own = rustix::process::geteuid().as_raw();
        match peer::uid_of(client, self.address) {
            Ok(uid) => uid.is_some_and(|uid| uid == own || uid == 0),
            Err(error) => {
                tracing::warn!(%error, "the kernel does not say who comes to the login's port");
                false
            }
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if request.method() != Method::GET {
            return text(StatusCode::METHOD_NOT_ALLOWED, "Only GET");
        }
        // A name that leads to loopback is not our name: no page of another site may read an answer.
        let host = request.headers().get(HOST).and_then(|host| host.to_str().ok());
        let names = [self.address.to_string(), format!("localhost:{}", self.address.port())];
        if host.is_none_or(|host| !names.iter().any(|name| name == host)) {
            return text(StatusCode::FORBIDDEN, "Wrong host");
        }
        match request.uri().path() {
            PATH => self.redirected(request.uri().query().unwrap_or_default()).await,
            PAGE => self.page_or_wait().await,
            "/cancel" if is_of_a_page(&request) => text(StatusCode::FORBIDDEN, "Not from a page"),
            "/cancel" => {
                let _ended_already = self.queries.send(Knock::Cancel).await;
                text(StatusCode::OK, "Login cancelled")
            }
            _ => text(StatusCode::NOT_FOUND, "Not found"),
        }
    }

    async fn redirected(&self, query: &str) -> Response<Full<Bytes>> {
        let (judged, verdict) = oneshot::channel();
        let knock = Knock::Redirect(query.to_owned(), judged);
        // Where the answer has come already, this comes back with `judged` in it, and goes: nobody judges it.
        drop(self.queries.send(knock).await);
        if verdict.await != Ok(true) {
            return text(StatusCode::BAD_REQUEST, "State mismatch");
        }
        // Away from the address with the code in it.
        let mut response = text(StatusCode::SEE_OTHER, "");
        response.headers_mut().insert(LOCATION, HeaderValue::from_static(PAGE));
        response
    }

    /// The page, as soon as there is one.
    async fn page_or_wait(&self) -> Response<Full<Bytes>> {
        let mut changes = self.shown.subscribe();
        let page = loop {
            changes.mark_unchanged();
            let page = self.page().clone();
            match page {
                Some(page) => break page,
                None if changes.changed().await.is_err() => return text(StatusCode::GONE, "Gone"),
                None => {}
            }
        };
        let mut response = text(StatusCode::OK, page);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
        headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(super::page::POLICY));
        self.shown.send_replace(true);
        response
    }

    fn page(&self) -> MutexGuard<'_, Option<String>> {
        self.page.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a page in a browser asks, and not a program or a person (Fetch Metadata).
fn is_of_a_page(request: &Request<Incoming>) -> bool {
    let site = request.headers().get("sec-fetch-site");
    site.is_some_and(|site| site != "none") || request.headers().contains_key("origin")
}

fn text(status: StatusCode, content: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(content.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// The first of Codex's two ports that is free, or becomes free.
async fn codex_port() -> Result<TcpListener, LoginError> {
    for port in CODEX_PORTS {
        let mut asked = false;
        for _ in 0..TRIES {
            match bind(port).await {
                Ok(listener) => return Ok(listener),
                Err(error) if error.kind() != ErrorKind::AddrInUse => return Err(machine(error)),
                Err(_taken) if !asked => {
                    asked = true;
                    // Whether it understood shows in the port.
                    drop(timeout(CANCEL_LIMIT, cancel(port)).await);
                }
                // Whoever holds it is another process, of which nothing is heard.
                Err(_taken) => sleep(PAUSE).await,
            }
        }
    }
    let [_, last] = CODEX_PORTS;
    Err(LoginError::PortTaken(format!("Port 127.0.0.1:{last} is already in use")))
}

async fn bind(port: u16) -> std::io::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await
}

/// Asks whoever waits at the port for a browser to give up.
#[expect(clippy::disallowed_methods, reason = "another login of this user, never an upstream")]
async fn cancel(port: u16) -> std::io::Result<()> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    let request =
        format!("GET /cancel HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = [0; 256];
    stream.read(&mut answer).await.map(drop)
}

fn machine(error: std::io::Error) -> LoginError {
    LoginError::Machine(format!("no port on 127.0.0.1: {error}"))
}

/// The path that Codex's client is registered with.
const PATH: &str = "/auth/callback";

/// Where the browser finds how it ended.
const PAGE: &str = "/done";

/// The ports that Codex's client is registered with (observed, Codex 0.169.0).
const CODEX_PORTS: [u16; 2] = [1455, 1457];

/// As Codex does it: ten tries for a port, 200 ms apart, and 2 s for the one who is to go.
const TRIES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(200);
const CANCEL_LIMIT: Duration = Duration::from_secs(2);

/// How long a person has to sign in.
const LIMIT: Duration = Duration::from_secs(10 * 60);

/// How long a browser has to fetch the page.
const SHOW_LIMIT: Duration = Duration::from_secs(5);

/// Longest head that is read; an issuer's redirect is below 4 KiB.
const MOST_HEAD: usize = 32 * 1024;
