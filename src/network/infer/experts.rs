//! The greatest elements, and a mixture of experts.

use super::checks::{arity, check_dtype, check_extent, check_rank};
use super::{LayerFault, Typed};
use crate::dim::Dim;
use crate::network::kind::{ExpertInputs, Greatest};
use crate::network::{Tensor, TensorId};
use crate::tensor::DType;

pub(super) fn top_k(k: usize, part: Greatest, inputs: &[&Tensor]) -> Result<Typed, LayerFault> {
    arity(inputs, &[1], "1")?;
    let x = inputs[0];
    check_dtype(0, x.dtype, DType::is_float, "a float")?;
    let all = x.shape.last().and_then(Dim::as_const);
    if k == 0 || all.is_none_or(|all| all < k as i64) {
        return Err(LayerFault::Parameter(format!(
            "it takes the {k} greatest of {:?}",
            x.shape.last()
        )));
    }
    let mut shape = x.shape.clone();
    *shape.last_mut().expect("it has a last axis") = Dim::from(k);
    let dtype = match part {
        Greatest::Values => x.dtype,
        Greatest::Indices => DType::I32,
    };
    Ok((dtype, shape))
}

pub(super) fn expert_layer(count: usize, inputs: &[&Tensor]) -> Result<Typed, LayerFault> {
    let places: Vec<TensorId> = (0..inputs.len() as u32).map(TensorId).collect();
    let Some(of) = ExpertInputs::of(&places) else {
        return Err(LayerFault::Arity {
            expected: "5, 6, 7 or 9",
            found: inputs.len(),
        });
    };
    let at = |id: TensorId| id.0 as usize;
    let shape = |id: TensorId| &inputs[at(id)].shape;
    let x = inputs[0];
    let Some((width, leading)) = x.shape.split_last() else {
        return Err(LayerFault::Rank {
            input: 0,
            found: 0,
            wanted: "1 or more",
        });
    };
    check_dtype(0, x.dtype, DType::is_float, "a float")?;
    check_dtype(1, inputs[1].dtype, |d| d == DType::F32, "f32")?;
    check_dtype(2, inputs[2].dtype, |d| d == DType::I32, "i32")?;
    let mut chosen = leading.to_vec();
    chosen.push(shape(of.weights).last().cloned().unwrap_or_default());
    for input in [1, 2] {
        if inputs[input].shape != chosen {
            return Err(LayerFault::Extent {
                what: format!("input {input}, an element for each of a token's experts,"),
                wanted: chosen.iter().fold(Dim::constant(1), |n, dim| &n * dim),
                found: inputs[input].shape.iter().fold(Dim::constant(1), |n, dim| &n * dim),
            });
        }
    }
    let rows = |input: TensorId, depth: &Dim| -> Result<Dim, LayerFault> {
        let input = at(input);
        check_rank(inputs, input, 2, "2")?;
        if inputs[input].dtype != inputs[at(of.gate)].dtype || !inputs[input].dtype.is_float() {
            return Err(LayerFault::UnlikeDTypes {
                left: at(of.gate),
                right: input,
            });
        }
        let shape = &inputs[input].shape;
        check_extent(|| format!("the columns of input {input}"), depth, &shape[1])?;
        let all = shape[0].as_const().and_then(|all| usize::try_from(all).ok());
        match all.filter(|all| count > 0 && all.is_multiple_of(count)) {
            Some(all) => Ok(Dim::from(all / count)),
            None => Err(LayerFault::Parameter(format!(
                "the rows {:?} of input {input} are not those of {count} experts",
                shape[0]
            ))),
        }
    };
    let hidden = rows(of.gate, width)?;
    if let Some(up) = of.up {
        let found = rows(up, width)?;
        check_extent(|| "the rows of an expert in up".to_string(), &hidden, &found)?;
    }
    let out = rows(of.down, &hidden)?;
    let biases = of
        .biases
        .map(|(gate, up, down)| [Some((gate, of.gate)), up.zip(of.up), Some((down, of.down))]);
    for (bias, matrix) in biases.into_iter().flatten().flatten() {
        check_rank(inputs, at(bias), 1, "1")?;
        check_dtype(at(bias), inputs[at(bias)].dtype, DType::is_float, "a float")?;
        check_extent(|| format!("input {}", at(bias)), &shape(matrix)[0], &shape(bias)[0])?;
    }
    let mut shape = leading.to_vec();
    shape.push(out);
    Ok((x.dtype, shape))
}
