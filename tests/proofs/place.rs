//! A login in each of the places where one is kept, which grows as old as a proof wants it.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::Response;
use serde_json::{Value, json};
use time::format_description::well_known::Rfc3339;
use valetkey::clock::Clock;
use valetkey::credential::{CredentialName, Keep, Login, TokenSet};
use valetkey::sandbox::client::{HTTP1, Visit};
use valetkey::sandbox::{Issuer, OAUTH_CLIENT_ID, OAUTH_HOST, PretendLogin, Settings};
use valetkey::secret::{Fingerprint, Secret};
use valetkey::store::RecordStore as _;
use valetkey::store::keyring::Keyring;
use valetkey::store::sealed::SealedStore;
use valetkey::tasks::Tasks;

use super::desktop::Desktop;
use super::served::Serving;
use super::support::{Done, Scene, done};

/// Where a login is kept, and of what kind it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    /// A ChatGPT login in Codex's file.
    File,
    /// A ChatGPT login in Codex's entry of a real keyring.
    Entry,
    /// A login at another issuer, in a file of ours.
    Plain,
    /// The same, sealed with a key in a real keyring.
    Sealed,
}

/// A home with one login, which has been refreshed once.
pub(crate) struct Place {
    pub(crate) kept: Kept,
    home: Home,
}

enum Home {
    Bare(Box<Scene>),
    Desktop(Box<Desktop>),
}

impl Place {
    /// `None` where a program is missing.
    pub(crate) async fn new(kept: Kept) -> Option<Self> {
        let home = match kept {
            Kept::File => Home::Bare(Box::new(Scene::new(PAST).await)),
            Kept::Plain => {
                let scene = Scene::new(PAST).await;
                scene.configure(&(oauth("file") + &scene.world.upstream_toml()));
                // The one login is the only one that is refreshed.
                fs::remove_file(scene.path(".codex/auth.json")).unwrap();
                Home::Bare(Box::new(scene))
            }
            Kept::Entry => {
                let mut desktop = Desktop::new("keyring").await?;
                desktop.start_keyring(Some("pass")).await;
                desktop.move_login_into_keyring().await;
                Home::Desktop(Box::new(desktop))
            }
            Kept::Sealed => {
                let settings = Settings { token_lifetime: SEALED_LIFE, ..Settings::default() };
                let mut desktop = Desktop::in_world("keyring", settings).await?;
                desktop.start_keyring(Some("pass")).await;
                let scene = &desktop.scene;
                let oauth = oauth("keyring") + "grant = \"device_code\"\n";
                scene.configure(&(oauth + &scene.world.upstream_toml()));
                Home::Desktop(Box::new(desktop))
            }
        };
        let place = Self { kept, home };
        place.signs_in().await;
        Some(place)
    }

    pub(crate) fn scene(&self) -> &Scene {
        match &self.home {
            Home::Bare(scene) => scene,
            Home::Desktop(desktop) => &desktop.scene,
        }
    }

    pub(crate) fn issuer(&self) -> &Issuer {
        self.scene().world.issuer()
    }

    /// Puts a new login in the place of whatever is there, and refreshes it once, so that one of us has recorded how
    /// long it lives.
    pub(crate) async fn signs_in(&self) {
        match self.kept {
            Kept::File | Kept::Entry | Kept::Plain => self.expired_login().await,
            Kept::Sealed => {
                self.issuer().device_interval(1);
                self.issuer().approve_device();
                let arguments = ["login", "--device-auth", "--credential", OAUTH_NAME];
                let done = self.scene().typed(&arguments).await;
                assert_eq!(done.status, 0, "{done:?}");
                return;
            }
        }
        let token = self.token().await;
        assert_eq!(token.status, 0, "{token:?}");
        assert!(self.accepts(&token), "{token:?}");
    }

    /// Puts a new login there as Codex or a `valetkey login` would, whose access token ended a minute ago.
    pub(crate) async fn expired_login(&self) {
        match self.kept {
            Kept::File => {
                let home = self.scene().path(".codex");
                self.issuer().write_auth_json(&home, PAST).unwrap();
            }
            Kept::Entry => {
                let login = self.issuer().login(PAST).auth_json();
                self.write(&serde_json::from_str(&login).unwrap()).await;
            }
            Kept::Plain => {
                let (tasks, login) = (Tasks::new(), set_of(self.issuer().oauth_login(PAST)));
                let folder = self.stored().parent().unwrap().to_owned();
                let name: CredentialName = OAUTH_NAME.parse().unwrap();
                let store = SealedStore::new(folder, &name, Keep::File, Keyring::system(), tasks);
                store.put(Some(Login::OAuth(login)), None).await.unwrap();
                drop(store.get().await.unwrap());
            }
            Kept::Sealed => panic!("nobody but the program can write a sealed login"),
        }
    }

    /// Makes the login look as if it had been refreshed so long ago; its tokens live for an hour. A sealed one
    /// cannot be touched, and lives for a few seconds.
    pub(crate) async fn grow_old(&self, age: time::Duration) {
        let refreshed = (Clock::system().now() - age).format(&Rfc3339).unwrap();
        match self.kept {
            Kept::File | Kept::Entry => {
                let mut value = self.read().await;
                value["last_refresh"] = json!(refreshed);
                self.write(&value).await;
            }
            Kept::Plain => {
                let mut value = self.read().await;
                value["login"]["last_refresh"] = json!(refreshed);
                self.write(&value).await;
            }
            // Time is what is waited for.
            Kept::Sealed => tokio::time::sleep(SEALED_LIFE.unsigned_abs()).await,
        }
    }

    /// The login goes on: with an access token that has expired by every account, one refresh brings another.
    pub(crate) async fn assert_goes_on(&self, case: &str) {
        let before = (self.issuer().refreshes(), self.issuer().reuses());
        self.grow_old(EXPIRED).await;
        if self.kept != Kept::Sealed {
            let mut value = self.read().await;
            let set = if self.kept == Kept::Plain { "login" } else { "tokens" };
            let name = if self.kept == Kept::Plain { "access" } else { "access_token" };
            // Whoever has lost the record of a login goes by what the token says.
            let claims = URL_SAFE_NO_PAD.encode(json!({ "exp": 1_700_000_000 }).to_string());
            value[set][name] = json!(format!("e30.{claims}.c2ln"));
            self.write(&value).await;
        }
        let token = self.token().await;
        assert!(token.status == 0 && self.accepts(&token), "{case}: {token:?}");
        let after = (self.issuer().refreshes(), self.issuer().reuses());
        assert_eq!(after, (before.0 + 1, before.1), "{case}");
    }

    /// Fingerprint of the refresh token that is kept; `None` where only the program could tell.
    pub(crate) async fn refresh_token(&self) -> Option<Fingerprint> {
        if self.kept == Kept::Sealed {
            return None;
        }
        let value = self.read().await;
        let token = match self.kept {
            Kept::Plain => &value["login"]["refresh"],
            _ => &value["tokens"]["refresh_token"],
        };
        Some(Fingerprint::of(token.as_str().unwrap().as_bytes()))
    }

    /// Whatever is kept, which must be whole.
    pub(crate) async fn read(&self) -> Value {
        match &self.home {
            Home::Desktop(desktop) if self.kept == Kept::Entry => {
                let found = desktop.found().await;
                let secret = found.lines().find_map(|line| line.strip_prefix("secret = "));
                serde_json::from_str(secret.expect("no entry")).expect("half an entry")
            }
            _ => whole(&self.stored()),
        }
    }

    async fn write(&self, value: &Value) {
        match &self.home {
            Home::Desktop(desktop) if self.kept == Kept::Entry => {
                desktop.put_into_keyring(value).await;
            }
            _ => {
                let path = self.stored();
                let fresh = path.with_extension("fresh");
                fs::write(&fresh, value.to_string()).unwrap();
                fs::set_permissions(&fresh, fs::metadata(&path).unwrap().permissions()).unwrap();
                fs::rename(fresh, path).unwrap();
            }
        }
    }

    /// The file that holds the login.
    fn stored(&self) -> PathBuf {
        match self.kept {
            Kept::File | Kept::Entry => self.scene().path(".codex/auth.json"),
            Kept::Plain | Kept::Sealed => {
                self.scene().path(&format!(".local/share/valetkey/credentials/{OAUTH_NAME}.json"))
            }
        }
    }

    /// Where we keep records and journals.
    pub(crate) fn folder(&self) -> PathBuf {
        match self.kept {
            Kept::File | Kept::Entry => self.scene().path(".codex"),
            Kept::Plain | Kept::Sealed => self.stored().parent().unwrap().to_owned(),
        }
    }

    /// Every file below the folder, as paths within it.
    pub(crate) fn files(&self) -> Vec<String> {
        let folder = self.folder();
        let name = |path: PathBuf| path.strip_prefix(&folder).unwrap().display().to_string();
        let mut names: Vec<_> = files(&folder).into_iter().map(name).collect();
        names.sort();
        names
    }

    /// No file that we keep here is half a file.
    pub(crate) async fn assert_whole(&self) {
        self.read().await;
        for name in self.files().iter().filter(|name| is_record(name)) {
            whole(&self.folder().join(name));
        }
    }

    /// The name of the credential.
    fn name(&self) -> &'static str {
        match self.kept {
            Kept::File | Kept::Entry => "openai",
            Kept::Plain | Kept::Sealed => OAUTH_NAME,
        }
    }

    /// The arguments of a command that prints the access token.
    pub(crate) fn asks_for_token(&self) -> [&'static str; 2] {
        ["token", self.name()]
    }

    pub(crate) async fn token(&self) -> Done {
        done(self.scene().valetkey(&self.asks_for_token()).spawn().unwrap()).await
    }

    /// Whether what was printed is an access token that the issuer stands by.
    pub(crate) fn accepts(&self, printed: &Done) -> bool {
        self.issuer().accepts(&Secret::new(printed.out.trim_end()))
    }

    /// One request that is signed in with the login.
    pub(crate) async fn ask(&self, serving: &Serving) -> std::io::Result<Response<Bytes>> {
        let (host, path) = self.asks();
        serving.client().get(Visit::to(host, HTTP1), path).await
    }

    /// The same, which may go on beside its caller: the status, if there was an answer.
    pub(crate) fn asked_of(&self, serving: &Serving) -> impl Future<Output = Option<u16>> + use<> {
        let ((host, path), client) = (self.asks(), serving.client());
        async move {
            let answer = client.get(Visit::to(host, HTTP1), path).await;
            answer.ok().map(|answer| answer.status().as_u16())
        }
    }

    fn asks(&self) -> (&'static str, &'static str) {
        match self.kept {
            Kept::File | Kept::Entry => ("chatgpt.com:443", "/backend-api/codex/models"),
            Kept::Plain | Kept::Sealed => ("other.example.com:443", "/v1/things"),
        }
    }
}

impl Serving {
    /// One on a free port, which writes where it is into a file of this name in the home and has these variables too:
    /// several may run at once.
    pub(crate) async fn start_beside(scene: &Scene, info: &str, more: &[(&str, &str)]) -> Self {
        let info = scene.path(info);
        let arguments =
            ["serve", "--listen", "127.0.0.1:0", "--server-info", info.to_str().unwrap()];
        let mut command = scene.valetkey(&arguments);
        command.envs(more.iter().copied());
        Self::started(command, info).await
    }
}

fn set_of(login: PretendLogin) -> TokenSet {
    TokenSet {
        access: login.access,
        refresh: Some(login.refresh),
        id: Some(login.id),
        account_id: None,
        last_refresh: Some(login.issued_at),
    }
}

/// Whether a file is JSON of ours or of Codex.
fn is_record(name: &str) -> bool {
    let name = name.rsplit('/').next().unwrap_or_default();
    name.ends_with(".json") && !name.starts_with('.')
}

/// A file of JSON, which must be all there.
fn whole(path: &Path) -> Value {
    let text = fs::read(path).unwrap();
    serde_json::from_slice(&text).unwrap_or_else(|_| panic!("half a file: {}", path.display()))
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// The age of a token that is due and still good, and of one that has expired, of those that live for an hour.
pub(crate) const DUE: time::Duration = time::Duration::minutes(55);
pub(crate) const EXPIRED: time::Duration = time::Duration::hours(2);

const PAST: time::Duration = time::Duration::minutes(-1);

/// Long enough to print a token and look at it.
const SEALED_LIFE: time::Duration = time::Duration::seconds(8);

const OAUTH_NAME: &str = "standard";

/// A credential at the other issuer, kept as told.
fn oauth(keep: &str) -> String {
    format!(
        "[[rules]]\nhost = \"other.example.com\"\ncredential = \"{OAUTH_NAME}\"\n\
         [credentials.{OAUTH_NAME}]\nkind = \"oauth\"\nissuer = \"https://{OAUTH_HOST}\"\n\
         client_id = \"{OAUTH_CLIENT_ID}\"\ncredentials_store = \"{keep}\"\n"
    )
}
