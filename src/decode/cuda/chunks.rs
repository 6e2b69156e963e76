//! How a prompt is cut for engines that take certain numbers of tokens.

use crate::network::Tokens;

/// Cuts off the next chunk, as tokens and rows: with `waiting` tokens and `room` slots, among engines for these token counts. The largest
/// that is filled, or else the smallest that holds all, padded; near the end of the cache whatever fits it.
pub(super) fn choose(engines: impl Iterator<Item = Tokens>, waiting: usize, room: usize) -> (usize, usize) {
    let exact = |n: usize| (n, n);
    let mut fitting: Vec<usize> = Vec::new();
    for tokens in engines {
        match tokens {
            Tokens::Static(n) if n <= room => fitting.push(n),
            Tokens::Static(_) => {}
            Tokens::Dynamic { min, max, .. } if min <= room => {
                let rows = waiting.min(max).min(room);
                if rows >= min && waiting > 1 {
                    return exact(rows);
                }
                fitting.push(min);
            }
            Tokens::Dynamic { .. } => {}
        }
    }
    fitting.sort_unstable();
    let filled = fitting.iter().rev().find(|n| **n <= waiting).copied();
    let padded = fitting.iter().find(|n| **n >= waiting).copied();
    match (filled, padded) {
        (_, Some(rows)) => (waiting, rows),
        (Some(rows), None) => exact(rows),
        (None, None) => exact(1),
    }
}

/// Whether an engine for these token counts can run so many rows.
pub(super) fn covers(tokens: Tokens, rows: usize) -> bool {
    match tokens {
        Tokens::Static(n) => n == rows,
        Tokens::Dynamic { min, max, .. } => (min..=max).contains(&rows),
    }
}

/// The most rows it can run.
pub(super) fn largest(tokens: Tokens) -> usize {
    match tokens {
        Tokens::Static(n) => n,
        Tokens::Dynamic { max, .. } => max,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOME: [Tokens; 3] = [Tokens::Static(1), Tokens::Static(128), Tokens::Static(512)];

    fn cuts(engines: &[Tokens], mut waiting: usize, capacity: usize) -> Vec<(usize, usize)> {
        let (mut position, mut cuts) = (0, Vec::new());
        while waiting > 0 {
            let (tokens, rows) = choose(engines.iter().copied(), waiting, capacity - position);
            assert!(tokens <= rows && rows <= capacity - position);
            cuts.push((tokens, rows));
            position += tokens;
            waiting -= tokens;
        }
        cuts
    }

    #[test]
    fn prompts_are_cut_into_full_chunks_and_a_padded_one() {
        assert_eq!(cuts(&SOME, 1, 1024), [(1, 1)]);
        assert_eq!(cuts(&SOME, 17, 1024), [(17, 128)]);
        assert_eq!(cuts(&SOME, 128, 1024), [(128, 128)]);
        assert_eq!(cuts(&SOME, 129, 1024), [(129, 512)]);
        assert_eq!(cuts(&SOME, 700, 1024), [(512, 512), (188, 512)]);
        assert_eq!(cuts(&SOME, 700, 1000), [(512, 512), (128, 128), (60, 128)]);
        // At the end of the cache padding has no room.
        assert_eq!(cuts(&SOME, 130, 130), [(128, 128), (1, 1), (1, 1)]);
        assert_eq!(cuts(&SOME[..1], 3, 8), [(1, 1); 3]);
    }

    #[test]
    fn a_dynamic_engine_takes_prompts_as_they_are() {
        let any = Tokens::Dynamic {
            min: 1,
            opt: 128,
            max: 512,
        };
        assert_eq!(cuts(&[Tokens::Static(1), any], 700, 1024), [(512, 512), (188, 188)]);
        assert_eq!(cuts(&[Tokens::Static(1), any], 1, 1024), [(1, 1)]);
    }
}
