//! The definition of each layer, as simple as possible, in f64 and one element at a time.

use lapidary::graph::op::{ExpertActivation, Gating};
use lapidary::network::{Activation, Elementwise, ExpertInputs, Greatest, LayerKind, MatrixOp, ReduceOp, UnaryOp};
use lapidary::tensor::{DType, Tensor};

#[derive(Clone, Debug)]
pub struct Value {
    pub dtype: DType,
    pub shape: Vec<usize>,
    pub data: Vec<f64>,
}

impl From<&Tensor> for Value {
    fn from(tensor: &Tensor) -> Self {
        Value {
            dtype: tensor.dtype(),
            shape: tensor.shape().to_vec(),
            data: tensor.to_f64(),
        }
    }
}

/// Every index of a shape, in row-major order.
pub fn indices(shape: &[usize]) -> Vec<Vec<usize>> {
    let mut all = vec![Vec::new()];
    for dim in shape {
        all = all
            .iter()
            .flat_map(|head: &Vec<usize>| (0..*dim).map(move |i| [head.as_slice(), &[i]].concat()))
            .collect();
    }
    all
}

impl Value {
    fn at(&self, index: &[usize]) -> f64 {
        let flat = self.shape.iter().zip(index).fold(0, |flat, (dim, i)| flat * dim + i);
        self.data[flat]
    }
    /// With axes of size 1 repeated.
    fn spread(&self, index: &[usize]) -> f64 {
        let own: Vec<usize> = self
            .shape
            .iter()
            .zip(index)
            .map(|(d, i)| if *d == 1 { 0 } else { *i })
            .collect();
        self.at(&own)
    }
    fn make(dtype: DType, shape: Vec<usize>, f: impl FnMut(&Vec<usize>) -> f64) -> Value {
        let data = indices(&shape).iter().map(f).collect();
        Value { dtype, shape, data }
    }
    fn transposed(&self, perm: &[usize]) -> Value {
        let shape = perm.iter().map(|p| self.shape[*p]).collect();
        Value::make(self.dtype, shape, |index| {
            let mut source = vec![0; perm.len()];
            for (i, p) in perm.iter().enumerate() {
                source[*p] = index[i];
            }
            self.at(&source)
        })
    }
}

fn broadcast(a: &[usize], b: &[usize]) -> Vec<usize> {
    a.iter().zip(b).map(|(a, b)| if *a == 1 { *b } else { *a }).collect()
}

fn erf(x: f64) -> f64 {
    // Simpson's rule on the definition.
    let n = 2000;
    let h = x / f64::from(n);
    let f = |t: f64| (-t * t).exp();
    let inner: f64 = (1..n)
        .map(|i| f(f64::from(i) * h) * if i % 2 == 1 { 4.0 } else { 2.0 })
        .sum();
    (f(0.0) + inner + f(x)) * h / 3.0 * 2.0 / std::f64::consts::PI.sqrt()
}

/// The nearest number of a float of 8 bits.
fn narrow(dtype: DType, x: f64) -> f64 {
    Tensor::from_f64_as(dtype, vec![1], &[x]).to_f64()[0]
}

fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::Bf16 | DType::F32)
}

/// The output of a layer; weights and constants are not layers here.
pub fn evaluate(kind: &LayerKind, inputs: &[Value]) -> Value {
    let x = &inputs[0];
    match kind {
        LayerKind::MatrixMultiply { op_a, op_b } => {
            let rank = x.shape.len();
            let mut swap: Vec<usize> = (0..rank).collect();
            swap.swap(rank - 2, rank - 1);
            let turned = |v: &Value, op: &MatrixOp| match op {
                MatrixOp::None => v.clone(),
                MatrixOp::Transpose => v.transposed(&swap),
            };
            let (a, b) = (turned(x, op_a), turned(&inputs[1], op_b));
            let mut shape = broadcast(&a.shape[..rank - 2], &b.shape[..rank - 2]);
            shape.extend([a.shape[rank - 2], b.shape[rank - 1]]);
            Value::make(x.dtype, shape, |index| {
                let (mut i, mut j) = (index.clone(), index.clone());
                (0..a.shape[rank - 1])
                    .map(|p| {
                        i[rank - 1] = p;
                        j[rank - 2] = p;
                        a.spread(&i) * b.spread(&j)
                    })
                    .sum()
            })
        }
        LayerKind::Elementwise(op) => {
            let y = &inputs[1];
            let shape = broadcast(&x.shape, &y.shape);
            let float = is_float(x.dtype);
            let truth = |b: bool| f64::from(u8::from(b));
            let dtype = match op {
                Elementwise::Equal | Elementwise::Greater | Elementwise::Less => DType::Bool,
                _ => x.dtype,
            };
            Value::make(dtype, shape, |index| {
                let (a, b) = (x.spread(index), y.spread(index));
                match op {
                    Elementwise::Sum => a + b,
                    Elementwise::Sub => a - b,
                    Elementwise::Prod => a * b,
                    Elementwise::Div if float => a / b,
                    Elementwise::Div if b == 0.0 => 0.0,
                    Elementwise::Div => (a / b).trunc(),
                    Elementwise::Pow => a.powf(b),
                    Elementwise::Max if a.is_nan() || b.is_nan() => f64::NAN,
                    Elementwise::Max => a.max(b),
                    Elementwise::Min if a.is_nan() || b.is_nan() => f64::NAN,
                    Elementwise::Min => a.min(b),
                    Elementwise::FloorDiv if !float && b == 0.0 => 0.0,
                    Elementwise::FloorDiv => (a / b).floor(),
                    Elementwise::And => a * b,
                    Elementwise::Or => a.max(b),
                    Elementwise::Xor => (a + b) % 2.0,
                    Elementwise::Equal => truth(a == b),
                    Elementwise::Greater => truth(a > b),
                    Elementwise::Less => truth(a < b),
                }
            })
        }
        LayerKind::Unary(op) => {
            let dtype = if *op == UnaryOp::IsNan { DType::Bool } else { x.dtype };
            Value::make(dtype, x.shape.clone(), |index| {
                let a = x.at(index);
                match op {
                    UnaryOp::Abs => a.abs(),
                    UnaryOp::Ceil => a.ceil(),
                    UnaryOp::Cos => a.cos(),
                    UnaryOp::Erf => erf(a),
                    UnaryOp::Exp => a.exp(),
                    UnaryOp::Floor => a.floor(),
                    UnaryOp::IsNan => f64::from(u8::from(a.is_nan())),
                    UnaryOp::Log => a.ln(),
                    UnaryOp::Neg => -a,
                    UnaryOp::Not => 1.0 - a,
                    UnaryOp::RoundE4M3 => narrow(DType::F8E4M3Fn, a),
                    UnaryOp::RoundE5M2 => narrow(DType::F8E5M2, a),
                    UnaryOp::Recip => 1.0 / a,
                    UnaryOp::Round => a.round_ties_even(),
                    UnaryOp::Sign if a == 0.0 => 0.0,
                    UnaryOp::Sign => a.signum(),
                    UnaryOp::Sin => a.sin(),
                    UnaryOp::Sqrt => a.sqrt(),
                }
            })
        }
        LayerKind::Activation(op) => Value::make(x.dtype, x.shape.clone(), |index| {
            let a = x.at(index);
            match op {
                Activation::Relu => a.max(0.0),
                Activation::Sigmoid => 1.0 / (1.0 + (-a).exp()),
                Activation::Tanh => a.tanh(),
                Activation::GeluErf => 0.5 * a * (1.0 + erf(a / 2f64.sqrt())),
                Activation::GeluTanh => {
                    0.5 * a * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (a + 0.044715 * a.powi(3))).tanh())
                }
                Activation::Softplus => a.exp().ln_1p(),
            }
        }),
        LayerKind::Reduce { op, axes, keep_dims } => {
            let kept: Vec<usize> = (0..x.shape.len())
                .map(|a| if axes.contains(&a) { 1 } else { x.shape[a] })
                .collect();
            let inner: Vec<usize> = (0..x.shape.len())
                .map(|a| if axes.contains(&a) { x.shape[a] } else { 1 })
                .collect();
            let mut out = Value::make(x.dtype, kept, |index| {
                let values = indices(&inner).into_iter().map(|i| {
                    let at: Vec<usize> = i.iter().zip(index).map(|(a, b)| a + b).collect();
                    x.at(&at)
                });
                let count = inner.iter().product::<usize>() as f64;
                match op {
                    ReduceOp::Sum => values.sum(),
                    ReduceOp::Avg => values.sum::<f64>() / count,
                    ReduceOp::Prod => values.product(),
                    ReduceOp::Max => values.fold(f64::NEG_INFINITY, f64::max),
                    ReduceOp::Min => values.fold(f64::INFINITY, f64::min),
                }
            });
            if !keep_dims {
                out.shape = (0..x.shape.len())
                    .filter(|a| !axes.contains(a))
                    .map(|a| x.shape[a])
                    .collect();
            }
            out
        }
        LayerKind::Softmax { axis } => Value::make(x.dtype, x.shape.clone(), |index| {
            let row: Vec<f64> = (0..x.shape[*axis])
                .map(|i| {
                    let mut at = index.clone();
                    at[*axis] = i;
                    x.at(&at)
                })
                .collect();
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = row.iter().map(|v| (v - max).exp()).sum();
            (x.at(index) - max).exp() / sum
        }),
        LayerKind::Shuffle { first, reshape, second } => {
            let mut value = x.clone();
            if let Some(perm) = first {
                value = value.transposed(perm);
            }
            if let Some(shape) = reshape {
                value.shape = shape.iter().map(|d| d.as_const().unwrap() as usize).collect();
            }
            if let Some(perm) = second {
                value = value.transposed(perm);
            }
            value
        }
        LayerKind::Slice { start, size, stride } => {
            let shape = size.iter().map(|d| d.as_const().unwrap() as usize).collect();
            Value::make(x.dtype, shape, |index| {
                let at = |a: usize| (start[a] + stride[a] * index[a] as i64) as usize;
                x.at(&(0..index.len()).map(at).collect::<Vec<_>>())
            })
        }
        LayerKind::Concatenation { axis } => {
            let mut shape = x.shape.clone();
            shape[*axis] = inputs.iter().map(|v| v.shape[*axis]).sum();
            Value::make(x.dtype, shape, |index| {
                let mut at = index.clone();
                for part in inputs {
                    if at[*axis] < part.shape[*axis] {
                        return part.at(&at);
                    }
                    at[*axis] -= part.shape[*axis];
                }
                unreachable!()
            })
        }
        LayerKind::Gather { axis } => {
            let which = &inputs[1];
            let n = which.shape.len();
            let shape = [&x.shape[..*axis], &which.shape, &x.shape[axis + 1..]].concat();
            Value::make(x.dtype, shape, |index| {
                let i = which.at(&index[*axis..axis + n]) as usize;
                x.at(&[&index[..*axis], &[i], &index[axis + n..]].concat())
            })
        }
        LayerKind::Select => {
            let shape = broadcast(&broadcast(&x.shape, &inputs[1].shape), &inputs[2].shape);
            Value::make(inputs[1].dtype, shape, |index| {
                let chosen = if x.spread(index) != 0.0 { &inputs[1] } else { &inputs[2] };
                chosen.spread(index)
            })
        }
        LayerKind::Cast { to } => Value::make(*to, x.shape.clone(), |index| {
            let a = x.at(index);
            match to {
                DType::Bool => f64::from(u8::from(a != 0.0)),
                to if is_float(*to) => a,
                _ => a.trunc(),
            }
        }),
        LayerKind::Normalization { axes, epsilon } => {
            let mean = evaluate(&reduce_avg(axes), std::slice::from_ref(x));
            let centered = Value::make(x.dtype, x.shape.clone(), |i| x.at(i) - mean.spread(i));
            let squares = Value::make(x.dtype, x.shape.clone(), |i| centered.at(i).powi(2));
            let variance = evaluate(&reduce_avg(axes), &[squares]);
            Value::make(x.dtype, x.shape.clone(), |i| {
                centered.at(i) / (variance.spread(i) + f64::from(*epsilon)).sqrt() * inputs[1].spread(i)
                    + inputs[2].spread(i)
            })
        }
        LayerKind::RotaryEmbedding {
            interleaved,
            rotary_dim,
        } => {
            let half = rotary_dim / 2;
            Value::make(x.dtype, x.shape.clone(), |index| {
                let d = index[3];
                if d >= *rotary_dim {
                    return x.at(index);
                }
                let (pair, second) = if *interleaved {
                    (d / 2, d % 2 == 1)
                } else {
                    (d % half, d >= half)
                };
                let position = inputs[3].at(&[index[0], index[2]]) as usize;
                let (c, s) = (inputs[1].at(&[position, pair]), inputs[2].at(&[position, pair]));
                let other = |second: bool| match (interleaved, second) {
                    (true, false) => 2 * pair,
                    (true, true) => 2 * pair + 1,
                    (false, false) => pair,
                    (false, true) => pair + half,
                };
                let at = |d: usize| x.at(&[index[0], index[1], index[2], d]);
                let (a, b) = (at(other(false)), at(other(true)));
                if second { a * s + b * c } else { a * c - b * s }
            })
        }
        LayerKind::Attention => {
            let (k, v) = (&inputs[1], &inputs[2]);
            let group = x.shape[1] / k.shape[1];
            let mut weights: Vec<f64> = Vec::new();
            Value::make(x.dtype, x.shape.clone(), |index| {
                let [b, h, t, d] = index[..] else { unreachable!() };
                let mixed = |weights: &[f64]| {
                    let terms = weights.iter().enumerate();
                    terms.map(|(s, w)| w * v.at(&[b, h / group, s, d])).sum::<f64>()
                };
                // The weights are those of the whole row, found at its first element.
                if d > 0 {
                    return mixed(&weights);
                }
                let scores: Vec<f64> = (0..k.shape[2])
                    .map(|s| {
                        let dot: f64 = (0..x.shape[3])
                            .map(|e| x.at(&[b, h, t, e]) * k.at(&[b, h / group, s, e]))
                            .sum();
                        match inputs.get(3) {
                            None => dot,
                            Some(mask) if mask.dtype == DType::Bool => {
                                if mask.spread(&[b, h, t, s]) != 0.0 {
                                    dot
                                } else {
                                    f64::NEG_INFINITY
                                }
                            }
                            Some(mask) => dot + mask.spread(&[b, h, t, s]),
                        }
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let base = if max == f64::NEG_INFINITY { 0.0 } else { max };
                let sum: f64 = scores.iter().map(|s| (s - base).exp()).sum();
                weights = scores
                    .iter()
                    .map(|s| if sum == 0.0 { 0.0 } else { (s - base).exp() / sum })
                    .collect();
                mixed(&weights)
            })
        }
        LayerKind::KvCacheUpdate => {
            let (update, first) = (&inputs[1], &inputs[2]);
            Value::make(x.dtype, x.shape.clone(), |index| {
                let [b, h, s, d] = index[..] else { unreachable!() };
                let first = first.at(&[b]) as usize;
                match s.checked_sub(first) {
                    Some(t) if t < update.shape[2] => update.at(&[b, h, t, d]),
                    _ => x.at(index),
                }
            })
        }
        LayerKind::TopK { k, part } => {
            let (dtype, n) = match part {
                Greatest::Values => (x.dtype, x.shape.len() - 1),
                Greatest::Indices => (DType::I32, x.shape.len() - 1),
            };
            let mut shape = x.shape.clone();
            shape[n] = *k;
            Value::make(dtype, shape, |index| {
                let of = |i: usize| x.at(&[&index[..n], &[i]].concat());
                let mut order: Vec<usize> = (0..x.shape[n]).collect();
                order.sort_by(|a, b| of(*b).total_cmp(&of(*a)));
                match part {
                    Greatest::Values => of(order[index[n]]),
                    Greatest::Indices => order[index[n]] as f64,
                }
            })
        }
        LayerKind::Experts { experts, gating } => {
            let of = ExpertInputs::of(&inputs.iter().collect::<Vec<_>>()).expect("as many inputs as it takes");
            mixture(*experts, gating, &of)
        }
        LayerKind::Dequantize(_) => panic!("its codes are no values: see quantized_layers"),
        LayerKind::RowProduct(_) | LayerKind::DecodeAttention(_) => panic!("see kernel_layers"),
        LayerKind::Fill { .. } | LayerKind::Weight(_) | LayerKind::Constant(_) => panic!("{kind:?} has no inputs"),
    }
}

/// Token by token, expert by expert.
fn mixture(experts: usize, gating: &Gating, of: &ExpertInputs<&Value>) -> Value {
    let (hidden, out) = (of.gate.shape[0] / experts, of.down.shape[0] / experts);
    let last = of.x.shape.len() - 1;
    let mut shape = of.x.shape.clone();
    shape[last] = out;
    let product = |matrix: &Value, bias: Option<&Value>, row: usize, x: &[f64]| {
        let sum: f64 = x.iter().enumerate().map(|(i, x)| matrix.at(&[row, i]) * x).sum();
        sum + bias.map_or(0.0, |bias| bias.at(&[row]))
    };
    let (of_gate, of_up, of_down) = match of.biases {
        Some((gate, up, down)) => (Some(gate), up, Some(down)),
        None => (None, None, None),
    };
    let bound = |x: f64, low: f64| match gating.limit > 0.0 {
        true => x.clamp(low, f64::from(gating.limit)),
        false => x,
    };
    let active = |x: f64| match gating.activation {
        ExpertActivation::Swish => x / (1.0 + (-f64::from(gating.alpha) * x).exp()),
        ExpertActivation::Relu => x.max(0.0),
        ExpertActivation::ReluSquared => x.max(0.0).powi(2),
        // The tanh form for both: they differ by at most 4e-4.
        ExpertActivation::Gelu | ExpertActivation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
    };
    // The rows of a token, found at its first element.
    let mut rows: Vec<f64> = Vec::new();
    Value::make(of.x.dtype, shape, |index| {
        let token = |value: &Value, i: usize| value.at(&[&index[..last], &[i]].concat());
        if index[last] == 0 {
            let x: Vec<f64> = (0..of.x.shape[last]).map(|i| token(of.x, i)).collect();
            rows = vec![0.0; out];
            for i in 0..of.experts.shape[last] {
                let (expert, weight) = (token(of.experts, i) as usize, token(of.weights, i));
                let inner: Vec<f64> = (expert * hidden..(expert + 1) * hidden)
                    .map(|row| {
                        let gate = active(bound(product(of.gate, of_gate, row, &x), f64::NEG_INFINITY));
                        match of.up {
                            Some(up) => {
                                let up = bound(product(up, of_up, row, &x), -f64::from(gating.limit));
                                gate * (up + f64::from(gating.beta))
                            }
                            None => gate,
                        }
                    })
                    .collect();
                for (column, sum) in rows.iter_mut().enumerate() {
                    *sum += weight * product(of.down, of_down, expert * out + column, &inner);
                }
            }
        }
        rows[index[last]]
    })
}

fn reduce_avg(axes: &[usize]) -> LayerKind {
    LayerKind::Reduce {
        op: ReduceOp::Avg,
        axes: axes.to_vec(),
        keep_dims: true,
    }
}
