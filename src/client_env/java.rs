//! What Java reads: no variable for its proxy or its roots, but properties, and one variable that holds them.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::Path;

use super::ProxyUrl;

/// The variable that every JVM reads, whoever starts it. The JVM says so on standard error.
pub(super) const VARIABLE: &str = "JAVA_TOOL_OPTIONS";

/// The variable's former value, then ours: of two that set one property the JVM takes the last.
pub(super) fn options(
    former: Option<String>,
    (proxy, no_proxy): (&ProxyUrl, &str),
    trust_store: &Path,
) -> OsString {
    let former = former.unwrap_or_default();
    if former.contains(TRUST_STORE) {
        tracing::warn!("left out the trust store that JAVA_TOOL_OPTIONS names");
    }
    let options = former.split_whitespace().map(|option| option.trim_matches(QUOTES));
    let theirs = options.filter_map(|option| option.strip_prefix(PAST));
    let past: Vec<String> = theirs
        .map(str::to_owned)
        .chain(no_proxy.split([',', ' ']).filter_map(past_the_proxy))
        .collect();
    let ours = [
        format!("-Dhttps.proxyHost={}", proxy.host()),
        format!("-Dhttps.proxyPort={}", proxy.port()),
        format!("{PAST}{}", past.join("|")),
        format!("{TRUST_STORE}{}", trust_store.display()),
        "-Djavax.net.ssl.trustStoreType=PKCS12".to_owned(),
    ];
    let all = [former].into_iter().filter(|former| !former.is_empty());
    all.chain(ours.iter().map(|option| quoted(option))).collect::<Vec<_>>().join(" ").into()
}

/// The property of hosts that are reached without a proxy, for HTTP and HTTPS alike.
const PAST: &str = "-Dhttp.nonProxyHosts=";

/// The property of the one file that has all roots: a store of the user's own has a password that we do not.
const TRUST_STORE: &str = "-Djavax.net.ssl.trustStore=";

/// Between these an option may hold white space. There is no way to escape one but to put it between the others.
const QUOTES: [char; 2] = ['"', '\''];

/// An entry of `NO_PROXY` as Java has it: `|` between, `*` at an end. What Java has no words for (ports, odd networks)
/// goes through the proxy, which knows the whole list.
fn past_the_proxy(entry: &str) -> Option<String> {
    if let Ok(address) = entry.parse::<IpAddr>() {
        return Some(match address {
            IpAddr::V4(address) => address.to_string(),
            IpAddr::V6(address) => format!("[{address}]"),
        });
    }
    if let Some((network, length)) = entry.split_once('/') {
        let octets = match length {
            "8" => 1,
            "16" => 2,
            "24" => 3,
            _ => return None,
        };
        let IpAddr::V4(network) = network.parse().ok()? else { return None };
        let octets = network.octets().into_iter().take(octets);
        return Some(octets.map(|octet| format!("{octet}.")).chain(["*".to_owned()]).collect());
    }
    let is_odd = |c: char| !c.is_alphanumeric() && !"-_.*".contains(c);
    match entry.trim_start_matches('.') {
        "" => None,
        odd if odd.contains(is_odd) => None,
        all if all.starts_with('*') => Some(all.to_owned()),
        name => Some(format!("{name}|*.{name}")),
    }
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
            assert_eq!(past_the_proxy(entry).as_deref(), expected, "{entry}");
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
}
