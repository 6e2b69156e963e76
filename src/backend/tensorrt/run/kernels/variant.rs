//! Which variant of the product computes a layer: the fastest one for the nearest measured matrix.
//!
//! The order of a row's sums depends only on the form of the weights and the number of warps, so a variant changes at
//! most the last bit of a result.

use super::Limits;
use crate::network::CodeLayout;
use crate::tensor::DType;

/// Warps per block, tiles of 8 rows of weights that it processes at a time, and columns of 64 bytes in flight per warp.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Shape {
    pub warps: usize,
    pub tiles: usize,
    pub stages: usize,
}

impl Shape {
    pub fn name(self) -> String {
        format!("w{}t{}s{}", self.warps, self.tiles, self.stages)
    }
}

/// How a variant reads the rows of x.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct RowsOfX {
    /// Maximum number: 1, 8 or 16.
    pub most: usize,
    /// Whether they are streamed with the weights; otherwise they are in shared memory as a whole.
    pub streamed: bool,
}

impl RowsOfX {
    /// One row, in shared memory.
    pub const ONE: RowsOfX = RowsOfX {
        most: 1,
        streamed: false,
    };
    /// The maximum of any variant.
    pub const MOST: usize = crate::network::RowProduct::MOST_ROWS;

    fn of(rows: usize, streamed: bool) -> Self {
        RowsOfX {
            most: if rows > 8 { RowsOfX::MOST } else { 8 },
            streamed,
        }
    }

    /// The form in names of variants.
    fn word(self) -> String {
        match self.most {
            1 => String::new(),
            most => format!("-r{most}{}", if self.streamed { "x" } else { "" }),
        }
    }
}

/// The weights of a product.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Form {
    /// Element type of activations: fp16 or bf16.
    pub dtype: DType,
    /// i4, i8, or the activations' type.
    pub weights: DType,
    pub layout: Option<CodeLayout>,
}

impl Form {
    /// `floats`, `i8` or `i4`.
    fn weights(self) -> &'static str {
        match self.weights {
            DType::I4 => "i4",
            DType::I8 => "i8",
            _ => "floats",
        }
    }

    /// The archive with the variants.
    pub fn archive(self) -> String {
        format!("product-{}-{}", self.dtype, self.weights())
    }

    /// The variant of a shape, without the target.
    pub fn variant(self, shape: Shape, rows: RowsOfX) -> String {
        let layout = self
            .layout
            .map_or_else(String::new, |layout| format!("-{}", layout.word()));
        format!("{}{layout}{}-{}", self.archive(), rows.word(), shape.name())
    }

    pub fn bits(self) -> usize {
        self.weights.bits()
    }

    fn measured(self) -> &'static [Measured] {
        self.tables().0
    }

    fn tables(self) -> (&'static [Measured], &'static [OfRows]) {
        match (self.weights, self.layout.and_then(|layout| layout.group)) {
            (DType::I4, Some(16 | 32)) => (I4_SHORT, I4_SHORT_ROWS),
            (DType::I4, _) => (I4_LONG, I4_LONG_ROWS),
            (DType::I8, _) => (I8, I8_ROWS),
            _ => (FLOATS, FLOATS_ROWS),
        }
    }

    /// The shapes for several rows with this many warps, preferred one first.
    fn of_rows(self, warps: usize, streamed: bool) -> impl Iterator<Item = Shape> {
        let lists = self.tables().1.iter().filter(move |of_rows| of_rows.warps == warps);
        let shapes = lists.flat_map(move |lists| if streamed { lists.streamed } else { lists.whole });
        shapes.map(move |(tiles, stages)| Shape {
            warps,
            tiles: *tiles,
            stages: *stages,
        })
    }
}

/// A product measured in a whole decode step, with its fastest variant.
struct Measured {
    /// Total rows of all matrices, and their depth.
    matrix: (usize, usize),
    gated: bool,
    shape: Shape,
    /// Blocks per multiprocessor.
    blocks: u32,
}

const fn measured(matrix: (usize, usize), gated: bool, [warps, tiles, stages]: [usize; 3], blocks: u32) -> Measured {
    Measured {
        matrix,
        gated,
        shape: Shape { warps, tiles, stages },
        blocks,
    }
}

// q, k and v; output; gate and up; down; logits: of models of 8 B and 1.1 B parameters and of SmolLM2-135M, on one H200
// (benches/kernels/configurations.json). For the last two of 8 B, among the shapes in the archive.
const FLOATS: &[Measured] = &[
    measured((6144, 4096), false, [16, 2, 6], 1),
    measured((4096, 4096), false, [8, 4, 6], 1),
    measured((28672, 4096), true, [8, 4, 6], 1),
    measured((4096, 14336), false, [16, 2, 6], 1),
    measured((128_256, 4096), false, [16, 2, 6], 1),
    measured((2560, 2048), false, [8, 4, 6], 1),
    measured((2048, 2048), false, [8, 4, 6], 1),
    measured((11264, 2048), true, [8, 2, 3], 3),
    measured((2048, 5632), false, [8, 2, 12], 1),
    measured((32000, 2048), false, [16, 2, 2], 2),
    measured((960, 576), false, [8, 4, 6], 1),
    measured((576, 576), false, [8, 4, 6], 1),
    measured((3072, 576), true, [8, 4, 6], 1),
    measured((576, 1536), false, [8, 4, 6], 1),
    measured((49152, 576), false, [4, 4, 3], 4),
];
const I8: &[Measured] = &[
    measured((6144, 4096), false, [8, 4, 3], 2),
    measured((4096, 4096), false, [8, 4, 3], 2),
    measured((28672, 4096), true, [8, 4, 3], 2),
    measured((4096, 14336), false, [16, 2, 3], 2),
    measured((2560, 2048), false, [8, 2, 6], 2),
    measured((2048, 2048), false, [8, 4, 3], 1),
    measured((11264, 2048), true, [8, 4, 3], 2),
    measured((2048, 5632), false, [8, 2, 6], 1),
    measured((960, 576), false, [8, 4, 3], 1),
];
const I4_LONG: &[Measured] = &[
    measured((6144, 4096), false, [8, 4, 2], 2),
    measured((4096, 4096), false, [8, 4, 6], 1),
    measured((28672, 4096), true, [8, 4, 2], 2),
    measured((4096, 14336), false, [8, 4, 6], 1),
    measured((2560, 2048), false, [8, 2, 6], 2),
    measured((2048, 2048), false, [8, 2, 6], 1),
    measured((11264, 2048), true, [8, 4, 3], 2),
    measured((2048, 5632), false, [8, 2, 6], 2),
];
const I4_SHORT: &[Measured] = &[
    measured((6144, 4096), false, [8, 4, 2], 2),
    measured((4096, 4096), false, [8, 4, 2], 2),
    measured((28672, 4096), true, [8, 4, 2], 2),
    measured((4096, 14336), false, [8, 2, 3], 3),
    measured((2560, 2048), false, [8, 4, 6], 1),
    measured((2048, 2048), false, [8, 4, 6], 1),
    measured((11264, 2048), true, [4, 4, 2], 4),
    measured((2048, 5632), false, [8, 2, 3], 2),
    measured((960, 576), false, [8, 4, 2], 2),
    measured((576, 576), false, [8, 2, 6], 1),
    measured((3072, 576), true, [8, 2, 6], 2),
    measured((576, 1536), false, [8, 2, 6], 1),
];

/// The shapes for several rows of x with one number of warps, as (tiles, stages), preferred one first: for x in shared
/// memory as a whole, and for streamed x. `compile_kernels.py` has the same lists.
struct OfRows {
    warps: usize,
    whole: &'static [(usize, usize)],
    streamed: &'static [(usize, usize)],
}

const fn of_rows(warps: usize, whole: &'static [(usize, usize)], streamed: &'static [(usize, usize)]) -> OfRows {
    OfRows { warps, whole, streamed }
}

// Of floats by sweeps for 8 B fp16 with 4, 8 and 16 rows (benches/kernels/configurations.json); others have no sweep.
const FLOATS_ROWS: &[OfRows] = &[
    of_rows(16, &[(2, 6), (2, 3), (2, 2)], &[(4, 3), (2, 2)]),
    of_rows(8, &[(4, 8), (2, 8), (2, 3)], &[(2, 6), (2, 3)]),
    of_rows(4, &[(4, 3)], &[(4, 3)]),
];
const I8_ROWS: &[OfRows] = &[of_rows(16, &[(2, 3)], &[(2, 3)]), of_rows(8, &[(4, 3)], &[(4, 3)])];
const I4_LONG_ROWS: &[OfRows] = &[of_rows(8, &[(4, 2)], &[(4, 2)])];
const I4_SHORT_ROWS: &[OfRows] = &[of_rows(8, &[(4, 2)], &[(4, 2)]), of_rows(4, &[(4, 2)], &[(4, 2)])];

/// The shape for `rows` rows of x of a product that uses `one` for a single row: with as many warps, so that a row has
/// the same bits. x is in shared memory as a whole if there is a norm, otherwise streamed. `shared` returns the shared
/// memory of a block. `None` if none fits.
pub(super) fn choose_for_rows(
    form: Form,
    one: Shape,
    rows: usize,
    normed: bool,
    limits: Limits,
    shared: impl Fn(Shape, RowsOfX) -> usize,
) -> Option<(Shape, RowsOfX)> {
    let taken = RowsOfX::of(rows, !normed);
    let mut shapes = form.of_rows(one.warps, taken.streamed);
    let fitting = shapes.find(|shape| shared(*shape, taken) <= limits.shared)?;
    Some((fitting, taken))
}

/// Shape and blocks per multiprocessor: those of the nearest matrix whose shape fits the GPU's shared memory. `shared`
/// returns the shared memory of a block. `None` if none fits.
pub(super) fn choose(
    form: Form,
    matrix: (usize, usize),
    gated: bool,
    limits: Limits,
    shared: impl Fn(Shape) -> usize,
) -> Option<(Shape, u32)> {
    let fitting = form.measured().iter().filter(|m| shared(m.shape) <= limits.shared);
    let nearest = fitting.min_by(|a, b| distance(a, matrix, gated).total_cmp(&distance(b, matrix, gated)))?;
    Some((nearest.shape, nearest.blocks))
}

/// Distance in logarithms of rows and depth, plus one for the other kind of product.
fn distance(measured: &Measured, (rows, depth): (usize, usize), gated: bool) -> f64 {
    let ratio = |a: usize, b: usize| (a as f64 / b.max(1) as f64).ln().abs();
    let kind = f64::from(u8::from(measured.gated != gated));
    ratio(measured.matrix.0, rows) + ratio(measured.matrix.1, depth) + kind
}

#[cfg(test)]
mod tests {
    use super::super::archive;
    use super::*;

    const HOPPER: Limits = Limits {
        target: 90,
        multiprocessors: 132,
        shared: 227 << 10,
    };

    /// Every form that the rules of the network's layers allow.
    fn forms() -> Vec<Form> {
        let mut forms = Vec::new();
        for dtype in [DType::F16, DType::Bf16] {
            forms.push(Form {
                dtype,
                weights: dtype,
                layout: None,
            });
            for weights in [DType::I4, DType::I8] {
                let groups = [None].into_iter().chain((1..=1024).map(Some));
                for (group, zero_points) in groups.flat_map(|group| [(group, false), (group, true)]) {
                    let layout = CodeLayout { group, zero_points };
                    // A depth that is a multiple of every group.
                    if layout.fits(weights.bits(), group.unwrap_or(1) * 128) {
                        let layout = Some(layout);
                        forms.push(Form { dtype, weights, layout });
                    }
                }
            }
        }
        assert_eq!(forms.len(), 2 * (1 + 8 + 7));
        forms
    }

    #[test]
    fn there_is_a_kernel_for_everything_that_is_chosen() {
        for form in forms() {
            let variants = archive::variants(&form.archive());
            for measured in form.measured() {
                for target in [80, 90] {
                    let name = format!("{}-sm{target}", form.variant(measured.shape, RowsOfX::ONE));
                    assert!(variants.contains_key(&name), "{name}");
                    for (rows, streamed) in [(2, false), (8, true), (9, false), (16, true)] {
                        let of_rows: Vec<Shape> = form.of_rows(measured.shape.warps, streamed).collect();
                        assert!(!of_rows.is_empty(), "{form:?} {:?}", measured.shape);
                        for shape in of_rows {
                            let name = format!("{}-sm{target}", form.variant(shape, RowsOfX::of(rows, streamed)));
                            assert!(variants.contains_key(&name), "{name}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn several_rows_are_computed_with_the_warps_of_one() {
        for form in forms() {
            for (m, rows, normed) in form.measured().iter().flat_map(|m| [(m, 2, true), (m, 16, false)]) {
                let (shape, taken) = choose_for_rows(form, m.shape, rows, normed, HOPPER, |_, _| 0).unwrap();
                assert_eq!(shape.warps, m.shape.warps, "{form:?}");
                assert!(taken.most >= rows && taken.streamed != normed, "{form:?} {taken:?}");
            }
        }
        // The first that fits.
        let form = forms()[0];
        let one = Shape {
            warps: 8,
            tiles: 4,
            stages: 6,
        };
        let shared = |shape: Shape, _| shape.tiles * shape.stages;
        let limits = |shared| Limits { shared, ..HOPPER };
        let chosen = |most| choose_for_rows(form, one, 8, true, limits(most), shared).map(|(s, _)| (s.tiles, s.stages));
        assert_eq!(
            [chosen(32), chosen(31), chosen(15), chosen(5)],
            [Some((4, 8)), Some((2, 8)), Some((2, 3)), None]
        );
    }

    #[test]
    fn measured_matrices_get_what_was_measured() {
        for form in forms() {
            for m in form.measured() {
                let chosen = choose(form, m.matrix, m.gated, HOPPER, |_| 0);
                assert_eq!(chosen, Some((m.shape, m.blocks)), "{form:?} {:?}", m.matrix);
            }
        }
    }

    #[test]
    fn shapes_too_large_for_the_gpu_are_passed_over() {
        let form = forms()[0];
        let shared = |shape: Shape| (shape.warps * shape.stages) << 10;
        let small = Limits {
            shared: 40 << 10,
            ..HOPPER
        };
        let (shape, _) = choose(form, (4096, 4096), false, small, shared).unwrap();
        assert!(shared(shape) <= small.shared, "{shape:?}");
        let none = Limits { shared: 1, ..HOPPER };
        assert_eq!(choose(form, (4096, 4096), false, none, shared), None);
    }
}
