//! How a prompt is cut for engines of fixed numbers of tokens.

use crate::network::Tokens;

/// The fixed cost of a pass, in rows: reading the weights, and launches. From the times of passes of 1, 128, 256, 512
/// and 1024 rows of a model with 8 B parameters on an H200 (docs/explanation/gpu.md): 3.7, 6.8, 8.0, 13 and 24.8 ms.
const PASS: usize = 160;

/// The next chunk, as tokens and rows: with `waiting` tokens and `room` slots, among engines for these token counts.
/// The cuts minimize the total cost, which is [`PASS`] plus the rows of each; the last may be padded.
pub(super) fn choose(engines: impl Iterator<Item = Tokens>, waiting: usize, room: usize) -> (usize, usize) {
    let mut sizes: Vec<usize> = vec![1];
    for tokens in engines {
        match tokens {
            Tokens::Static(n) if n <= room => sizes.push(n),
            Tokens::Static(_) => {}
            Tokens::Dynamic { min, max, .. } if min <= room => {
                let rows = waiting.min(max).min(room);
                if rows >= min && waiting > 1 {
                    return (rows, rows);
                }
                sizes.push(min);
            }
            Tokens::Dynamic { .. } => {}
        }
    }
    sizes.sort_unstable();
    sizes.dedup();
    let largest = *sizes.last().expect("at least 1");
    // Far from the end the largest chunk is the best one.
    if waiting > 4 * largest {
        return (largest, largest);
    }
    let padding = room - waiting.min(room);
    // For each number of waiting tokens: the lowest cost, and the first chunk of that cut.
    let mut best: Vec<(usize, usize)> = vec![(0, 0)];
    for left in 1..=waiting {
        let costs = sizes.iter().filter_map(|size| match left.checked_sub(*size) {
            Some(rest) => Some((PASS + size + best[rest].0, *size)),
            None => (size - left <= padding).then_some((PASS + size, *size)),
        });
        // Among equal costs, the larger chunk: fewer follow.
        let cut = costs.min_by_key(|(cost, size)| (*cost, std::cmp::Reverse(*size)));
        best.push(cut.expect("one token is a chunk"));
    }
    let rows = best[waiting].1;
    (waiting.min(rows), rows)
}

/// Whether an engine for these token counts can run this many rows.
pub(super) fn covers(tokens: Tokens, rows: usize) -> bool {
    match tokens {
        Tokens::Static(n) => n == rows,
        Tokens::Dynamic { min, max, .. } => (min..=max).contains(&rows),
    }
}

/// The maximum rows it can run.
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

    const MORE: [Tokens; 5] = [
        Tokens::Static(1),
        Tokens::Static(128),
        Tokens::Static(256),
        Tokens::Static(512),
        Tokens::Static(2048),
    ];

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
    fn prompts_are_cut_as_it_costs_least() {
        assert_eq!(cuts(&SOME, 1, 1024), [(1, 1)]);
        assert_eq!(cuts(&SOME, 17, 1024), [(17, 128)]);
        assert_eq!(cuts(&SOME, 128, 1024), [(128, 128)]);
        assert_eq!(cuts(&SOME, 129, 1024), [(128, 128), (1, 1)]);
        assert_eq!(cuts(&MORE, 129, 1024), [(129, 256)]);
        assert_eq!(cuts(&MORE, 700, 4096), [(512, 512), (188, 256)]);
        assert_eq!(cuts(&MORE, 4040, 4096), [(2048, 2048), (1992, 2048)]);
        assert_eq!(cuts(&MORE, 2100, 4096), [(2048, 2048), (52, 128)]);
        assert_eq!(cuts(&SOME, 300, 1024), [(300, 512)]);
        assert_eq!(cuts(&SOME, 512, 1024), [(512, 512)]);
        assert_eq!(cuts(&SOME, 700, 1024), [(512, 512), (128, 128), (60, 128)]);
        assert_eq!(cuts(&SOME, 700, 1000), [(512, 512), (128, 128), (60, 128)]);
        // At the end of the cache padding has no room.
        assert_eq!(cuts(&SOME, 130, 130), [(128, 128), (1, 1), (1, 1)]);
        assert_eq!(cuts(&SOME[..1], 3, 8), [(1, 1); 3]);
        assert_eq!(cuts(&SOME, 40 * 512, 65536), [(512, 512); 40]);
    }

    /// With sizes an eighth apart no prompt is padded by more than that, and none is cut into many pieces.
    #[test]
    fn many_sizes_leave_little_padding() {
        let sizes = [
            1, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512, 576, 640, 768, 896, 1024,
        ];
        let engines = sizes.map(Tokens::Static);
        for waiting in (1..=4096).step_by(19) {
            let cuts = cuts(&engines, waiting, 8192);
            let rows: usize = cuts.iter().map(|(_, rows)| rows).sum();
            assert!(rows <= waiting + (waiting / 4).max(32), "{waiting}: {cuts:?}");
            assert!(cuts.len() <= waiting.div_ceil(1024) + 1, "{waiting}: {cuts:?}");
        }
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
