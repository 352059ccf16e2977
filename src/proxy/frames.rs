//! Watches one direction of a WebSocket pass, and knows where its frames end (RFC 6455 section 5.2).

/// An observer of one direction, which is shown every byte in order and touches none. It skips payloads
/// by their length, so that what extensions do to them does not matter.
///
/// What no WebSocket sends makes it lost: it then counts no more and claims no boundary again.
#[derive(Clone, Debug, Default)]
pub(super) struct Frames {
    /// The head of the frame that is passing; the first `kept` bytes of it are there.
    head: [u8; LONGEST_HEAD],
    /// Nothing is kept exactly between two frames.
    kept: usize,
    /// How much of the payload has not passed.
    left: u64,
    messages: u64,
    controls: u64,
    has_closed: bool,
    is_lost: bool,
}

impl Frames {
    /// Takes note of the next bytes.
    #[inline]
    pub(super) fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.is_lost {
            let taken = self.step(bytes);
            bytes = &bytes[taken..];
        }
    }

    /// Takes note of the first of some bytes, none of them beyond the head or the payload that is passing; how many
    /// those were.
    #[inline]
    pub(super) fn step(&mut self, bytes: &[u8]) -> usize {
        if self.left > 0 { self.skip(bytes.len()) } else { self.keep(bytes) }
    }

    /// Whether the next byte is one of a payload.
    pub(super) fn is_in_payload(&self) -> bool {
        self.left > 0
    }

    /// Whether the frame that is passing, or at a boundary the last one, controls the connection and is no part of a
    /// message.
    pub(super) fn is_control(&self) -> bool {
        self.opcode() >= CLOSE
    }

    /// Whether that frame is the last of its message.
    pub(super) fn is_final(&self) -> bool {
        self.head[0] & FIN != 0
    }

    /// Whether that frame's payload is what its sender means: neither masked nor changed by an extension.
    pub(super) fn is_plain(&self) -> bool {
        !self.is_lost && self.head[0] & RESERVED == 0 && self.head[1] & MASKED == 0
    }

    /// How many bytes are sure to belong to the frame that is passing: none at a boundary, and one at
    /// least elsewhere. `None` when lost.
    pub(super) fn short_of_boundary(&self) -> Option<u64> {
        match self {
            Self { is_lost: true, .. } => None,
            Self { kept: 0, .. } => Some(0),
            Self { left: 0, .. } => Some((self.head_len() - self.kept) as u64),
            Self { left, .. } => Some(*left),
        }
    }

    /// Whether another frame may begin here.
    pub(super) fn is_at_boundary(&self) -> bool {
        self.short_of_boundary() == Some(0)
    }

    /// Whether a whole Close frame has passed: no frame may follow.
    pub(super) fn has_closed(&self) -> bool {
        self.has_closed
    }

    /// How many messages have passed whole.
    pub(super) fn messages(&self) -> u64 {
        self.messages
    }

    /// How many control frames have passed whole.
    pub(super) fn controls(&self) -> u64 {
        self.controls
    }

    fn skip(&mut self, available: usize) -> usize {
        let taken = usize::try_from(self.left).map_or(available, |left| left.min(available));
        self.left -= taken as u64;
        if self.left == 0 {
            self.end();
        }
        taken
    }

    fn keep(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.head_len() - self.kept);
        self.head[self.kept..self.kept + taken].copy_from_slice(&bytes[..taken]);
        self.kept += taken;
        // The second byte may have made it longer.
        if self.kept == self.head_len() {
            self.begin();
        }
        taken
    }

    /// The length of the head, as far as it is known.
    fn head_len(&self) -> usize {
        if self.kept < 2 {
            return 2;
        }
        let mask = if self.head[1] & MASKED == 0 { 0 } else { 4 };
        let length = match self.head[1] & LENGTH {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        2 + length + mask
    }

    /// The head is whole.
    fn begin(&mut self) {
        let [_, second, a, b, c, d, e, f, g, h, ..] = self.head;
        self.left = match second & LENGTH {
            126 => u16::from_be_bytes([a, b]).into(),
            127 => u64::from_be_bytes([a, b, c, d, e, f, g, h]),
            short => short.into(),
        };
        if self.is_nonsense() {
            self.is_lost = true;
        } else if self.left == 0 {
            self.end();
        }
    }

    fn is_nonsense(&self) -> bool {
        match self.opcode() {
            0..=2 => self.left > LONGEST_PAYLOAD,
            CLOSE..=10 => self.head[0] & FIN == 0 || self.left > LONGEST_CONTROL,
            _ => true,
        }
    }

    /// The frame is whole.
    fn end(&mut self) {
        match self.opcode() {
            CLOSE.. => {
                self.controls += 1;
                self.has_closed |= self.opcode() == CLOSE;
            }
            _ => self.messages += u64::from(self.head[0] & FIN != 0),
        }
        self.kept = 0;
    }

    fn opcode(&self) -> u8 {
        self.head[0] & OPCODE
    }
}

/// Two bytes, a length of eight and a mask of four.
const LONGEST_HEAD: usize = 14;

const FIN: u8 = 0x80;
/// Bits whose meaning only extensions give.
const RESERVED: u8 = 0x70;
const OPCODE: u8 = 0x0f;
const MASKED: u8 = 0x80;
const LENGTH: u8 = 0x7f;

/// The first of the opcodes of control frames; 9 is a ping and 10 a pong.
const CLOSE: u8 = 8;

/// The most significant bit of a length must be 0.
const LONGEST_PAYLOAD: u64 = u64::MAX >> 1;

/// A control frame is short and never in parts (RFC 6455 section 5.5).
const LONGEST_CONTROL: u64 = 125;

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// A frame: first byte, masked or not, how its length is written, payload.
    fn frame(first: u8, is_masked: bool, form: u8, len: usize) -> Vec<u8> {
        let mask = if is_masked { MASKED } else { 0 };
        let mut frame = match (form, len) {
            (0, 0..=125) => vec![first, mask | u8::try_from(len).unwrap()],
            (0 | 1, 0..=0xffff) => {
                let len = u16::try_from(len).unwrap().to_be_bytes();
                [&[first, mask | 126][..], &len].concat()
            }
            _ => [&[first, mask | 127][..], &(len as u64).to_be_bytes()].concat(),
        };
        frame.extend(is_masked.then_some([0x88; 4]).iter().flatten());
        // Payloads that look like frames.
        frame.extend((0..len).map(|at| [0x88, 0x02, 0xff][at % 3]));
        frame
    }

    #[derive(Clone, Debug)]
    struct Spec {
        opcode: u8,
        is_final: bool,
        reserved: u8,
        is_masked: bool,
        form: u8,
        len: usize,
    }

    impl Spec {
        fn bytes(&self) -> Vec<u8> {
            let fin = if self.is_final { FIN } else { 0 };
            frame(fin | self.reserved << 4 | self.opcode, self.is_masked, self.form, self.len)
        }
    }

    fn specs() -> impl Strategy<Value = Vec<Spec>> {
        let len = prop_oneof![
            4 => 0_usize..130,
            1 => Just(0),
            1 => 65_530_usize..65_540,
        ];
        let parts = (0_u8..6, any::<bool>(), 0_u8..8, any::<bool>(), 0_u8..3, len);
        let spec = parts.prop_map(|(kind, is_final, reserved, is_masked, form, len)| {
            let opcode = [0, 1, 2, 8, 9, 10][usize::from(kind)];
            let is_control = opcode >= CLOSE;
            let len = if is_control { len % 126 } else { len };
            Spec { opcode, is_final: is_final || is_control, reserved, is_masked, form, len }
        });
        vec(spec, 0..12)
    }

    proptest! {
        #[test]
        fn chunks_do_not_matter(specs in specs(), lens in vec(1_usize..40_000, 1..40)) {
            let (mut all, mut boundaries) = (Vec::new(), vec![0]);
            for spec in &specs {
                all.extend(spec.bytes());
                boundaries.push(all.len());
            }
            let mut frames = Frames::default();
            let mut passed = 0;
            let mut lens = lens.into_iter().cycle();
            while passed < all.len() {
                let next = all.len().min(passed + lens.next().unwrap());
                frames.pass(&all[passed..next]);
                passed = next;
                prop_assert_eq!(frames.is_at_boundary(), boundaries.contains(&passed));
                let short = usize::try_from(frames.short_of_boundary().unwrap()).unwrap();
                let boundary = boundaries.iter().find(|at| **at >= passed).unwrap();
                prop_assert!(short <= boundary - passed);
                prop_assert_eq!(short == 0, *boundary == passed);
            }
            let count = |is: fn(&Spec) -> bool| specs.iter().filter(|spec| is(spec)).count() as u64;
            prop_assert_eq!(frames.messages(), count(|it| it.opcode < CLOSE && it.is_final));
            prop_assert_eq!(frames.controls(), count(|it| it.opcode >= CLOSE));
            prop_assert_eq!(frames.has_closed(), count(|it| it.opcode == CLOSE) > 0);
        }

        #[test]
        fn nothing_makes_it_panic_or_find_its_way_again(chunks in vec(vec(any::<u8>(), 0..40), 0..40)) {
            let mut frames = Frames::default();
            let mut was_lost = false;
            for chunk in chunks {
                frames.pass(&chunk);
                let is_lost = frames.short_of_boundary().is_none();
                prop_assert!(is_lost || !was_lost);
                was_lost = is_lost;
            }
        }
    }

    #[test]
    fn reading_what_is_short_ends_at_the_boundary() {
        for (is_masked, form, len) in
            [(false, 0, 0), (true, 0, 5), (true, 1, 300), (false, 2, 70_000)]
        {
            let all = [frame(0x82, is_masked, form, len), frame(0x81, true, 0, 3)].concat();
            let first = frame(0x82, is_masked, form, len).len();
            for begun in 1..first.min(20) {
                let mut frames = Frames::default();
                frames.pass(&all[..begun]);
                let mut passed = begun;
                while let Some(short @ 1..) = frames.short_of_boundary() {
                    let short = usize::try_from(short).unwrap();
                    frames.pass(&all[passed..passed + short]);
                    passed += short;
                }
                assert_eq!(passed, first);
                assert_eq!(frames.messages(), 1);
            }
        }
    }

    #[test]
    fn what_no_websocket_sends_loses_it_for_good() {
        let nonsense: [&[u8]; 7] = [
            &[0x83, 0],
            &[0x87, 0],
            &[0x8b, 0],
            &[0x8f, 0],
            &[0x82, 127, 0x80, 0, 0, 0, 0, 0, 0, 0],
            // A ping in parts, and one that is too long.
            &[0x09, 0],
            &[0x89, 126, 0, 126],
        ];
        for nonsense in nonsense {
            let mut frames = Frames::default();
            frames.pass(&frame(0x81, true, 0, 5));
            assert!(frames.is_at_boundary());
            frames.pass(nonsense);
            frames.pass(&frame(0x88, true, 0, 2));
            assert_eq!(frames.short_of_boundary(), None, "{nonsense:?}");
            assert!(!frames.is_at_boundary() && !frames.has_closed());
            assert_eq!((frames.messages(), frames.controls()), (1, 0));
        }
        let mut longest = Frames::default();
        longest.pass(&[0x82, 127, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(longest.short_of_boundary(), Some(LONGEST_PAYLOAD));
    }
}
