//! Second moments of the inputs of linear layers while a model reads a text, `Σ x xᵀ`, for [`crate::tensor::compensate`].
//!
//! The graph gets a product `xᵀ x` for each input, with all axes but the last as one, so the executor's kernels compute them, and the
//! sums of all windows are added here. An input takes `4 · width²` bytes for its sum and the same for one window, so inputs are measured in [batches](batches),
//! with one pass over the text each.

use crate::graph::op::Op;
use crate::graph::{Graph, ValueId, infer};
use crate::tensor::compensate::Factor;

use super::error::QuantizeError;
use super::sites::Site;
use super::statistics::{self, WINDOW, failed, width};

/// Maximum size of the sums of one batch, in bytes.
const BATCH: usize = 2 << 30;

/// A site, and the lengths of the consecutive spans of its channels that are measured: see [`crate::tensor::compensate::spans`].
pub type Wanted = (Site, Vec<usize>);

/// Divides a list into batches without changing its order. Each has as many sites as [`BATCH`] allows, at least one.
pub fn batches(wanted: &[Wanted]) -> Vec<&[Wanted]> {
    let mut batches = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (i, (_, spans)) in wanted.iter().enumerate() {
        let own: usize = spans.iter().map(|width| width * width * size_of::<f32>()).sum();
        if i > start && bytes + own > BATCH {
            batches.push(&wanted[start..i]);
            (start, bytes) = (i, 0);
        }
        bytes += own;
    }
    if start < wanted.len() {
        batches.push(&wanted[start..]);
    }
    batches
}

/// Runs a canonical graph over tokens and adds up the second moments of each site's input, in the order of `wanted`. `longest`:
/// maximum positions of the model. `progress` gets the completed share.
pub fn measure(
    graph: &Graph,
    wanted: &[Wanted],
    tokens: &[u32],
    longest: Option<usize>,
    progress: impl FnMut(f32),
) -> Result<Vec<Sums>, QuantizeError> {
    let mut graph = graph.clone();
    let mut sums = Vec::new();
    for (site, spans) in wanted {
        debug_assert_eq!(spans.iter().sum::<usize>(), width(&graph, site.input)?);
        let mut products = Vec::new();
        for (value, width) in cut(&mut graph, site.input, spans) {
            let shape = graph.add_i64("moments/shape", &[-1, width as i64]);
            let value = graph.add_node("moments/rows", Op::Reshape { allowzero: false }, &[value, shape]);
            let turn = Op::Transpose { perm: Some(vec![1, 0]) };
            let turned = graph.add_node("moments/turned", turn, &[value]);
            let product = graph.add_node("moments", Op::MatMul, &[turned, value]);
            graph.outputs.push(product);
            products.push((product, vec![0f32; width * width], width));
        }
        sums.push(products);
    }
    infer(&mut graph).map_err(failed)?;
    let windows: Vec<&[u32]> = tokens.chunks(WINDOW).collect();
    statistics::read(&graph, &windows, longest, progress, |values| {
        for (product, sum, _) in sums.iter_mut().flatten() {
            let found = &values[&graph.value(*product).name];
            sum.iter_mut().zip(found).for_each(|(sum, value)| *sum += value);
        }
    })?;
    let sums = sums.into_iter().map(|products| Sums {
        spans: products.into_iter().map(|(_, sum, width)| (sum, width)).collect(),
        tokens: tokens.len(),
    });
    Ok(sums.collect())
}

/// Sums of products of an input's channels over all tokens.
pub struct Sums {
    /// For each span its sums, `[width, width]`, and its width.
    pub spans: Vec<(Vec<f32>, usize)>,
    /// Number of tokens.
    pub tokens: usize,
}

impl Sums {
    /// The factors of all spans; `None` if a sum is not finite.
    pub fn factors(self) -> Option<Vec<Factor>> {
        let spans = self.spans.into_iter();
        spans.map(|(sum, width)| Factor::of(&sum, width, self.tokens)).collect()
    }
}

/// The spans of a value's channels, each with its width.
fn cut(graph: &mut Graph, value: ValueId, spans: &[usize]) -> Vec<(ValueId, usize)> {
    if let [width] = spans {
        return vec![(value, *width)];
    }
    let axis = graph.add_i64("moments/axis", &[-1]);
    let mut start = 0;
    let mut made = Vec::new();
    for width in spans {
        let from = graph.add_i64("moments/from", &[start as i64]);
        start += width;
        let to = graph.add_i64("moments/to", &[start as i64]);
        let span = graph.add_node("moments/span", Op::Slice, &[value, from, to, axis]);
        made.push((span, *width));
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_keep_the_order_and_their_size() {
        let mut graph = Graph::default();
        let mut site = || Site {
            input: graph.add_i64("input", &[0]),
            weights: Vec::new(),
            fold: None,
        };
        // 64 MiB each, and one that is larger than a batch.
        let mut wanted: Vec<Wanted> = (0..40).map(|_| (site(), vec![4096])).collect();
        wanted.insert(35, (site(), vec![4096; 40]));
        let sizes: Vec<usize> = batches(&wanted).iter().map(|batch| batch.len()).collect();
        assert_eq!(sizes, [32, 3, 1, 5]);
        let joined: Vec<ValueId> = batches(&wanted).concat().iter().map(|(site, _)| site.input).collect();
        let inputs: Vec<ValueId> = wanted.iter().map(|(site, _)| site.input).collect();
        assert_eq!(joined, inputs);
        assert!(batches(&[]).is_empty());
    }
}
