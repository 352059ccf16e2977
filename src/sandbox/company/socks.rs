//! SOCKS5 at the company's door: RFC 1928, with user and password as RFC 1929 has them.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::Door;

impl Door {
    pub(super) async fn socks(self: Arc<Self>, mut stream: TcpStream) {
        if let Ok(true) = self.negotiate(&mut stream).await {
            self.behind(Box::new(stream)).await;
        }
    }

    /// Speaks until the tunnel is open; `false` when it is refused.
    async fn negotiate(&self, stream: &mut TcpStream) -> io::Result<bool> {
        let methods = match stream.read_u8().await? {
            VERSION => short(stream).await?,
            _ => return Ok(false),
        };
        let method = if self.front.login.is_some() { PASSWORD } else { NOTHING };
        if !methods.contains(&method) {
            stream.write_all(&[VERSION, NO_METHOD]).await?;
            return Ok(false);
        }
        stream.write_all(&[VERSION, method]).await?;
        if let Some(login) = &self.front.login {
            let _version = stream.read_u8().await?;
            let (user, password) = (short(stream).await?, short(stream).await?);
            let is_right = [&user[..], b":", &password].concat() == login.expose().as_bytes();
            stream.write_all(&[PASSWORD_VERSION, u8::from(!is_right)]).await?;
            if !is_right {
                return Ok(false);
            }
        }
        let mut request = [0; 4];
        stream.read_exact(&mut request).await?;
        let host = match request {
            [VERSION, CONNECT, _, 1] => Ipv4Addr::from(stream.read_u32().await?).to_string(),
            [VERSION, CONNECT, _, 3] => String::from_utf8_lossy(&short(stream).await?).into_owned(),
            [VERSION, CONNECT, _, 4] => Ipv6Addr::from(stream.read_u128().await?).to_string(),
            _ => return Ok(false),
        };
        let port = stream.read_u16().await?;
        let is_open = self.lets_in(format!("{host}:{port}"));
        let reply = if is_open { SUCCEEDED } else { HOST_UNREACHABLE };
        // Where it connects from is nobody's business: an IPv4 address of zeros.
        stream.write_all(&[VERSION, reply, 0, 1, 0, 0, 0, 0, 0, 0]).await?;
        Ok(is_open)
    }
}

/// A field behind one byte of length.
async fn short(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut field = vec![0; usize::from(stream.read_u8().await?)];
    stream.read_exact(&mut field).await?;
    Ok(field)
}

// RFC 1928 sections 3, 4 and 6; RFC 1929 section 2.
const VERSION: u8 = 5;
const NOTHING: u8 = 0;
const PASSWORD: u8 = 2;
const NO_METHOD: u8 = 0xff;
const PASSWORD_VERSION: u8 = 1;
const CONNECT: u8 = 1;
const SUCCEEDED: u8 = 0;
const HOST_UNREACHABLE: u8 = 4;
