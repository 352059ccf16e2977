//! Signing in with a browser as a person does it: valetkey opens it, and Chromium goes where it is sent.

use std::fs;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use qrcode::{Color, EcLevel, QrCode};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use url::Url;
use valetkey::sandbox::{Consent, Person};
use valetkey::secret::Fingerprint;

use super::chromium::{Chromium, screenshot_path};
use super::support::{Done, LoginPorts, Scene, SigningIn, chromium};

/// A person's desk: a home where nobody is signed in, and a browser.
struct Desk {
    scene: Scene,
    browser: Chromium,
}

impl Desk {
    /// `None` where there is no Chromium.
    async fn new() -> Option<Self> {
        let program = chromium()?;
        let scene = Scene::usual().await;
        fs::remove_file(scene.path(".codex/auth.json")).unwrap();
        scene.world.issuer().ask_first(true);
        let browser = Chromium::start(&program, &scene.world.resolve()).await;
        Some(Self { scene, browser })
    }

    /// Signs in as far as the page with this title, and looks at it from all sides.
    async fn sign_in(&mut self, title: &str, picture: &str) -> Done {
        let signing_in = SigningIn::begin(&self.scene, &[]).await;
        self.browser.navigate(&signing_in.url).await.unwrap();
        self.browser.wait_for("Sign in to the sandbox?").await;
        self.browser.click("#continue").await;
        self.browser.wait_for(title).await;
        let url = signing_in.url.clone();
        let done = signing_in.end().await;
        self.assert_urls_are_clean(&url).await;
        self.take_pictures(picture).await;
        self.assert_page_is_closed_in().await;
        done
    }

    /// Nothing that is worth anything stands in an address, and nobody else was asked.
    async fn assert_urls_are_clean(&mut self, sent_to: &str) {
        let last = Url::parse(&self.browser.url().await).unwrap();
        assert_eq!((last.host_str(), last.path()), (Some("127.0.0.1"), "/done"));
        assert_eq!((last.query(), last.fragment()), (None, None), "{last}");

        let requested = self.browser.requested();
        assert!(requested.iter().any(|url| url.contains("/auth/callback?")), "{requested:?}");
        assert!(requested.contains(&sent_to.to_owned()), "{requested:?}");
        let secrets = self.scene.secrets();
        // A code is in the address that the issuer sends the browser to, by the protocol; it is worth nothing
        // without its verifier.
        let secrets: Vec<_> = secrets.iter().filter(|secret| !secret.starts_with("ac_")).collect();
        for url in requested {
            let url = Url::parse(url).unwrap();
            let host = url.host_str().unwrap_or_default();
            assert!(["auth.openai.com", "127.0.0.1"].contains(&host), "{host} was asked");
            assert!(!secrets.iter().any(|secret| url.as_str().contains(secret.as_str())), "{host}");
            assert!(!holds_verifier(url.as_str(), sent_to), "{host} was sent the code verifier");
        }
    }

    /// The page can neither run nor load anything, whatever were put into it.
    async fn assert_page_is_closed_in(&mut self) {
        for (element, directive) in [
            ("{ tag: 'script', textContent: 'document.title = \"changed\"' }", "script-src-elem"),
            ("{ tag: 'img', src: '/picture.png' }", "img-src"),
            ("{ tag: 'iframe', src: '/cancel' }", "frame-src"),
        ] {
            let blocked = self.browser.evaluate(&BLOCKED.replace("ELEMENT", element)).await;
            assert_eq!(blocked.unwrap(), directive);
        }
        assert!(!self.browser.title().await.contains("changed"));
        let written =
            self.browser.evaluate("document.querySelectorAll('main script').length").await;
        assert_eq!(written.unwrap(), 0);
    }

    /// Light and dark, wide and narrow; nothing may be cut off at the side.
    async fn take_pictures(&mut self, name: &str) {
        for (width, shape) in [(900, ""), (360, "-narrow")] {
            self.browser.set_width(width).await;
            let spare =
                "document.documentElement.clientWidth - document.documentElement.scrollWidth";
            assert_eq!(self.browser.evaluate(spare).await.unwrap(), 0, "{name} at {width}");
            for (dark, mood) in [(false, "light"), (true, "dark")] {
                self.browser.set_dark(dark).await;
                let file = format!("login-{name}{shape}-{mood}.png");
                self.browser.screenshot(&screenshot_path(&file)).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_signs_in_and_reads_who_they_are() {
    let Some(mut desk) = Desk::new().await else { return };
    let done = desk.sign_in("Signed in", "success").await;
    assert_eq!(done.status, 0, "{done:?}");
    assert!(done.err.contains("Successfully logged in"), "{done:?}");
    let page = desk.browser.text().await;
    for words in ["acct-sandbox@example.com", "acct-sandbox", "plus", "close this tab"] {
        assert!(page.contains(words), "{words}: {page}");
    }
    assert!(desk.scene.path(".codex/auth.json").exists());
    desk.scene.assert_no_secret("what it says", &(done.out + &done.err + &page));
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_any_length_and_script_stay_on_the_page() {
    let Some(mut desk) = Desk::new().await else { return };
    let account_id = format!("acct-{}", "0123456789abcdef".repeat(6));
    // The first letters are written from right to left.
    let email = format!("\u{5d3}\u{5d5}\u{5d2}\u{5de}\u{5d4}.{}@example.com", "name".repeat(25));
    let plan = "enterprise_cbp_usage_based".to_owned();
    let person = Person { email: email.clone(), plan: plan.clone(), ..Person::of(&account_id) };
    desk.scene.world.issuer().person(person);
    let done = desk.sign_in("Signed in", "success-long").await;
    assert_eq!(done.status, 0, "{done:?}");
    let page = desk.browser.text().await;
    for words in [account_id, email, plan] {
        assert!(page.contains(&words), "{words}: {page}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_who_may_not_sign_in_reads_why() {
    let entitlement =
        Consent::Deny { error: "access_denied", description: "missing_codex_entitlement" };
    let denied = Consent::Deny { error: "access_denied", description: "the person said no" };
    for (consent, picture, words) in [
        (denied, "denied", "access_denied (the person said no)"),
        (entitlement, "not-entitled", "Codex is not enabled for your workspace"),
    ] {
        let Some(mut desk) = Desk::new().await else { return };
        desk.scene.world.issuer().consent(consent);
        let done = desk.sign_in("Not signed in", picture).await;
        desk.assert_nothing_saved(&done, words).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_of_another_workspace_reads_which_it_must_be() {
    let Some(mut desk) = Desk::new().await else { return };
    let forced = "forced_chatgpt_workspace_id = \"acct-wanted\"\n";
    fs::write(desk.scene.path(".codex/config.toml"), forced).unwrap();
    desk.scene.world.issuer().sign_in_as("acct-other");
    let done = desk.sign_in("Not signed in", "workspace").await;
    // Codex's own words.
    let words = "Login is restricted to workspace id(s) acct-wanted.";
    desk.assert_nothing_saved(&done, words).await;
    let asked = desk.scene.world.issuer().last_request("/oauth/authorize");
    assert_eq!(asked["allowed_workspace_id"], "acct-wanted");
}

impl Desk {
    /// The page and the terminal say the same.
    async fn assert_nothing_saved(&mut self, done: &Done, words: &str) {
        let page = self.browser.text().await;
        assert_eq!(done.status, 1, "{done:?}");
        for said in [&done.err, &page] {
            assert!(said.contains(words), "{words}: {said}");
        }
        assert!(page.contains("Nothing was saved"), "{page}");
        assert!(!self.scene.path(".codex/auth.json").exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_url_is_shown_as_a_code_for_cameras() {
    let scene = Scene::usual().await;
    let _ports = LoginPorts::hold();
    let mut child = scene.valetkey(&["login", "--no-browser", "--qr"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let (mut url, mut rows) = (None, Vec::new());
    while let Some(line) = lines.next_line().await.unwrap() {
        if line.starts_with("https://") {
            url = Some(line);
        } else if line.contains(FULL) {
            rows.push(line);
        } else if !rows.is_empty() {
            break;
        }
    }
    child.kill().await.unwrap();
    let code = QrCode::with_error_correction_level(url.unwrap(), EcLevel::L).unwrap();
    assert_eq!(modules(&rows, code.width()), code.to_colors());
}

/// The modules that a terminal shows, without the border that a camera needs around them. What a terminal
/// paints is light: it writes light on dark.
fn modules(rows: &[String], width: usize) -> Vec<Color> {
    let light =
        |upper: bool| move |glyph| glyph == FULL || glyph == if upper { UPPER } else { LOWER };
    let color = |light: bool| if light { Color::Light } else { Color::Dark };
    let mut shown: Vec<Vec<Color>> = rows
        .iter()
        .flat_map(|row| {
            [true, false].map(|upper| row.chars().map(light(upper)).map(color).collect())
        })
        .collect();
    // An odd number of rows leaves half of the last line.
    shown.truncate(width + 2 * BORDER);
    for (at, row) in shown.iter().enumerate() {
        let outside = at < BORDER || at >= BORDER + width;
        let border = row[..BORDER].iter().chain(&row[BORDER + width..]);
        let rest = row.iter().filter(|_| outside);
        assert!(
            border.chain(rest).all(|module| *module == Color::Light),
            "the border is not light"
        );
    }
    let inside = shown[BORDER..BORDER + width].iter();
    inside.flat_map(|row| row[BORDER..BORDER + width].to_vec()).collect()
}

/// Whether a text holds the code verifier of the attempt for which a browser is sent to this URL: the only text
/// whose digest is the challenge in there (RFC 7636 section 4.2).
pub(crate) fn holds_verifier(text: &str, url: &str) -> bool {
    let url = Url::parse(url).unwrap();
    let challenge = url.query_pairs().find(|(name, _)| name == "code_challenge").unwrap().1;
    let challenge: String = URL_SAFE_NO_PAD
        .decode(challenge.as_bytes())
        .unwrap()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let is_unreserved = |it: char| it.is_ascii_alphanumeric() || "-._~".contains(it);
    let mut words = text.split(|it| !is_unreserved(it));
    words.any(|word| Fingerprint::of(word.as_bytes()).to_hex() == challenge)
}

#[test]
fn a_verifier_is_found() {
    // RFC 7636 appendix B.
    let url = "https://x.example/?code_challenge=E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM";
    let verifier = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
    assert!(holds_verifier(&format!("https://y.example/?v={verifier}&w=1"), url));
    assert!(!holds_verifier(url, url));
}

const FULL: char = '\u{2588}';
const UPPER: char = '\u{2580}';
const LOWER: char = '\u{2584}';

/// How many light modules a camera needs on each side (ISO/IEC 18004).
const BORDER: usize = 4;

/// Puts an element into the page, and says which directive of its policy forbids it.
const BLOCKED: &str = "new Promise((resolve) => {
  document.addEventListener('securitypolicyviolation', (event) => resolve(event.effectiveDirective), { once: true });
  const { tag, ...properties } = ELEMENT;
  document.body.append(Object.assign(document.createElement(tag), properties));
})";
