//! Measures the small parts of a warm request one by one, without a socket: time and allocations of each.
//!
//! `cargo bench --bench micro [-- NAME]`; `cargo test --bench micro` does each once.

#![allow(clippy::unwrap_used, reason = "a benchmark may fail by panicking")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use divan::counter::BytesCount;
use divan::{AllocProfiler, Bencher, black_box};
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, ready};
use http::Method;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use valetkey::audit::Audit;
use valetkey::clock::Clock;
use valetkey::credential::{Account, Credential, CredentialName, Login, LoginKind, TokenSet};
use valetkey::decoy;
use valetkey::headers::strip_hop_by_hop;
use valetkey::inject::Injection;
use valetkey::oauth::{Answer, Issuer, Leave, Reason, RefreshError};
use valetkey::origin::{Host, Origin, Target};
use valetkey::rules::pattern::{CanonicalPath, HostPattern, PathPrefix};
use valetkey::rules::{Action, DefaultAction, Rule, Rules, Unmatched, Use};
use valetkey::scrub::{Scrubber, Scrubbing};
use valetkey::secret::Secret;
use valetkey::store::memory::MemoryStore;
use valetkey::tasks::Tasks;
use valetkey::tls::ca::LocalCa;
use valetkey::tls::leaf::Leaves;
use valetkey::tokens::{Enforced, Parts, TokenSource};

#[global_allocator]
static COUNTED: AllocProfiler = AllocProfiler::system();

const SECRET: &str = "vk-canary-benchmark-secret-0123456789abcdef";

fn main() {
    divan::main();
}

/// How a request finds its rule among any number of others.
mod rules {
    use super::*;

    const COUNTS: [usize; 3] = [1, 100, 10_000];

    fn name() -> CredentialName {
        "openai".parse().unwrap()
    }

    fn rule(host: &str, paths: &[&str], login: Option<LoginKind>) -> Rule {
        let set = vec![(http::header::AUTHORIZATION, "Bearer {token}".parse().unwrap())];
        Rule {
            name: host.to_owned(),
            host: HostPattern::parse(host).unwrap(),
            paths: paths.iter().map(|path| PathPrefix::parse(path).unwrap()).collect(),
            methods: Vec::new(),
            action: Action::Inject {
                uses: Use { credential: name(), login },
                injection: Injection::new(set, Vec::new()).unwrap(),
            },
            unmatched: Unmatched::Forward,
            websocket_fallback: false,
            scrub: false,
            pinned: false,
        }
    }

    /// The rules that are asked for, and others that are looked at before them; a few of those are wildcards.
    fn among(count: usize) -> Rules {
        let other = |number: usize| match number % 10 {
            0 => rule(&format!("*.w{number}.example.com"), &[], None),
            _ => rule(&format!("h{number}.example.com"), &["/some/longer/path/of/theirs/"], None),
        };
        let paths = ["/backend-api/codex/", "/backend-api/wham/", "/backend-api/files/"];
        let asked = [
            rule("chatgpt.com", &paths, Some(LoginKind::ChatGpt)),
            rule("*.chatgpt.com", &[], None),
        ];
        let rules: Vec<Rule> = (1..count).map(other).chain(asked).collect();
        let kinds = [(name(), LoginKind::ChatGpt)].into_iter().collect();
        Rules::new(rules, DefaultAction::Tunnel).with_kinds(kinds)
    }

    fn target(text: &str) -> Target {
        text.parse().unwrap()
    }

    #[divan::bench(args = COUNTS)]
    fn find(bencher: Bencher<'_, '_>, count: usize) {
        let (rules, origin) = (among(count), Origin::https(target("chatgpt.com:443")));
        let path = "/backend-api/codex/responses";
        bencher.bench(|| {
            black_box(rules.find(black_box(&origin), &Method::POST, black_box(path)));
        });
    }

    #[divan::bench(args = COUNTS)]
    fn find_below_a_wildcard(bencher: Bencher<'_, '_>, count: usize) {
        let (rules, origin) = (among(count), Origin::https(target("eu.chatgpt.com:443")));
        bencher.bench(|| {
            black_box(rules.find(black_box(&origin), &Method::POST, black_box("/v1/x")));
        });
    }

    #[divan::bench(args = COUNTS)]
    fn decide(bencher: Bencher<'_, '_>, count: usize) {
        let (rules, target) = (among(count), target("chatgpt.com:443"));
        bencher.bench(|| rules.decide(black_box(&target)));
    }

    #[divan::bench(args = COUNTS)]
    fn decide_without_a_rule(bencher: Bencher<'_, '_>, count: usize) {
        let (rules, target) = (among(count), target("other.example.org:443"));
        bencher.bench(|| rules.decide(black_box(&target)));
    }

    #[divan::bench(args = COUNTS)]
    fn decide_plain(bencher: Bencher<'_, '_>, count: usize) {
        let (rules, target) = (among(count), target("other.example.org:80"));
        bencher.bench(|| rules.decide_plain(black_box(&target)));
    }

    #[divan::bench(args = ["/backend-api/codex/responses", "/v1/%66iles/caf%C3%A9"])]
    fn canonical_path(path: &str) -> bool {
        CanonicalPath::of(black_box(path)).is_some()
    }
}

/// How a name on the wire becomes the one that is compared.
mod names {
    use super::*;

    #[divan::bench(args = ["api.openai.com", "API.OpenAI.com.", "127.0.0.1", "[2001:db8::1]"])]
    fn host(text: &str) -> Host {
        Host::parse(black_box(text)).unwrap()
    }

    #[divan::bench(args = ["api.openai.com:443", "[2001:db8::1]:8443"])]
    fn target(text: &str) -> Target {
        Target::parse(black_box(text)).unwrap()
    }

    #[divan::bench(args = ["chatgpt.com", "ChatGPT.com", "chatgpt.com:443"])]
    fn authority(bencher: Bencher<'_, '_>, text: &str) {
        let origin = Origin::https("chatgpt.com:443".parse().unwrap());
        bencher.bench(|| origin.is_named_by(black_box(text)));
    }
}

/// What the first visit to a host costs, and every other one.
mod leaves {
    use super::*;

    fn leaves() -> Leaves {
        let names = [Host::parse("example.com").unwrap()];
        Leaves::new(LocalCa::ephemeral(&names, Clock::system()).unwrap()).unwrap()
    }

    #[divan::bench]
    fn mint(bencher: Bencher<'_, '_>) {
        let (leaves, next) = (leaves(), AtomicU64::new(0));
        let host = || {
            let number = next.fetch_add(1, Ordering::Relaxed);
            Host::parse(&format!("h{number}.example.com")).unwrap()
        };
        bencher.with_inputs(host).bench_refs(|host| leaves.server_config(host).unwrap());
    }

    #[divan::bench]
    fn minted_before(bencher: Bencher<'_, '_>) {
        let (leaves, host) = (leaves(), Host::parse("example.com").unwrap());
        bencher.bench(|| leaves.server_config(black_box(&host)).unwrap());
    }
}

/// An answer of 1 MiB that is looked through for the credential.
mod scrub {
    use super::*;

    const LENGTH: usize = 1 << 20;
    /// As a TLS record brings it.
    const PIECE: usize = 16 << 10;

    fn pass(bencher: Bencher<'_, '_>, text: Vec<u8>) {
        let (text, scrubber) = (Bytes::from(text), Scrubber::new(&Secret::new(SECRET)).unwrap());
        let scrubber = Arc::new(scrubber);
        bencher.counter(BytesCount::new(LENGTH)).bench(|| {
            let mut scrubbing = Scrubbing::new(scrubber.clone());
            for at in (0..LENGTH).step_by(PIECE) {
                black_box(scrubbing.pass(text.slice(at..at + PIECE)));
            }
            scrubbing.end()
        });
    }

    /// Events as an API streams them.
    fn text() -> Vec<u8> {
        let event = br#"data: {"type":"response.output_text.delta","delta":"Vokabeln "}"#;
        [&event[..], b"\n\n"].concat().into_iter().cycle().take(LENGTH).collect()
    }

    #[divan::bench]
    fn without_a_hit(bencher: Bencher<'_, '_>) {
        pass(bencher, text());
    }

    #[divan::bench]
    fn with_a_hit_in_each_piece(bencher: Bencher<'_, '_>) {
        let mut text = text();
        for at in (100..LENGTH).step_by(PIECE) {
            text[at..at + SECRET.len()].copy_from_slice(SECRET.as_bytes());
        }
        pass(bencher, text);
    }
}

/// How a request gets the current value, from several threads at one time.
mod tokens {
    use super::*;

    const THREADS: [usize; 3] = [1, 2, 8];

    /// Runs what sources do beside being read.
    static RUNTIME: LazyLock<tokio::runtime::Runtime> =
        LazyLock::new(|| tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap());

    fn parts() -> Parts {
        Parts {
            name: "openai".parse().unwrap(),
            clock: Clock::system(),
            refreshes: Tasks::new(),
            policy: Enforced::nothing(),
            background: Tasks::new(),
            audit: Audit::off(),
        }
    }

    static FIXED: LazyLock<TokenSource> = LazyLock::new(|| {
        let source = TokenSource::fixed(parts(), Arc::new(|| Ok(Secret::new(SECRET))));
        RUNTIME.block_on(source.current()).unwrap();
        source
    });

    static ROTATING: LazyLock<TokenSource> = LazyLock::new(|| {
        let set = TokenSet {
            access: Secret::new(SECRET),
            refresh: Some(Secret::new("vk-canary-benchmark-refresh")),
            id: None,
            account_id: Some("acct-1".to_owned()),
            last_refresh: None,
        };
        let store = MemoryStore::new(Some(Login::ChatGpt(set)));
        RUNTIME.block_on(TokenSource::rotating(parts(), Arc::new(store), Arc::new(Nobody)))
    });

    /// An issuer that is never asked: the login is fresh.
    struct Nobody;

    impl Issuer for Nobody {
        fn can_renew(&self, _: Option<&TokenSet>) -> bool {
            true
        }

        fn renew<'a>(
            &'a self,
            _: Option<&'a TokenSet>,
            _: Reason,
            _: &'a Arc<Leave>,
        ) -> BoxFuture<'a, Result<Answer, RefreshError>> {
            ready(Err(RefreshError::Limited { retry_after: None })).boxed()
        }

        fn identify<'a>(&'a self, _: &'a Secret) -> BoxFuture<'a, Result<Account, RefreshError>> {
            ready(Err(RefreshError::Limited { retry_after: None })).boxed()
        }
    }

    /// Reads the value and lets it go again: both touch its count. One that is there is given at once.
    fn read(source: &TokenSource) {
        black_box(source.current().now_or_never().unwrap().unwrap());
    }

    #[divan::bench(threads = THREADS)]
    fn fixed(bencher: Bencher<'_, '_>) {
        let source = &*FIXED;
        bencher.bench(|| read(source));
    }

    #[divan::bench(threads = THREADS)]
    fn rotating(bencher: Bencher<'_, '_>) {
        let source = &*ROTATING;
        bencher.bench(|| read(source));
    }
}

/// What is done with the fields of a request as Codex sends it.
mod fields {
    use super::*;

    fn codex() -> HeaderMap {
        let token = format!("Bearer ey{}", "JhbGciOiJSUzI1NiIsImtpZCI6Ij".repeat(40));
        let fields = [
            ("host", "chatgpt.com"),
            ("connection", "keep-alive"),
            ("authorization", &token),
            ("chatgpt-account-id", "6f9619ff-8b86-d011-b42d-00cf4fc964ff"),
            ("originator", "codex_cli_rs"),
            ("user-agent", "codex_cli_rs/0.169.0 (Debian 12.0.0; x86_64) xterm-256color"),
            ("version", "0.169.0"),
            ("openai-beta", "responses=experimental"),
            ("conversation_id", "0199f0a2-6a1b-7c33-9f5e-2b7a6f0f7d11"),
            ("session_id", "0199f0a2-6a1b-7c33-9f5e-2b7a6f0f7d11"),
            ("accept", "text/event-stream"),
            ("accept-encoding", "gzip, br, zstd, deflate"),
            ("content-type", "application/json"),
            ("content-length", "48213"),
            ("cookie", "__cf_bm=Q2hhdEdQVC1jb29raWU; _cfuvid=4f1c0d2e9b7a"),
        ];
        let field = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        fields.iter().map(field).collect()
    }

    #[divan::bench]
    fn strip_and_inject(bencher: Bencher<'_, '_>) {
        let set = vec![
            (http::header::AUTHORIZATION, "Bearer {token}".parse().unwrap()),
            (HeaderName::from_static("chatgpt-account-id"), "{account_id}".parse().unwrap()),
        ];
        let injection = Injection::new(set, vec![http::header::COOKIE]).unwrap();
        let account = Account { id: Some("acct-1".to_owned()), ..Account::default() };
        let credential = Credential::new(LoginKind::ChatGpt, Secret::new(SECRET), account);
        bencher.with_inputs(codex).bench_refs(|headers| {
            strip_hop_by_hop(headers);
            injection.apply(headers, &credential).unwrap();
        });
    }

    /// A decoy is looked for in every field, whether the client holds one or not.
    #[divan::bench]
    fn look_for_decoys(bencher: Bencher<'_, '_>) {
        let headers = codex();
        bencher.bench(|| {
            black_box(&headers).values().all(|it| decoy::tags_in_field(it.as_bytes()).is_empty())
        });
    }

    #[divan::bench]
    fn look_for_decoys_in_a_login(bencher: Bencher<'_, '_>) {
        let basic = "Basic eC1hY2Nlc3MtdG9rZW46Z2hwX2FiY2RlZmdoaWprbG1ub3BxcnN0dXZ3eHl6MDEyMzQ1";
        bencher.bench(|| decoy::tags_in_field(black_box(basic.as_bytes())).is_empty());
    }
}
