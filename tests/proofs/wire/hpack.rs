//! HPACK by hand (RFC 7541): blocks as a test wants them, and what a block says.

use std::collections::VecDeque;

type Field = (Vec<u8>, Vec<u8>);

/// Fields as literals that nobody indexes, without compression: whatever they are.
pub(super) fn block(fields: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            integer(&mut block, text.len());
            block.extend_from_slice(text);
        }
    }
    block
}

/// A length with a prefix of seven bits.
fn integer(out: &mut Vec<u8>, mut number: usize) {
    if number < 127 {
        out.push(u8::try_from(number).unwrap());
        return;
    }
    out.push(127);
    number -= 127;
    while number >= 128 {
        out.push(u8::try_from(number % 128).unwrap() | 128);
        number /= 128;
    }
    out.push(u8::try_from(number).unwrap());
}

/// What one side remembers of the other's blocks.
#[derive(Default)]
pub(super) struct Hpack {
    /// The newest in front. Tests never fill the 4096 octets that it starts with.
    known: VecDeque<Field>,
}

impl Hpack {
    /// The fields of a block in their order. Panics at a block that is none.
    pub(super) fn decode(&mut self, block: &[u8]) -> Vec<Field> {
        let mut reader = Reader(block);
        let mut fields = Vec::new();
        while let Some(first) = reader.0.first().copied() {
            let field = match first {
                0x80.. => self.at(reader.integer(7)),
                0x40.. => {
                    let field = self.literal(&mut reader, 6);
                    self.known.push_front(field.clone());
                    self.forget();
                    field
                }
                0x20.. => {
                    assert!(reader.integer(5) <= 4096, "a table of more than was offered");
                    continue;
                }
                _ => self.literal(&mut reader, 4),
            };
            fields.push(field);
        }
        fields
    }

    fn literal(&self, reader: &mut Reader<'_>, prefix: u8) -> Field {
        let name = match reader.integer(prefix) {
            0 => reader.text(),
            index => self.at(index).0,
        };
        (name, reader.text())
    }

    fn at(&self, index: usize) -> Field {
        match STATIC.get(index - 1) {
            Some((name, value)) => (name.as_bytes().to_vec(), value.as_bytes().to_vec()),
            None => self.known[index - 1 - STATIC.len()].clone(),
        }
    }

    fn forget(&mut self) {
        let size = |(name, value): &Field| name.len() + value.len() + 32;
        while self.known.iter().map(size).sum::<usize>() > 4096 {
            self.known.pop_back();
        }
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap();
        self.0 = rest;
        *first
    }

    fn integer(&mut self, prefix: u8) -> usize {
        let most = (1_usize << prefix) - 1;
        let mut number = usize::from(self.byte()) & most;
        let mut shift = 0;
        while number >= most {
            let byte = self.byte();
            number += usize::from(byte & 127) << shift;
            shift += 7;
            if byte < 128 {
                break;
            }
        }
        number
    }

    fn text(&mut self) -> Vec<u8> {
        let is_compressed = self.0[0] >= 128;
        let len = self.integer(7);
        let (text, rest) = self.0.split_at(len);
        self.0 = rest;
        if is_compressed { huffman(text) } else { text.to_vec() }
    }
}

/// Undoes the code of RFC 7541 appendix B. It is canonical, so that its lengths are all of it.
fn huffman(text: &[u8]) -> Vec<u8> {
    let mut codes: Vec<(u8, u8)> = LENGTHS.iter().copied().zip(0..=255).collect();
    codes.sort_unstable();
    let mut of_len = [0; 31];
    LENGTHS.iter().for_each(|len| of_len[usize::from(*len)] += 1);
    let (mut out, mut code, mut len) = (Vec::new(), 0, 0);
    // The first code of this length, and how many are shorter.
    let (mut first, mut shorter) = (0, 0);
    for bit in text.iter().flat_map(|byte| (0..8).rev().map(move |at| byte >> at & 1)) {
        first = (first + of_len[len]) << 1;
        shorter += of_len[len];
        (code, len) = (code << 1 | usize::from(bit), len + 1);
        if (first..first + of_len[len]).contains(&code) {
            out.push(codes[shorter + code - first].1);
            (code, len, first, shorter) = (0, 0, 0, 0);
        }
    }
    assert!(len < 8 && code == (1 << len) - 1, "padded with what is no padding");
    out
}

/// How long the code of each byte is.
const LENGTHS: [u8; 256] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28,
    28, 28, 28, 28, 28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5,
    5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, 15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6,
    6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22,
    23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22,
    21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20,
    22, 22, 22, 23, 22, 22, 23, 26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19,
    21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22,
    22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
];

/// RFC 7541 appendix A.
const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

#[test]
fn blocks_are_read_as_they_are_meant() {
    // RFC 7541 appendix C.4.1, C.4.2 and C.4.3, which are compressed.
    type Row = (&'static [u8], &'static [(&'static str, &'static str)]);
    let requests: [Row; 3] = [
        (b"\x82\x86\x84\x41\x8c\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff", &[(":path", "/"), (":authority", "www.example.com")]),
        (b"\x82\x86\x84\xbe\x58\x86\xa8\xeb\x10\x64\x9c\xbf", &[(":authority", "www.example.com"), ("cache-control", "no-cache")]),
        (
            b"\x82\x87\x85\xbf\x40\x88\x25\xa8\x49\xe9\x5b\xa9\x7d\x7f\x89\x25\xa8\x49\xe9\x5b\xb8\xe8\xb4\xbf",
            &[(":authority", "www.example.com"), ("custom-key", "custom-value")],
        ),
    ];
    let mut hpack = Hpack::default();
    for (block, last) in requests {
        let fields = hpack.decode(block);
        let last =
            last.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()));
        assert!(fields.ends_with(&last.collect::<Vec<_>>()), "{fields:?}");
    }
    let long = vec![b'x'; 100_000];
    let fields: [(&[u8], &[u8]); 2] = [(b"A B", b"\r\n"), (b"", &long)];
    assert_eq!(
        hpack.decode(&block(&fields)),
        fields.map(|(name, value)| (name.to_vec(), value.to_vec()))
    );
}
