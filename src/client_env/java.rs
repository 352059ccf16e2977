//! What Java reads: no variable for its proxy or its roots, but properties, and one variable that holds them.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use super::ProxyUrl;

/// The variable that every JVM reads, whoever starts it. The JVM says so on standard error.
pub(super) const VARIABLE: &str = "JAVA_TOOL_OPTIONS";

/// The variable's former value, then ours: of two that set one property the JVM takes the last. What a valetkey outside
/// of this one had put there goes.
pub(super) fn options(
    former: Option<String>,
    (proxy, no_proxy): (&ProxyUrl, &str),
    trust_store: &Path,
) -> OsString {
    let former = former.unwrap_or_default();
    let mut theirs = split(&former);
    let past = past_hosts(&theirs, no_proxy);
    let stores = theirs.iter().filter_map(|option| bare(option).strip_prefix(TRUST_STORE));
    let (of_valetkeys, of_others): (Vec<_>, Vec<_>) = stores.partition(|path| is_ours(path));
    if !of_others.is_empty() {
        tracing::warn!("left out the trust store that JAVA_TOOL_OPTIONS names");
    }
    if !of_valetkeys.is_empty() {
        theirs.retain(|option| !OURS.iter().any(|ours| bare(option).starts_with(ours)));
    }
    let ours = [
        format!("{PROXY_HOST}{}", proxy.host()),
        format!("{PROXY_PORT}{}", proxy.port()),
        format!("{PAST}{}", past.join("|")),
        format!("{TRUST_STORE}{}", trust_store.display()),
        format!("{STORE_TYPE}PKCS12"),
    ];
    let theirs = theirs.into_iter().map(str::to_owned);
    theirs.chain(ours.iter().map(|option| quoted(option))).collect::<Vec<_>>().join(" ").into()
}

/// The options without those that are set here.
pub(super) fn without_ours(options: &str) -> String {
    let mut theirs = split(options);
    theirs.retain(|option| !OURS.iter().any(|ours| bare(option).starts_with(ours)));
    theirs.join(" ")
}

/// What the options name already, then what `NO_PROXY` names; nothing twice.
fn past_hosts(theirs: &[&str], no_proxy: &str) -> Vec<String> {
    let named = theirs.iter().filter_map(|option| bare(option).strip_prefix(PAST));
    let named = named.flat_map(|hosts| hosts.split('|').map(str::to_owned));
    let mut past = Vec::new();
    for host in named.chain(no_proxy.split([',', ' ']).flat_map(past_the_proxy)) {
        if !past.contains(&host) {
            past.push(host);
        }
    }
    past
}

/// The properties that are set here.
const OURS: [&str; 5] = [PROXY_HOST, PROXY_PORT, PAST, TRUST_STORE, STORE_TYPE];

const PROXY_HOST: &str = "-Dhttps.proxyHost=";
const PROXY_PORT: &str = "-Dhttps.proxyPort=";
const STORE_TYPE: &str = "-Djavax.net.ssl.trustStoreType=";

/// The property of hosts that are reached without a proxy, for HTTP and HTTPS alike.
const PAST: &str = "-Dhttp.nonProxyHosts=";

/// The property of the one file that has all roots: a store of the user's own has a password that we do not.
const TRUST_STORE: &str = "-Djavax.net.ssl.trustStore=";

/// Between these an option may hold white space. There is no way to escape one but to put it between the others.
const QUOTES: [char; 2] = ['"', '\''];

/// Whether a valetkey made this trust store.
fn is_ours(path: &str) -> bool {
    let name = Path::new(path).file_name().unwrap_or_default().to_string_lossy();
    name.starts_with("roots-") && name.ends_with(".p12")
}

/// The options, as they are written.
fn split(options: &str) -> Vec<&str> {
    let mut open = None;
    let ends = move |c: char| {
        match open {
            Some(quote) if c == quote => open = None,
            None if QUOTES.contains(&c) => open = Some(c),
            _ => {}
        }
        open.is_none() && c.is_ascii_whitespace()
    };
    options.split(ends).filter(|option| !option.is_empty()).collect()
}

/// An option without the quotes around it.
fn bare(option: &str) -> &str {
    option.trim_matches(QUOTES)
}

/// An entry of `NO_PROXY` as Java has it: `|` between, `*` at an end. What Java has no words for (ports, odd networks)
/// goes through the proxy, which knows the whole list.
fn past_the_proxy(entry: &str) -> Vec<String> {
    match entry.parse() {
        Ok(IpAddr::V4(address)) => return vec![address.to_string()],
        Ok(IpAddr::V6(address)) => return vec![format!("[{address}]")],
        Err(_) => {}
    }
    if let Some((network, length)) = entry.split_once('/') {
        return network_past_the_proxy(network, length).into_iter().collect();
    }
    let is_odd = |c: char| !c.is_alphanumeric() && !"-_.*".contains(c);
    match entry.trim_start_matches('.') {
        odd if odd.is_empty() || odd.contains(is_odd) => Vec::new(),
        all if all.starts_with('*') => vec![all.to_owned()],
        name => vec![name.to_owned(), format!("*.{name}")],
    }
}

/// `10.*` for 10.0.0.0/8: whole octets can be said so.
fn network_past_the_proxy(network: &str, length: &str) -> Option<String> {
    let octets = match length {
        "8" => 1,
        "16" => 2,
        "24" => 3,
        _ => return None,
    };
    let network: Ipv4Addr = network.parse().ok()?;
    let octets = network.octets().into_iter().take(octets);
    Some(octets.map(|octet| format!("{octet}.")).chain(["*".to_owned()]).collect())
}

/// An option so that the JVM takes it for one: it splits at white space that is not between quotes.
fn quoted(option: &str) -> String {
    if !option.contains(|c: char| c.is_ascii_whitespace() || QUOTES.contains(&c)) {
        return option.to_owned();
    }
    format!("\"{}\"", option.replace('"', "\"'\"'\""))
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    #[test]
    fn entries_of_no_proxy() {
        let table = [
            ("*", Some("*")),
            ("example.com", Some("example.com|*.example.com")),
            (".example.com", Some("example.com|*.example.com")),
            ("*.example.com", Some("*.example.com")),
            ("127.0.0.1", Some("127.0.0.1")),
            ("::1", Some("[::1]")),
            ("10.0.0.0/8", Some("10.*")),
            ("192.168.7.0/24", Some("192.168.7.*")),
            ("10.0.0.0/9", None),
            ("fd00::/8", None),
            ("example.com:8443", None),
            ("<local>", None),
            ("", None),
        ];
        for (entry, expected) in table {
            let expected: Vec<_> = expected.unwrap_or_default().split_terminator('|').collect();
            assert_eq!(past_the_proxy(entry), expected, "{entry}");
        }
    }

    #[test]
    fn what_was_there_comes_first_and_stays() {
        let proxy = SocketAddr::from(([127, 0, 0, 1], 8377)).into();
        let former = "-Xmx1g \"-Dhttp.nonProxyHosts=a|*.b\" -Dhttp.nonProxyHosts=c";
        let made = options(Some(former.to_owned()), (&proxy, "d"), Path::new("/it's a \"b\"/x"));
        let made = made.into_string().unwrap();
        let (first, ours) = made.split_at(former.len());
        assert_eq!(first, former);
        let expected = " -Dhttps.proxyHost=127.0.0.1 -Dhttps.proxyPort=8377 \
             -Dhttp.nonProxyHosts=a|*.b|c|d|*.d \"-Djavax.net.ssl.trustStore=/it's a \"'\"'\"b\"'\"'\"/x\" \
             -Djavax.net.ssl.trustStoreType=PKCS12";
        assert_eq!(ours, expected);
    }

    #[test]
    fn what_another_valetkey_had_put_there_goes() {
        let proxy = |port| SocketAddr::from(([127, 0, 0, 1], port)).into();
        let path = |name| Path::new("/run time").join(name);
        let made = |former: &str, port, name| {
            let made = options(Some(former.to_owned()), (&proxy(port), "a"), &path(name));
            made.into_string().unwrap()
        };
        let theirs = "-Dtheirs='a b'";
        let outer = made(theirs, 1, "roots-0.p12");
        assert_eq!(made(&outer, 2, "roots-1.p12"), made(theirs, 2, "roots-1.p12"));
        let mine = made("-Djavax.net.ssl.trustStore=/mine.p12", 2, "roots-1.p12");
        assert!(mine.starts_with("-Djavax.net.ssl.trustStore=/mine.p12 "), "{mine}");
    }
}
