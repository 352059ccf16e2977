//! A scene: the sandbox world, a login, the real proxy in front of it, and a client that holds nothing.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::watch;
use valetkey::access::{PassRecord, Passes};
use valetkey::clock::Clock;
use valetkey::config::env::Environment;
use valetkey::config::{Config, CredentialKind, Overrides, SourceSpec};
use valetkey::credential::{Keep, LoginKind};
use valetkey::limits::Limits;
use valetkey::oauth::provider::Provider;
use valetkey::policy::{Demand, Level, Limit, Policy};
use valetkey::proxy::{Door, Parts, Proxy, Socket};
use valetkey::sandbox::client::{Client, Visit};
use valetkey::sandbox::{PretendLogin, Settings, World};
use valetkey::secret::Secret;
use valetkey::source::Source;
use valetkey::store::codex::CodexStore;
use valetkey::store::keyring::Keyring;
use valetkey::tasks::Tasks;
use valetkey::tls::ca::{LocalCa, Root};
use valetkey::tls::leaf::Leaves;
use valetkey::tls::trust::{TrustMode, TrustSettings, UpstreamTrust};
use valetkey::tokens::{self, Enforced, TokenSource, Tokens};
use valetkey::upstream::Upstream;
use valetkey::upstream::chain::Chain;
use valetkey::upstream::dial::Dialer;

/// The host that the ChatGPT login is for, and a path below its rule.
pub(crate) const CHATGPT: &str = "chatgpt.com:443";
pub(crate) const CODEX: &str = "/backend-api/codex";

/// The host that the API key is for.
pub(crate) const EXAMPLE: &str = "api.example.com:443";
pub(crate) const KEY: &str = "vk-canary-key-of-api-example-com";

/// A host of the world that no rule speaks of.
pub(crate) const OTHER: &str = "other.example.com:443";

/// What is different from the usual scene.
pub(crate) struct Options {
    /// How long the ChatGPT login's access token lives; `None` signs nobody in.
    pub(crate) lifetime: Option<time::Duration>,
    /// Keys of the top level, which stand before every table.
    pub(crate) top: &'static str,
    /// Rules and credentials behind the usual ones.
    pub(crate) rules: String,
    /// The world.
    pub(crate) settings: Settings,
}

impl Default for Options {
    fn default() -> Self {
        let lifetime = Some(time::Duration::hours(1));
        Self { lifetime, top: "", rules: String::new(), settings: Settings::default() }
    }
}

pub(crate) struct Scene {
    pub(crate) world: World,
    pub(crate) proxy: Proxy,
    /// Who is let in with what.
    pub(crate) passes: Arc<Passes>,
    /// What the proxy finds in the place of the passes when it looks next.
    pub(crate) kept_passes: Arc<Mutex<Option<Vec<PassRecord>>>>,
    /// How often it has looked.
    pub(crate) looks: Arc<AtomicUsize>,
    /// What the owner of the machine allows.
    pub(crate) policy: watch::Sender<Arc<Policy>>,
    pub(crate) address: SocketAddr,
    /// As it was when the scene began.
    pub(crate) login: Option<PretendLogin>,
    pub(crate) client: Client,
    pub(crate) clock: Clock,
    pub(crate) home: TempDir,
    refreshes: Tasks,
}

impl Scene {
    pub(crate) async fn usual() -> Self {
        Self::start(Options::default()).await
    }

    /// A scene whose ChatGPT token has expired.
    pub(crate) async fn expired() -> Self {
        let lifetime = Some(time::Duration::minutes(-1));
        Self::start(Options { lifetime, ..Options::default() }).await
    }

    pub(crate) async fn start(options: Options) -> Self {
        let clock = options.settings.clock.clone();
        let world = World::start(options.settings).await.unwrap();
        world.api().accept(Secret::new(KEY));
        let home = tempfile::tempdir().unwrap();
        fs::create_dir(home.path().join(".codex")).unwrap();
        let write = |life| world.issuer().write_auth_json(&home.path().join(".codex"), life);
        let login = options.lifetime.map(|life| write(life).unwrap());
        let config = config(&world, &home, &(options.top, &options.rules));

        let ca = LocalCa::open(&home.path().join("ca"), &config.ca_names(), clock.clone());
        let ca = ca.unwrap();
        let (own, pems): (Vec<_>, String) = (
            ca.roots().iter().map(Root::spki).collect(),
            ca.roots().iter().map(Root::pem).collect(),
        );
        let bundle = Some(world.ca_file().to_owned());
        let settings = TrustSettings { mode: TrustMode::Bundle, bundle, own };
        let trust = Arc::new(UpstreamTrust::load(settings).unwrap());
        let dialer = Dialer::new(trust, Chain::none(), config.upstream.resolve.clone());
        let upstream = Upstream::new(dialer);
        let refreshes = Tasks::new();
        let policy = watch::Sender::default();
        let allowed = Enforced { policy: policy.subscribe(), deletes: true };
        let tokens = tokens(&config, &clock, &upstream, &(refreshes.clone(), allowed)).await;
        let (passes, kept_passes) = (Arc::new(Passes::default()), Arc::default());
        let kept_passes: Arc<Mutex<Option<Vec<PassRecord>>>> = kept_passes;
        let looks = Arc::new(AtomicUsize::new(0));
        let proxy = Proxy::new(Parts {
            rules: config.rules,
            tokens: Arc::new(tokens),
            upstream,
            leaves: Leaves::new(ca).unwrap(),
            passes: passes.clone(),
            look: {
                let (passes, kept, looks) = (passes.clone(), kept_passes.clone(), looks.clone());
                Arc::new(move || {
                    looks.fetch_add(1, Ordering::Relaxed);
                    if let Some(records) = kept.lock().unwrap().take() {
                        passes.replace(records, &[]);
                    }
                    Box::pin(std::future::ready(()))
                })
            },
            clock: clock.clone(),
            limits: Limits::USUAL,
            audit: valetkey::audit::Audit::off(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        proxy.serve(Socket::Tcp(listener), Door::default());

        let roots = home.path().join("client.pem");
        fs::write(&roots, pems + world.ca_pem()).unwrap();
        let client = Client::through(address, &roots).unwrap();
        Self {
            world,
            proxy,
            passes,
            kept_passes,
            looks,
            policy,
            address,
            login,
            client,
            clock,
            home,
            refreshes,
        }
    }

    /// Another listener of the proxy's, which lets nobody in without a pass, and a client of it that has none.
    pub(crate) async fn strict(&self) -> (SocketAddr, Client) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let door = Door { require_pass: true, ..Door::default() };
        self.proxy.serve(Socket::Tcp(listener), door);
        (address, self.client.of(address))
    }

    /// Allows logins of this kind and no other from now on.
    pub(crate) fn allow_only(&self, kind: LoginKind, level: Level) {
        let demand = Demand::Methods(vec![kind]);
        let limit = Limit { demand, level, place: "/etc/valetkey/managed.toml".to_owned() };
        self.policy.send_replace(Arc::new(Policy::new(vec![limit])));
    }

    pub(crate) fn auth_json(&self) -> PathBuf {
        self.home.path().join(".codex/auth.json")
    }

    /// The cache as it is now.
    pub(crate) fn cached(&self) -> Value {
        serde_json::from_slice(&fs::read(self.auth_json()).unwrap()).unwrap()
    }

    /// Waits for every refresh that is under way.
    pub(crate) async fn refreshed(&self) {
        self.refreshes.finished().await;
    }

    /// A GET of a Codex path over HTTP/1.1.
    pub(crate) async fn get(&self, path: &str) -> Response<Bytes> {
        let visit = Visit::to(CHATGPT, valetkey::sandbox::client::HTTP1);
        self.client.get(visit, &format!("{CODEX}{path}")).await.unwrap()
    }

    /// Whether the proxy still does its work.
    pub(crate) async fn assert_alive(&self) {
        let visit = Visit::to(EXAMPLE, valetkey::sandbox::client::HTTP1);
        let answer = self.client.get(visit, "/v1/alive").await.unwrap();
        assert_eq!(answer.status(), 200);
    }
}

fn config(world: &World, home: &TempDir, (top, rules): &(&str, &str)) -> Config {
    let key = home.path().join("example.key");
    fs::write(&key, KEY).unwrap();
    let text = format!(
        "{top}\n[credentials.example]\nkind = \"api_key\"\nsource = \"file:{}\"\n\
         [[rules]]\nhost = \"api.example.com\"\npaths = [\"/v1/\"]\ncredential = \"example\"\n{rules}\n{}",
        key.display(),
        world.upstream_toml()
    );
    let file = home.path().join("config.toml");
    fs::write(&file, text).unwrap();
    let overrides = Overrides { config: Some(file), ..Overrides::default() };
    let env = Environment::from_pairs([("HOME", home.path())]);
    Config::load(&overrides, &env).unwrap_or_else(|errors| panic!("{}", errors.render(false, 100)))
}

async fn tokens(
    config: &Config,
    clock: &Clock,
    upstream: &Upstream,
    (refreshes, policy): &(Tasks, Enforced),
) -> Tokens {
    let mut sources = std::collections::BTreeMap::new();
    for (name, kind) in &config.credentials {
        let parts = tokens::Parts {
            name: name.clone(),
            clock: clock.clone(),
            refreshes: refreshes.clone(),
            policy: policy.clone(),
            background: Tasks::new(),
            audit: valetkey::audit::Audit::off(),
        };
        let source = match kind {
            CredentialKind::ApiKey { source: SourceSpec::File(path) } => {
                let source = Source::file(path);
                TokenSource::fixed(parts, Arc::new(move || source.load().map_err(Into::into)))
            }
            CredentialKind::ApiKey { .. } => panic!("this scene has no variables"),
            CredentialKind::OAuth(_) => panic!("this scene has no other issuers"),
            CredentialKind::Codex { home, .. } => {
                let store =
                    CodexStore::new(home.clone(), Keep::File, Keyring::system(), Tasks::new());
                let issuer = Provider::codex(upstream.clone());
                TokenSource::rotating(parts, Arc::new(store), Arc::new(issuer)).await
            }
        };
        sources.insert(name.clone(), Arc::new(source));
    }
    Tokens::new(sources)
}

/// The code and the words of a refusal; it must have a sentence and a hint.
pub(crate) fn refusal(answer: &Response<Bytes>) -> (u16, String) {
    let code =
        answer.headers().get("x-valetkey-error").map(|code| code.to_str().unwrap().to_owned());
    let code = code.unwrap_or_else(|| panic!("not a refusal of ours: {answer:?}"));
    let body: Value = serde_json::from_slice(answer.body()).unwrap();
    assert_eq!(body["error"]["code"], code.as_str());
    for field in ["message", "hint"] {
        assert!(body["error"][field].as_str().is_some_and(|text| text.len() > 5), "{body}");
    }
    (answer.status().as_u16(), code)
}

/// Longest wait for anything that a test awaits.
pub(crate) async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), what).await.expect("it took more than 30 s")
}
