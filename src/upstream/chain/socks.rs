//! Asks a SOCKS5 proxy for a tunnel (RFC 1928), with user and password where there is a login (RFC 1929).
//!
//! Our own, because the one in `hyper-util` resolves names on the runtime's own threads and gives errors that
//! cannot be told apart.

use std::io;
use std::net::IpAddr;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use zeroize::Zeroizing;

use crate::origin::{Host, Target};
use crate::secret::Secret;
use crate::upstream::Stage;

/// Has the proxy at the other end of `stream` connect to the target, whose name it resolves. No byte behind
/// the proxy's answer is read.
///
/// # Errors
///
/// The stage that failed, and the error of the stream if it was that.
pub(in crate::upstream) async fn open<S>(
    stream: &mut S,
    target: &Target,
    login: Option<&Secret>,
) -> Result<(), (Stage, Option<io::Error>)>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    greet(stream, login).await?;
    stream.write_all(&request(target)).await.map_err(broken)?;
    let [version, reply, _, kind] = read(stream).await?;
    if version != VERSION {
        return Err((Stage::ChainGarbage, None));
    }
    if reply != 0 {
        return Err((Stage::ChainRefused(said(reply)), None));
    }
    // The address that it is bound to is of no use to us.
    let length = match kind {
        IPV4 => 4,
        IPV6 => 16,
        NAME => usize::from(read::<1>(stream).await?[0]),
        _ => return Err((Stage::ChainGarbage, None)),
    };
    let mut bound = vec![0; length + 2];
    stream.read_exact(&mut bound).await.map_err(broken)?;
    Ok(())
}

/// Agrees on a method, and logs in where that is it.
async fn greet<S>(stream: &mut S, login: Option<&Secret>) -> Result<(), (Stage, Option<io::Error>)>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let offer: &[u8] = match login {
        Some(_) => &[VERSION, 2, NO_LOGIN, PASSWORD],
        None => &[VERSION, 1, NO_LOGIN],
    };
    stream.write_all(offer).await.map_err(broken)?;
    let [version, method] = read(stream).await?;
    match (version, method, login) {
        (VERSION, NO_LOGIN, _) => Ok(()),
        (VERSION, PASSWORD, Some(login)) => {
            stream.write_all(&credentials(login)?).await.map_err(broken)?;
            match read(stream).await? {
                [_, 0] => Ok(()),
                _ => Err((asks("user and password", true), None)),
            }
        }
        (VERSION, NONE_ACCEPTABLE, _) => {
            let other = if login.is_some() { "another kind of login" } else { "a login" };
            // Nothing was shown: the kinds are agreed on first.
            Err((asks(other, false), None))
        }
        _ => Err((Stage::ChainGarbage, None)),
    }
}

fn credentials(login: &Secret) -> Result<Zeroizing<Vec<u8>>, (Stage, Option<io::Error>)> {
    let unfit = |why: &str| (Stage::ChainLogin(why.to_owned()), None);
    let (user, password) =
        login.expose().split_once(':').ok_or_else(|| unfit("it is not user:password"))?;
    let mut bytes = Zeroizing::new(Vec::with_capacity(3 + 255 + 255));
    bytes.push(PASSWORD_VERSION);
    for part in [user, password] {
        let length = u8::try_from(part.len())
            .map_err(|_| unfit("SOCKS takes no user or password above 255 bytes"))?;
        bytes.push(length);
        bytes.extend_from_slice(part.as_bytes());
    }
    Ok(bytes)
}

fn request(target: &Target) -> Vec<u8> {
    let mut bytes = vec![VERSION, CONNECT, 0];
    match &target.host {
        Host::Ip(IpAddr::V4(address)) => {
            bytes.push(IPV4);
            bytes.extend(address.octets());
        }
        Host::Ip(IpAddr::V6(address)) => {
            bytes.push(IPV6);
            bytes.extend(address.octets());
        }
        Host::Name(name) => {
            // A host has at most 253 octets.
            bytes.extend([NAME, name.len() as u8]);
            bytes.extend(name.as_bytes());
        }
    }
    bytes.extend(target.port.to_be_bytes());
    bytes
}

async fn read<const N: usize>(
    stream: &mut (impl AsyncRead + Unpin),
) -> Result<[u8; N], (Stage, Option<io::Error>)> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).await.map_err(broken)?;
    Ok(bytes)
}

fn broken(error: io::Error) -> (Stage, Option<io::Error>) {
    (Stage::ChainGarbage, Some(error))
}

fn asks(what: &str, was_shown: bool) -> Stage {
    Stage::ChainAuth { asks: what.to_owned(), was_shown }
}

/// RFC 1928 section 6, in words.
fn said(reply: u8) -> String {
    match reply {
        1 => "general failure".to_owned(),
        2 => "not allowed by its rules".to_owned(),
        3 => "network unreachable".to_owned(),
        4 => "host unreachable".to_owned(),
        5 => "connection refused".to_owned(),
        6 => "time to live expired".to_owned(),
        7 => "connect is not supported".to_owned(),
        8 => "this kind of address is not supported".to_owned(),
        other => format!("reply {other}"),
    }
}

const VERSION: u8 = 5;
const CONNECT: u8 = 1;
const NO_LOGIN: u8 = 0;
const PASSWORD: u8 = 2;
const NONE_ACCEPTABLE: u8 = 0xff;
/// RFC 1929 section 2.
const PASSWORD_VERSION: u8 = 1;
const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    /// What a proxy that says this makes of a target, and what it heard.
    async fn asked(
        target: &str,
        login: Option<&str>,
        says: &[u8],
    ) -> (Result<Vec<u8>, Stage>, Vec<u8>) {
        let (mut near, mut far) = tokio::io::duplex(4096);
        far.write_all(says).await.unwrap();
        far.shutdown().await.unwrap();
        let (target, login) = (Target::parse(target).unwrap(), login.map(Secret::new));
        let outcome = open(&mut near, &target, login.as_ref()).await;
        let mut behind = Vec::new();
        near.read_to_end(&mut behind).await.unwrap();
        drop(near);
        let mut heard = Vec::new();
        far.read_to_end(&mut heard).await.unwrap();
        (outcome.map(|()| behind).map_err(|(stage, _)| stage), heard)
    }

    #[tokio::test]
    async fn a_tunnel_opens_and_bytes_behind_it_are_left() {
        let (outcome, heard) =
            asked("a.example:443", None, b"\x05\x00\x05\x00\x00\x01\x7f\0\0\x01\x01\xbbearly")
                .await;
        assert_eq!(outcome.unwrap(), b"early");
        assert_eq!(heard, b"\x05\x01\x00\x05\x01\x00\x03\x09a.example\x01\xbb");
        let bound_to_a_name = b"\x05\x00\x05\x00\x00\x03\x01a\x01\xbb";
        let (outcome, heard) = asked("[::1]:1", None, bound_to_a_name).await;
        assert!(outcome.is_ok());
        assert_eq!(heard[3..7], [5, 1, 0, 4]);
        let (outcome, heard) = asked(
            "10.0.0.1:80",
            Some("me:pa:ss"),
            b"\x05\x02\x01\x00\x05\x00\x00\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        )
        .await;
        assert!(outcome.is_ok());
        assert_eq!(heard, b"\x05\x02\x00\x02\x01\x02me\x05pa:ss\x05\x01\x00\x01\x0a\0\0\x01\0\x50");
    }

    #[tokio::test]
    async fn what_fails_is_told_apart() {
        let refused = |words: &str| Stage::ChainRefused(words.to_owned());
        let table: [(&[u8], Option<&str>, Stage); 8] = [
            (b"\x05\xff", None, asks("a login", false)),
            (b"\x05\xff", Some("u:p"), asks("another kind of login", false)),
            (b"\x05\x02\x01\x01", Some("u:p"), asks("user and password", true)),
            (b"\x05\x00\x05\x02\x00\x01", None, refused("not allowed by its rules")),
            (b"\x05\x00\x05\x63\x00\x01", None, refused("reply 99")),
            (b"HTTP/1.1 400 Bad Request\r\n", None, Stage::ChainGarbage),
            (b"\x05\x02", None, Stage::ChainGarbage),
            (b"\x05", None, Stage::ChainGarbage),
        ];
        for (says, login, expected) in table {
            let (outcome, _) = asked("a.example:443", login, says).await;
            assert_eq!(outcome.unwrap_err(), expected, "{says:?}");
        }
        let long = format!("u:{}", "x".repeat(256));
        let (outcome, heard) = asked("a.example:443", Some(&long), b"\x05\x02").await;
        assert!(matches!(outcome, Err(Stage::ChainLogin(_))));
        assert_eq!(heard, b"\x05\x02\x00\x02");
    }
}
