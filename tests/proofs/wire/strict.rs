//! HTTP/1.1 as RFC 9112 has it and not one octet else: the oracle of what a client said, and of what an upstream got.

/// A request, as everybody must understand it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) method: String,
    pub(super) target: String,
    pub(super) version: &'static str,
    /// Names in lower case.
    pub(super) fields: Vec<(String, Vec<u8>)>,
    pub(super) body: Vec<u8>,
    pub(super) trailers: Vec<(String, Vec<u8>)>,
}

/// What stands at the beginning of some bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// A request, and how long it is. In doubt: a recipient may read it so or refuse it (RFC 9112 sections 2.2, 6.1
    /// and 6.3).
    Whole { message: Message, len: usize, in_doubt: bool, is_last: bool },
    /// A request whose trailers have lines that end in a bare LF. Whoever takes it must not take what follows for another.
    Frayed(Message),
    /// The beginning of one.
    Begun,
    /// No request.
    Broken(&'static str),
}

/// Reads one request.
pub(super) fn read(bytes: &[u8]) -> Reading {
    let mut reader = Reader { bytes, at: 0, in_doubt: false, is_frayed: false };
    match reader.message() {
        Ok((message, _)) if reader.is_frayed => Reading::Frayed(message),
        Ok((message, is_last)) => {
            Reading::Whole { message, len: reader.at, in_doubt: reader.in_doubt, is_last }
        }
        Err(Stop::Begun) => Reading::Begun,
        Err(Stop::Broken(why)) => Reading::Broken(why),
    }
}

impl Message {
    /// Every value of a field.
    pub(super) fn all(&self, name: &str) -> Vec<&[u8]> {
        values(&self.fields, name)
    }
}

fn values<'a>(fields: &'a [(String, Vec<u8>)], name: &str) -> Vec<&'a [u8]> {
    fields.iter().filter(|(it, _)| it == name).map(|(_, value)| value.as_slice()).collect()
}

enum Stop {
    Begun,
    Broken(&'static str),
}

type Fields = Vec<(String, Vec<u8>)>;

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    in_doubt: bool,
    is_frayed: bool,
}

impl<'a> Reader<'a> {
    fn message(&mut self) -> Result<(Message, bool), Stop> {
        let mut line = self.line()?;
        while line.is_empty() {
            // An empty line before a request may be ignored.
            self.in_doubt = true;
            line = self.line()?;
        }
        let text = std::str::from_utf8(line).map_err(|_| Stop::Broken("request line"))?;
        let [method, target, version] = text.split(' ').collect::<Vec<_>>()[..] else {
            return Err(Stop::Broken("request line"));
        };
        let version = match version {
            "HTTP/1.1" => "1.1",
            "HTTP/1.0" => "1.0",
            _ => return Err(Stop::Broken("version")),
        };
        // Nobody sends a fragment; who gets one may leave it out.
        self.in_doubt |= target.contains('#');
        let target = target.split_once('#').map_or(target, |(target, _)| target);
        let is_target = target.bytes().all(|byte| is_of_uri(byte) || is_left_in_uris(byte));
        if !is_token(method.as_bytes()) || target.is_empty() || !is_target {
            return Err(Stop::Broken("request line"));
        }
        let fields = self.fields()?;
        let (body, trailers) = self.body(&fields, version)?;
        let options = values(&fields, "connection").join(&b","[..]).to_ascii_lowercase();
        let lists =
            |option: &[u8]| options.split(|it| *it == b',').any(|it| it.trim_ascii() == option);
        let has_both = !values(&fields, "content-length").is_empty()
            && !values(&fields, "transfer-encoding").is_empty();
        let is_last = has_both || lists(b"close") || version == "1.0" && !lists(b"keep-alive");
        let (method, target) = (method.to_owned(), target.to_owned());
        Ok((Message { method, target, version, fields, body, trailers }, is_last))
    }

    /// A line without its end. A bare LF may be taken for one.
    fn line(&mut self) -> Result<&'a [u8], Stop> {
        let rest = &self.bytes[self.at..];
        let Some(len) = rest.iter().position(|byte| *byte == b'\n') else {
            return Err(if rest.contains(&0) { Stop::Broken("NUL") } else { Stop::Begun });
        };
        self.at += len + 1;
        let line = &rest[..len];
        let line = line.strip_suffix(b"\r").unwrap_or_else(|| {
            self.in_doubt = true;
            line
        });
        if line.contains(&b'\r') { Err(Stop::Broken("bare CR")) } else { Ok(line) }
    }

    fn fields(&mut self) -> Result<Fields, Stop> {
        let mut fields = Vec::new();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                return Ok(fields);
            }
            let colon =
                line.iter().position(|byte| *byte == b':').ok_or(Stop::Broken("no colon"))?;
            let (name, value) = (&line[..colon], trimmed(&line[colon + 1..]));
            // A space before the colon, and a line that is folded, make no token.
            if !is_token(name) {
                return Err(Stop::Broken("field name"));
            }
            if !value.iter().all(|byte| matches!(byte, b'\t' | b' '..=b'~' | 0x80..)) {
                return Err(Stop::Broken("field value"));
            }
            fields.push((String::from_utf8_lossy(name).to_ascii_lowercase(), value.to_vec()));
        }
    }

    fn body(&mut self, fields: &Fields, version: &str) -> Result<(Vec<u8>, Fields), Stop> {
        let lengths = values(fields, "content-length");
        let codings = values(fields, "transfer-encoding");
        if !codings.is_empty() {
            if version == "1.0" || codings.len() > 1 || !codings[0].eq_ignore_ascii_case(b"chunked")
            {
                return Err(Stop::Broken("transfer coding"));
            }
            // The coding counts, and nothing may follow.
            self.in_doubt |= !lengths.is_empty();
            return self.chunks();
        }
        let Some(first) = lengths.first() else { return Ok((Vec::new(), Vec::new())) };
        let len = number(first).ok_or(Stop::Broken("length"))?;
        if lengths.iter().any(|length| number(length) != Some(len)) {
            return Err(Stop::Broken("length"));
        }
        // Said twice, or with zeros, it is the same; who finds that odd may say so.
        self.in_doubt |= lengths.len() > 1;
        let len = usize::try_from(len).map_err(|_| Stop::Broken("length"))?;
        Ok((self.take(len)?.to_vec(), Vec::new()))
    }

    fn chunks(&mut self) -> Result<(Vec<u8>, Fields), Stop> {
        let mut body = Vec::new();
        loop {
            let line = self.chunk_line()?;
            let (size, extension) = match line.iter().position(|byte| *byte == b';') {
                Some(at) => (&line[..at], Some(())),
                None => (line, None),
            };
            if extension.is_some() {
                // They may be ignored whatever is in them, and nobody says how long they may be.
                self.in_doubt = true;
            }
            let digits = size.trim_ascii_end();
            self.in_doubt |= digits != size;
            if digits.is_empty() || !digits.iter().all(u8::is_ascii_hexdigit) {
                return Err(Stop::Broken("chunk size"));
            }
            self.in_doubt |= digits.len() > 15;
            let digits = std::str::from_utf8(digits).unwrap();
            let size = u64::from_str_radix(digits, 16).map_err(|_| Stop::Broken("chunk size"))?;
            if size == 0 {
                return Ok((body, self.trailers()?));
            }
            let size = usize::try_from(size).map_err(|_| Stop::Broken("chunk size"))?;
            body.extend_from_slice(self.take(size)?);
            match self.take(2) {
                Ok(b"\r\n") => (),
                Ok(_) => return Err(Stop::Broken("chunk end")),
                Err(_) if !b"\r".starts_with(&self.bytes[self.at..]) => {
                    return Err(Stop::Broken("chunk end"));
                }
                Err(stop) => return Err(stop),
            }
        }
    }

    /// What is malformed in trailers makes the body so.
    fn trailers(&mut self) -> Result<Fields, Stop> {
        let from = self.at;
        let trailers = self.fields().map_err(|stop| match stop {
            Stop::Broken(_) => Stop::Broken("chunk trailers"),
            Stop::Begun => Stop::Begun,
        })?;
        let mut lines = self.bytes[from..self.at].split_inclusive(|byte| *byte == b'\n');
        self.is_frayed = lines.any(|line| !line.ends_with(b"\r\n"));
        Ok(trailers)
    }

    /// The line of a chunk's size, in which a bare LF ends nothing.
    fn chunk_line(&mut self) -> Result<&'a [u8], Stop> {
        let from = self.at;
        let was = self.in_doubt;
        let line = self.line()?;
        if !self.bytes[from..self.at].ends_with(b"\r\n") {
            return Err(Stop::Broken("chunk line"));
        }
        self.in_doubt = was;
        Ok(line)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Stop> {
        let end =
            self.at.checked_add(len).filter(|end| *end <= self.bytes.len()).ok_or(Stop::Begun)?;
        let piece = &self.bytes[self.at..end];
        self.at = end;
        Ok(piece)
    }
}

/// Without the white space that does not count.
fn trimmed(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

fn number(text: &[u8]) -> Option<u64> {
    let is_digits = text.iter().all(u8::is_ascii_digit);
    is_digits.then(|| std::str::from_utf8(text).ok()?.parse().ok()).flatten()
}

/// RFC 9110 section 5.6.2.
pub(super) fn is_token(text: &[u8]) -> bool {
    !text.is_empty()
        && text.iter().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte))
}

/// RFC 3986 appendix A: reserved, unreserved and `%`.
pub(super) fn is_of_uri(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~:/?[]@!$&'()*+,;=%".contains(&byte)
}

/// What browsers leave in a path or a query as it is, and no server takes for the end of either.
pub(super) fn is_left_in_uris(byte: u8) -> bool {
    matches!(byte, b'"' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}' | 0x80..)
}
