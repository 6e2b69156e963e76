use std::cell::RefCell;
use std::rc::Rc;

use super::*;
use crate::decode::Chunk;

const VOCABULARY: usize = 50;

/// A device whose "model" mixes every used slot into its logits, so that a lost or misplaced slot is detected.
struct Tape {
    cache: Vec<u32>,
    chunk: usize,
    padded: bool,
    log: Rc<RefCell<Vec<String>>>,
}

impl Device for Tape {
    fn name(&self) -> &str {
        "tape"
    }
    fn engine(&self) -> String {
        format!("c{}", self.cache.len())
    }
    fn chunk(&self, waiting: usize, position: usize, capacity: usize) -> Chunk {
        let tokens = waiting.min(self.chunk);
        let rows = if self.padded { self.chunk } else { tokens };
        Chunk {
            tokens,
            rows: rows.min(capacity - position),
            end: position + waiting,
        }
    }
    fn reserve(&mut self, capacity: usize, used: usize) -> Result<(), DeviceError> {
        self.log.borrow_mut().push(format!("reserve {capacity} keeping {used}"));
        self.cache.truncate(used);
        self.cache.resize(capacity, 777);
        Ok(())
    }
    fn forward(
        &mut self,
        chunk: Chunk,
        tokens: &[u32],
        position: usize,
        logits: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        let padding = std::iter::repeat_n(&0, chunk.rows - tokens.len());
        for (i, token) in tokens.iter().chain(padding).enumerate() {
            self.cache[position + i] = *token;
        }
        let last = position + tokens.len();
        let mix = self.cache[..last]
            .iter()
            .fold(17u32, |h, t| h.wrapping_mul(31).wrapping_add(*t + 1));
        logits.clear();
        logits.extend((0..VOCABULARY as u32).map(|i| (mix.wrapping_mul(i + 1) % 1009) as f32));
        Ok(())
    }
}

fn session(capacities: &[usize], chunk: usize, padded: bool) -> (Session, Rc<RefCell<Vec<String>>>) {
    let log = Rc::new(RefCell::new(Vec::new()));
    let device = Tape {
        cache: Vec::new(),
        chunk,
        padded,
        log: log.clone(),
    };
    (Session::new(Box::new(device), capacities, VOCABULARY), log)
}

fn greedy(session: &mut Session, prompt: &[u32], n: usize) -> Vec<u32> {
    session.feed(prompt).unwrap();
    let mut tokens = Vec::new();
    for _ in 0..n {
        let best = (0..VOCABULARY).max_by(|a, b| session.logits()[*a].total_cmp(&session.logits()[*b]));
        tokens.push(best.unwrap() as u32);
        session.feed(&tokens[tokens.len() - 1..]).unwrap();
    }
    tokens
}

#[test]
fn growing_and_cutting_change_nothing() {
    let prompt: Vec<u32> = (0..11).map(|i| (i * 7) % 50).collect();
    let expected = greedy(&mut session(&[64], 64, false).0, &prompt, 30);
    for (capacities, chunk, padded) in [
        (&[8, 16, 20, 64][..], 64, false),
        (&[64], 1, false),
        (&[12, 64], 3, false),
        (&[12, 41], 5, true),
        (&[41, 41, 16], 64, true),
    ] {
        let (mut session, _) = session(capacities, chunk, padded);
        assert_eq!(
            greedy(&mut session, &prompt, 30),
            expected,
            "{capacities:?} {chunk} {padded}"
        );
    }
}

#[test]
fn starts_in_the_smallest_that_fits_and_moves_when_full() {
    let (mut session, log) = session(&[16, 4, 8], 64, false);
    session.feed(&[1, 2, 3]).unwrap();
    assert_eq!(session.capacity(), 4);
    session.feed(&[1]).unwrap();
    session.feed(&[1]).unwrap();
    assert_eq!((session.capacity(), session.moves().0, session.remaining()), (8, 1, 11));
    session.feed(&[0; 11]).unwrap();
    assert_eq!(session.remaining(), 0);
    let expected = ["reserve 4 keeping 0", "reserve 8 keeping 4", "reserve 16 keeping 5"];
    assert_eq!(*log.borrow(), expected);
}

#[test]
fn a_restart_goes_back_to_the_smallest_that_fits() {
    let (mut session, log) = session(&[4, 16], 64, false);
    session.feed(&[1; 9]).unwrap();
    session.restart();
    assert_eq!((session.capacity(), session.tokens().len()), (0, 0));
    let again = session.feed(&[5, 6]).unwrap().to_vec();
    assert_eq!(again, self::session(&[64], 64, false).0.feed(&[5, 6]).unwrap());
    assert_eq!((session.capacity(), session.moves().0), (4, 0));
    assert_eq!(*log.borrow(), ["reserve 16 keeping 0", "reserve 4 keeping 0"]);
}

#[test]
fn the_longest_common_prefix_is_kept() {
    let (mut session, log) = session(&[8, 16], 64, true);
    let fresh = |tokens: &[u32]| self::session(&[16], 64, false).0.feed(tokens).unwrap().to_vec();
    assert_eq!(session.resume(&[1, 2, 3, 4]).unwrap(), 0);
    assert_eq!(session.logits(), fresh(&[1, 2, 3, 4]));
    for (tokens, kept) in [
        // Longer, by a branch in the middle, the same again, a prefix of it, another beginning.
        (&[1, 2, 3, 4, 5, 6][..], 4),
        (&[1, 2, 9, 4, 5], 2),
        (&[1, 2, 9, 4, 5], 5),
        (&[1, 2, 9], 2),
        (&[7], 0),
        (&[7, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 1),
        (&[7, 1, 2], 2),
    ] {
        assert_eq!(session.resume(tokens).unwrap(), kept, "{tokens:?}");
        assert_eq!(
            (session.tokens(), session.logits()),
            (tokens, &fresh(tokens)[..]),
            "{tokens:?}"
        );
    }
    assert_eq!(*log.borrow(), ["reserve 8 keeping 0", "reserve 16 keeping 1"]);
    // Refused tokens change nothing.
    assert!(session.resume(&[]).is_err() && session.resume(&[50]).is_err() && session.resume(&[1; 17]).is_err());
    assert_eq!(session.tokens(), [7, 1, 2]);
    session.feed(&[3]).unwrap();
    assert_eq!(session.logits(), fresh(&[7, 1, 2, 3]));
}

#[test]
fn what_cannot_be_fed_is_refused_before_anything_is() {
    let (mut session, log) = session(&[4], 64, false);
    let refused = |session: &mut Session, tokens: &[u32]| session.feed(tokens).unwrap_err().to_string();
    assert_eq!(
        refused(&mut session, &[]),
        "the prompt is empty: there is nothing to predict from"
    );
    assert_eq!(
        refused(&mut session, &[1, 50]),
        "token id 50 at position 1 is outside the vocabulary of 50 (ids 0 to 49)"
    );
    assert_eq!(
        refused(&mut session, &[1; 5]),
        "5 tokens do not fit the largest cache capacity of this package, 4"
    );
    assert!(log.borrow().is_empty() && session.tokens().is_empty());
    session.feed(&[1; 3]).unwrap();
    assert!(refused(&mut session, &[1, 1]).starts_with("5 tokens"));
}

#[test]
fn logits_of_every_token_are_those_of_feeding_them_one_by_one() {
    let tokens = [5, 1, 4, 1, 3, 9, 2];
    let (mut single, _) = session(&[8, 16], 64, false);
    let mut expected = Vec::new();
    for token in tokens {
        expected.extend_from_slice(single.feed(&[token]).unwrap());
    }
    let (mut all, _) = session(&[4, 8, 16], 3, false);
    let mut logits = vec![7.0];
    all.feed_all(&tokens[..2], &mut logits).unwrap();
    assert_eq!(logits, expected[..2 * VOCABULARY]);
    all.feed_all(&tokens[2..], &mut logits).unwrap();
    assert_eq!(logits, expected[2 * VOCABULARY..]);
    assert_eq!((all.tokens(), all.logits()), (&tokens[..], single.logits()));
    assert!(all.feed_all(&[], &mut logits).is_err() && all.feed_all(&[1; 10], &mut logits).is_err());
    assert_eq!(all.tokens(), tokens);
}

#[test]
fn the_best_token_is_that_of_the_logits() {
    let (mut by_logits, _) = session(&[8, 16], 3, true);
    let (mut by_device, _) = session(&[8, 16], 3, true);
    let expected = greedy(&mut by_logits, &[5, 1, 4, 1], 10);
    let mut tokens = vec![by_device.feed_best(&[5, 1, 4, 1]).unwrap().unwrap()];
    while tokens.len() < 10 {
        let last = tokens[tokens.len() - 1];
        tokens.push(by_device.feed_best(&[last]).unwrap().unwrap());
    }
    assert_eq!(tokens, expected);
}
