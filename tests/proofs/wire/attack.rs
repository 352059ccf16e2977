//! Throws mutations of a corpus at a parser, on all cores, and shows the input that breaks what must hold.

use std::hash::{BuildHasher as _, Hasher as _};
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;
use std::{fs, thread};

use crate::dice::Dice;
use crate::is_long;
use crate::support::option_env_now;

/// What a judge says of an input: whether it was taken. An error is what does not hold.
pub(super) type Verdict = Result<bool, String>;

/// What is attacked with.
pub(super) struct Attack {
    /// The folder of its corpus.
    pub(super) name: &'static str,
    pub(super) rounds: usize,
    /// What mutations put in, beside bytes and pieces of the corpus.
    pub(super) words: &'static [&'static str],
}

impl Attack {
    /// Every input of the corpus, then `rounds` mutations. Of those some must be taken, and some not.
    pub(super) fn run(&self, judge: impl Fn(&[u8], &mut Dice) -> Verdict + Sync) {
        let Self { name, rounds, .. } = *self;
        let (begun, corpus) = (Instant::now(), corpus(name));
        for input in &corpus {
            judged(&judge, input, &mut Dice::new(0));
        }
        let taken = on_all_cores(name, rounds / BATCH, |dice| {
            let mut input = Vec::new();
            let attempts = (0..BATCH).map(|_| {
                self.mutate(&corpus, dice, &mut input);
                usize::from(judged(&judge, &input, dice))
            });
            attempts.sum()
        });
        println!("{name}: {rounds} inputs, {taken} of them taken, {:?}", begun.elapsed());
        let few = rounds / 200;
        assert!((few..=rounds - few).contains(&taken), "{name}: {taken} of {rounds} show nothing");
    }

    /// An input of the corpus, changed in one place, or in up to six.
    pub(super) fn mutate(&self, corpus: &[Vec<u8>], dice: &mut Dice, input: &mut Vec<u8>) {
        input.clear();
        let from: &Vec<u8> = dice.pick(corpus);
        input.extend_from_slice(from);
        let most = *dice.pick(&[1, 6]);
        for _ in 0..=dice.below(most) {
            let at = dice.below(input.len() + 1);
            let rest = input.len() - at;
            let len = dice.below(rest.min(16) + 1);
            match dice.below(8) {
                0 if rest > 0 => input[at] = dice.next().to_le_bytes()[0],
                1 if rest > 0 => input[at] ^= 1 << dice.below(8),
                2 => drop(input.drain(at..at + len)),
                3 => {
                    let piece = input[at..at + len].to_vec();
                    input.splice(at..at, piece);
                }
                4 => {
                    let other: &Vec<u8> = dice.pick(corpus);
                    let (from, to) = (dice.below(other.len() + 1), dice.below(other.len() + 1));
                    input.splice(at..at + len, other[from.min(to)..from.max(to)].iter().copied());
                }
                5 => drop(input.splice(at..at + len, dice.word(self.words).bytes())),
                6 => input.insert(at, *dice.pick(ODD)),
                _ => drop(input.splice(at..at, dice.word(self.words).bytes())),
            }
        }
    }
}

/// Whether the input was taken; one that breaks what must hold is shown as a line of a corpus.
fn judged(judge: impl Fn(&[u8], &mut Dice) -> Verdict, input: &[u8], dice: &mut Dice) -> bool {
    let outcome = panic::catch_unwind(AssertUnwindSafe(|| judge(input, dice)));
    let broken = match outcome {
        Ok(Ok(taken)) => return taken,
        Ok(Err(broken)) => broken,
        Err(_) => "it panics".to_owned(),
    };
    panic!("{broken}; as a line of a corpus:\n{}", input.escape_ascii());
}

/// The inputs of a corpus: each file of it, and each line of those that are called `.lines`, in which bytes that
/// are no text are escaped as Rust has it.
pub(super) fn corpus(name: &str) -> Vec<Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = root.join("tests/proofs/wire/corpus").join(name);
    let mut files: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut inputs = Vec::new();
    for file in files {
        let bytes = fs::read(&file).unwrap();
        if file.extension().is_some_and(|kind| kind == "lines") {
            inputs.extend(
                bytes.split(|byte| *byte == b'\n').filter(|it| !it.is_empty()).map(unescaped),
            );
        } else {
            inputs.push(bytes);
        }
    }
    assert!(!inputs.is_empty(), "{name} is empty");
    inputs
}

/// The bytes of a line; the other way round than `escape_ascii`.
fn unescaped(line: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = line;
    while let [first, tail @ ..] = rest {
        (rest, bytes) = match (*first, tail) {
            (b'\\', [b'x', high, low, tail @ ..]) => {
                let digits = [*high, *low];
                let digits = std::str::from_utf8(&digits).unwrap();
                (tail, with(bytes, u8::from_str_radix(digits, 16).unwrap()))
            }
            (b'\\', [b'r', tail @ ..]) => (tail, with(bytes, b'\r')),
            (b'\\', [b'n', tail @ ..]) => (tail, with(bytes, b'\n')),
            (b'\\', [b't', tail @ ..]) => (tail, with(bytes, b'\t')),
            (b'\\', [other, tail @ ..]) => (tail, with(bytes, *other)),
            (other, tail) => (tail, with(bytes, other)),
        };
    }
    bytes
}

fn with(mut bytes: Vec<u8>, byte: u8) -> Vec<u8> {
    bytes.push(byte);
    bytes
}

/// With `--long` another one in each run, so that each looks further; else always the same, so that a change is
/// judged by what it changes. `VALETKEY_PROOFS_SEED` has one come again.
fn seed() -> u64 {
    let told = option_env_now("VALETKEY_PROOFS_SEED").map(|seed| seed.parse().unwrap());
    told.unwrap_or_else(|| match is_long() {
        // The standard library asks the system for chance.
        true => std::hash::RandomState::new().build_hasher().finish(),
        false => USUAL_SEED,
    })
}

/// Any number is as good.
const USUAL_SEED: u64 = 20_261_129;

/// Does work so many times, with chance of its own for each core; the sum of what came of it.
pub(super) fn on_all_cores(
    name: &str,
    times: usize,
    work: impl Fn(&mut Dice) -> usize + Sync,
) -> usize {
    let (seed, sum, next) = (seed(), AtomicUsize::new(0), AtomicUsize::new(0));
    println!("{name}: VALETKEY_PROOFS_SEED={seed}");
    let turns = || {
        loop {
            let turn = next.fetch_add(1, Relaxed);
            if turn >= times {
                return;
            }
            // By turn and not by core, so that a seed has the same inputs everywhere.
            let mut dice = Dice::new(seed.wrapping_add(turn as u64));
            match panic::catch_unwind(AssertUnwindSafe(|| work(&mut dice))) {
                Ok(done) => drop(sum.fetch_add(done, Relaxed)),
                Err(broken) => {
                    // The others need not go on.
                    next.store(times, Relaxed);
                    panic::resume_unwind(broken);
                }
            }
        }
    };
    // A panic of one of them is one of the scope.
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(turns);
        }
    });
    sum.into_inner()
}

/// Bytes that parsers disagree about.
const ODD: &[u8] = b"\0\t\n\r \"#%&'()*+,-./0:;<=>?@[\\]^_`{|}~\x7f\x80\xa0\xff";

/// Inputs that a core makes before it looks whether there are more to make.
const BATCH: usize = 1000;
