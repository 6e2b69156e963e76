//! The whole graph in another float type, for `convert --dtype`.
//!
//! Weights, tables and scalars are cast (by recipe, without reading bytes), float inputs such as caches are retyped,
//! and casts between float types become casts to the new type, or are removed if they have no effect. Statistics of
//! normalizations are fp32 inside their operators for every type. A finite value that fp16 cannot represent must not
//! silently become an infinity: the fill value of a mask becomes the lowest finite value, anything else is an error
//! that names the constants.

use std::collections::HashSet;

use super::pattern::finish;
use super::{PassError, cleanup};
use crate::graph::op::Op;
use crate::graph::{Constant, ConstantSource, Transform};
use crate::graph::{ConstantError, Definition, Graph, ValueId};
use crate::tensor::{DType, Tensor};

/// The largest finite fp16 number, and the first that rounds to infinity.
const F16_MAX: f64 = 65504.0;
const F16_OVERFLOW: f64 = 65520.0;
/// The largest number that rounds to zero in fp16: half its smallest subnormal.
const F16_UNDERFLOW: f64 = 1.0 / 33_554_432.0;

/// Converts every float value to `to`; returns the number of changed constants, inputs and operators. Tensors with
/// numbers too large are an error unless `allow_overflow`; single numbers always are, since a formula depends on them.
/// Panics unless `to` is F32, F16 or Bf16.
pub fn run(graph: &mut Graph, to: DType, allow_overflow: bool) -> Result<usize, PassError> {
    assert!(to.is_float() && to != DType::F64, "{to} is no type for a model");
    let wrong = |dtype: Option<DType>| dtype.is_some_and(|d| d.is_float() && d != to);
    let mut changes = 0;
    let mut unfit: Vec<String> = Vec::new();
    let exact = of_attention_in_fp32(graph);
    for id in graph.value_ids() {
        let value = graph.value(id);
        if !wrong(value.dtype) || exact.contains(&id) {
            continue;
        }
        match &value.definition {
            Definition::Constant(constant) => {
                let constant = constant.clone();
                match converted(&constant, to)? {
                    Some(cast) => graph.set_constant(id, cast),
                    None if allow_overflow && constant.len() > 1 => graph.set_constant(id, constant.cast(to)),
                    None => {
                        // A weight and its transpose count as one.
                        let what = described(graph, id, &constant);
                        if !unfit.contains(&what) {
                            unfit.push(what);
                        }
                    }
                }
                changes += 1;
            }
            Definition::Input => {
                graph.value_mut(id).dtype = Some(to);
                changes += 1;
            }
            _ => graph.value_mut(id).dtype = Some(to),
        }
    }
    if let Some(mut interface) = graph.interface.take() {
        interface.set_cache_dtypes(|id| graph.value(id).dtype);
        graph.interface = Some(interface);
    }
    if !unfit.is_empty() {
        return Err(PassError::Range {
            dtype: to,
            constants: unfit,
        });
    }
    for id in graph.node_ids().collect::<Vec<_>>() {
        match &mut graph.node_mut(id).op {
            Op::Cast { to: target } if wrong(Some(*target)) => *target = to,
            Op::ConstantOfShape { value } if wrong(Some(value.dtype())) => {
                *value = Tensor::from_f64_as(to, value.shape().to_vec(), &value.to_f64());
            }
            _ => continue,
        }
        changes += 1;
    }
    if changes > 0 {
        finish(graph, changes)?;
        cleanup::run(graph)?;
    }
    Ok(changes)
}

/// Slopes and sinks of attention: the error of a rounded slope grows with the position.
fn of_attention_in_fp32(graph: &Graph) -> HashSet<ValueId> {
    let nodes = graph.node_ids().map(|id| graph.node(id));
    let biased = nodes.filter(|node| matches!(node.op, Op::BiasedAttention(_)));
    biased
        .flat_map(|node| [node.input(4), node.input(5)])
        .flatten()
        .collect()
}

/// By its name in the export, and with the number that is too large.
fn described(graph: &Graph, id: ValueId, constant: &Constant) -> String {
    let mut source = constant;
    while let ConstantSource::Derived(derived) = source.source()
        && let [one] = &derived.inputs[..]
    {
        source = one;
    }
    let name = source.origin().unwrap_or(&graph.value(id).name);
    let numbers = constant.materialize().map(|t| t.to_f64()).unwrap_or_default();
    let finite = numbers.iter().copied().filter(|v| v.is_finite());
    let largest = finite.fold(0f64, |most, v| if v.abs() > most.abs() { v } else { most });
    format!("{name:?} ({largest:e})")
}

/// `None`: it has a finite number that `to` cannot represent.
fn converted(constant: &Constant, to: DType) -> Result<Option<Constant>, ConstantError> {
    let cast = constant.cast(to);
    if to != DType::F16 {
        return Ok(Some(cast));
    }
    if constant.len() == 1 {
        let tensor = constant.materialize()?;
        let number = tensor.to_f64()[0];
        let vanishes = number != 0.0 && number.abs() <= F16_UNDERFLOW;
        let overflows = number.is_finite() && number.abs() >= F16_OVERFLOW;
        return Ok(if overflows && number < 0.0 {
            Some(fill(constant, tensor.shape()))
        } else {
            (!vanishes && !overflows).then_some(cast)
        });
    }
    if largest(constant) < F16_OVERFLOW {
        return Ok(Some(cast));
    }
    // The bound may be too high for a part of a tensor or a scaled tensor; the bytes decide.
    let values = constant.materialize()?.to_f32();
    let too_large = |v: &f32| v.is_finite() && f64::from(v.abs()) >= F16_OVERFLOW;
    if !values.iter().any(too_large) {
        return Ok(Some(cast));
    }
    // A whole mask: zeros and fills.
    let mask = values
        .iter()
        .all(|v| *v == 0.0 || *v == f32::NEG_INFINITY || (too_large(v) && *v < 0.0));
    if !mask {
        return Ok(None);
    }
    let clamped: Vec<f64> = values
        .iter()
        .map(|v| if too_large(v) { -F16_MAX } else { f64::from(*v) })
        .collect();
    Ok(Some(
        Tensor::from_f64_as(to, constant.shape().to_vec(), &clamped).into(),
    ))
}

fn fill(constant: &Constant, shape: &[usize]) -> Constant {
    let fill = Constant::tensor(Tensor::from_f64_as(DType::F16, shape.to_vec(), &[-F16_MAX]));
    match constant.origin() {
        Some(origin) => fill.with_origin(origin),
        None => fill,
    }
}

/// A bound on the magnitude of the finite elements, from the bytes in the file; nothing is computed. Absent weights of
/// a stripped package count as fitting.
fn largest(constant: &Constant) -> f64 {
    match constant.source() {
        ConstantSource::Tensor(tensor) => largest_element(tensor),
        ConstantSource::Absent => 0.0,
        ConstantSource::Derived(derived) => {
            let inputs = derived.inputs.iter().map(largest).fold(0.0, f64::max);
            match derived.transform {
                Transform::Scale(factor) => inputs * factor.abs(),
                Transform::Offset(addend) => inputs + addend.abs(),
                Transform::Dequantize(_) => {
                    let [codes, scales, zero_points @ ..] = &derived.inputs[..] else {
                        return inputs;
                    };
                    (largest(codes) + zero_points.iter().map(largest).sum::<f64>()) * largest(scales)
                }
                _ => inputs,
            }
        }
    }
}

fn largest_element(tensor: &Tensor) -> f64 {
    match tensor.dtype() {
        DType::F32 => {
            // Magnitudes of floats order like their bits without the sign; those from here on are not finite.
            const INFINITY: u32 = 0x7f80_0000;
            let magnitude = |b: &[u8; 4]| u32::from_le_bytes(*b) & 0x7fff_ffff;
            let words = tensor.data().as_chunks::<4>().0;
            let largest = words
                .iter()
                .map(|w| if magnitude(w) < INFINITY { magnitude(w) } else { 0 })
                .max()
                .unwrap_or(0);
            f64::from(f32::from_bits(largest))
        }
        DType::F16 => F16_MAX,
        _ => {
            let finite = tensor.to_f64().into_iter().filter(|v| v.is_finite());
            finite.map(f64::abs).fold(0.0, f64::max)
        }
    }
}
