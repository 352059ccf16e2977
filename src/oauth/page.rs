//! The page that a person sees after signing in: one self-contained document, without scripts.

use crate::credential::Account;

/// What the page may load: nothing, but its own style.
pub const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Says who has signed in. `what` is what they signed in to.
pub fn signed_in(what: &str, account: &Account) -> String {
    let rows = [
        ("Account", account.email.as_deref()),
        ("Workspace", account.id.as_deref()),
        ("Plan", account.plan.as_deref()),
    ];
    let rows: String = rows
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
        .map(|(name, value)| {
            format!("<dt>{name}</dt><dd><bdi dir=\"ltr\">{}</bdi></dd>", escaped(value))
        })
        .collect();
    let rows = if rows.is_empty() { rows } else { format!("<dl>{rows}</dl>") };
    let lead = format!("<p>You are signed in to {}.</p>", escaped(what));
    let end = "<p class=\"end\">You can close this tab and go back to the terminal.</p>";
    document("good", "Signed in", &format!("{lead}{rows}{end}"))
}

/// Says why nobody has signed in, and what to do about it.
pub fn refused(sentence: &str, hint: Option<&str>) -> String {
    let hint = hint.map(|hint| format!("<p>{}</p>", with_command(hint))).unwrap_or_default();
    let lead = format!("<p class=\"why\">{}</p>", escaped(&capital(sentence)));
    let end = "<p class=\"end\">Nothing was saved. You can close this tab; the terminal says the same.</p>";
    document("bad", "Not signed in", &format!("{lead}{hint}{end}"))
}

fn document(class: &str, title: &str, body: &str) -> String {
    let mark = if class == "good" { "\u{2713}" } else { "!" };
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title} \u{b7} valetkey</title>\n<style>{STYLE}</style>\n</head>\n<body>\n\
         <main class=\"{class}\">\n<p class=\"mark\" aria-hidden=\"true\">{mark}</p>\n<h1>{title}</h1>\n{body}\n\
         <footer>valetkey</footer>\n</main>\n</body>\n</html>\n"
    )
}

/// A hint whose command, where it ends with one, can be told from the words and copied.
fn with_command(hint: &str) -> String {
    match hint.split_once(": valetkey ") {
        Some((words, rest)) => {
            let words = escaped(capital(words).trim_end_matches('.'));
            format!("{words}: <code>valetkey {}</code>", escaped(rest))
        }
        None => escaped(&capital(hint)),
    }
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(|first| first.to_uppercase().to_string()).unwrap_or_default();
    let rest = chars.as_str();
    let stop = if rest.ends_with(['.', '!', '?', '\u{2026}']) { "" } else { "." };
    format!("{first}{rest}{stop}")
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            other => out.push(other),
        }
    }
    out
}

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1d2327; --soft: #58636b; --paper: #f4f5f6; --card: #fff; --line: #dfe3e6; --good: #1a7f4b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaec; --soft: #a3adb5; --paper: #14181b; --card: #1e2428; --line: #333b41; --good: #5ccf94; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; min-height: 100vh; display: grid; place-items: center; padding: 1.5rem; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
main { width: min(30rem, 100%); padding: 2rem; background: var(--card); border: 1px solid var(--line); border-radius: .75rem; overflow-wrap: anywhere; }
.mark { width: 2.75rem; height: 2.75rem; margin: 0 0 1rem; display: grid; place-items: center; border-radius: 50%; border: 2px solid currentColor; font-size: 1.375rem; font-weight: 600; line-height: 1; }
.good .mark { color: var(--good); } .bad .mark { color: var(--bad); }
h1 { margin: 0 0 .5rem; font-size: 1.5rem; line-height: 1.25; }
p { margin: .5rem 0; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .375rem 1.25rem; margin: 1.25rem 0; padding: 1rem 0; border-block: 1px solid var(--line); }
dt { color: var(--soft); } dd { margin: 0; word-break: break-all; }
code { display: inline-block; font: .9375em/1.5 ui-monospace, monospace; }
.why { font-weight: 600; } .end { color: var(--soft); }
.bad .end { margin-top: 1.25rem; padding-top: 1rem; border-top: 1px solid var(--line); }
footer { margin-top: 1.5rem; color: var(--soft); font-size: .875rem; }
@media (max-width: 30rem) { body { padding: 1rem; } main { padding: 1.5rem; } dl { display: block; } dd + dt { margin-top: .75rem; } }
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_who_signed_in() {
        let account = Account {
            id: Some("acct-1".into()),
            email: Some("<b>a@b.example</b>".into()),
            plan: None,
            fedramp: false,
        };
        let page = signed_in("ChatGPT", &account);
        assert!(
            page.contains(
                "<dt>Account</dt><dd><bdi dir=\"ltr\">&lt;b&gt;a@b.example&lt;/b&gt;</bdi></dd>"
            ),
            "{page}"
        );
        assert!(
            page.contains("acct-1") && !page.contains("Plan") && page.contains("close this tab")
        );
        assert!(!signed_in("x", &Account::default()).contains("<dl>"));
    }

    #[test]
    fn loads_nothing_and_runs_nothing() {
        for page in [signed_in("ChatGPT", &Account::default()), refused("no", Some("type \"x\""))] {
            for word in ["<script", "http:", "https:", "url(", "<img", "<link"] {
                assert!(!page.contains(word), "{word}");
            }
        }
    }

    #[test]
    fn says_why_not() {
        let page = refused("the issuer refused: x'y", Some("ask them"));
        assert!(page.contains("The issuer refused: x&#39;y."), "{page}");
        assert!(page.contains("Ask them.") && page.contains("Nothing was saved"));
        let page = refused("no", Some("see: valetkey check --managed"));
        assert!(page.contains("See: <code>valetkey check --managed</code></p>"), "{page}");
    }
}
