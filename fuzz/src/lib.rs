//! What the fuzz targets of parsers have in common: their inputs, and how long they run.
//!
//! An input is a valid one, damaged. Bytes without any form would be refused by the first check of most parsers, and
//! nothing behind it would ever run.

pub use bolero;

use bolero::{Driver, ValueGenerator};
use std::{fmt, ops::Range, time::Duration};

/// How long a target runs among other tests: some thousand inputs, and a few seconds for all targets together.
/// `BOLERO_RANDOM_TEST_TIME_MS` says otherwise.
pub const BUDGET: Duration = Duration::from_millis(200);

/// Most damages of one input.
const MAX_DAMAGES: usize = 6;
/// Longest piece that is removed, repeated or put in the place of another one.
const MAX_PIECE: usize = 40;
/// What no parser likes.
const WORDS: [&[u8]; 14] = [
    b"",
    b"\0",
    b"\n",
    b"\r\n",
    b"\x1b[31m",
    b"\xff\xfe",
    b" ",
    b"/",
    b"..",
    b"-1",
    b"0",
    b"65536",
    b"4294967296",
    b"18446744073709551616",
];

/// Makes of a test a fuzz target: `damaged!(seeds, words, |input| …)` holds a parser against valid inputs (`seeds`), and
/// against what becomes of them when `words` and others are strewn in.
#[macro_export]
macro_rules! damaged {
    ($seeds:expr, $words:expr, $check:expr) => {
        $crate::bolero::check!()
            .with_test_time($crate::BUDGET)
            .with_generator($crate::Damaged { seeds: &$seeds, words: &$words })
            .for_each(|input: &$crate::Input| $check(&input.0))
    };
}

/// The inputs of a target.
#[derive(Clone, Copy, Debug)]
pub struct Damaged<'a> {
    /// Inputs of which most are valid.
    pub seeds: &'a [&'a [u8]],
    /// What means something to the parser.
    pub words: &'a [&'a str],
}

/// An input, shown as text where a target fails.
#[derive(Clone)]
pub struct Input(pub Vec<u8>);

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b\"{}\"", self.0.escape_ascii())
    }
}

impl ValueGenerator for Damaged<'_> {
    type Output = Input;

    fn generate<D: Driver>(&self, driver: &mut D) -> Option<Input> {
        let mut input = self.seed(driver)?.to_vec();
        for _ in 0..(0..=MAX_DAMAGES).generate(driver)? {
            let (place, piece) = (self.place(&input, driver)?, self.piece(&input, driver)?);
            input.splice(place, piece);
        }
        Some(Input(input))
    }
}

impl Damaged<'_> {
    fn seed<D: Driver>(&self, driver: &mut D) -> Option<&[u8]> {
        let index = (0..=self.seeds.len().saturating_sub(1)).generate(driver)?;
        Some(self.seeds.get(index).copied().unwrap_or_default())
    }

    /// What is replaced: nothing, a byte, a piece, or all that follows.
    fn place<D: Driver>(&self, input: &[u8], driver: &mut D) -> Option<Range<usize>> {
        let start = (0..=input.len()).generate(driver)?;
        let rest = input.len() - start;
        let len = match (0..8_u8).generate(driver)? {
            0..3 => 0,
            3..5 => rest.min(1),
            5..7 => (0..=rest.min(MAX_PIECE)).generate(driver)?,
            _ => rest,
        };
        Some(start..start + len)
    }

    /// What takes its place: a word, bytes of any kind, or a piece of an input.
    fn piece<D: Driver>(&self, input: &[u8], driver: &mut D) -> Option<Vec<u8>> {
        match (0..8_u8).generate(driver)? {
            0..2 => Some(WORDS[(0..WORDS.len()).generate(driver)?].to_vec()),
            2..5 if !self.words.is_empty() => {
                Some(self.words[(0..self.words.len()).generate(driver)?].as_bytes().to_vec())
            }
            5 => piece_of(input, driver),
            6 => piece_of(self.seed(driver)?, driver),
            _ => {
                let bytes: [u8; 4] = driver.produce()?;
                Some(bytes[..(0..=bytes.len()).generate(driver)?].to_vec())
            }
        }
    }
}

fn piece_of<D: Driver>(input: &[u8], driver: &mut D) -> Option<Vec<u8>> {
    let start = (0..=input.len()).generate(driver)?;
    let len = (0..=(input.len() - start).min(MAX_PIECE)).generate(driver)?;
    Some(input[start..start + len].to_vec())
}
