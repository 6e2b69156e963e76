//! Runs a network through the graph's evaluator: each layer as the ONNX operators that TensorRT documents it by.
//!
//! Slow, but independent of both back ends: the lowering is checked with the semantics of the original graph, even if
//! the CPU executor shares an error with the lowering.

use std::collections::BTreeMap;

use lapidary::dim::{Dim, Sym};
use lapidary::graph::eval::eval_op;
use lapidary::graph::op::{self, Binary, Op, Reduction, Unary};
use lapidary::network::{
    Activation, Elementwise, ExpertInputs, Greatest, Layer, LayerKind, MatrixOp, Network, ReduceOp, TensorId, UnaryOp,
};
use lapidary::tensor::{DType, Tensor};

/// Every output by name. Inputs by name, in the network's dtypes.
pub fn interpret(network: &Network, inputs: &BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    if network.has_kernel_layers() {
        return interpret(&network.expanded().expect("verified"), inputs);
    }
    let tokens = inputs.get("input_ids").map_or(1, |ids| ids.shape()[1]);
    let mut values: Vec<Option<Tensor>> = vec![None; network.tensors.len()];
    for id in &network.inputs {
        let tensor = &inputs[&network.tensor(*id).name];
        assert_eq!(tensor.dtype(), network.tensor(*id).dtype);
        values[id.0 as usize] = Some(tensor.clone());
    }
    for layer in &network.layers {
        let read = |id: &TensorId| values[id.0 as usize].clone().expect("layers are in order");
        let inputs: Vec<Tensor> = layer.inputs.iter().map(read).collect();
        let output = network.tensor(layer.outputs[0]);
        let result = run(network, layer, output.dtype, &inputs, tokens);
        let shape: Vec<usize> = output.shape.iter().map(|d| size(d, tokens)).collect();
        assert_eq!(
            (result.dtype(), result.shape()),
            (output.dtype, &shape[..]),
            "layer {}",
            layer.name
        );
        values[layer.outputs[0].0 as usize] = Some(result);
    }
    let outputs = network.outputs.iter();
    let named = outputs.map(|id| (network.tensor(*id).name.clone(), values[id.0 as usize].clone().unwrap()));
    named.collect()
}

fn size(dim: &Dim, tokens: usize) -> usize {
    dim.eval(&[(Sym::tokens(), tokens as i64)].into())
        .expect("only tokens are open") as usize
}

fn one(op: Op, inputs: &[&Tensor]) -> Tensor {
    let inputs: Vec<Option<Tensor>> = inputs.iter().map(|t| Some((*t).clone())).collect();
    let outputs = eval_op(&op, &inputs).unwrap_or_else(|e| panic!("{op:?} of {inputs:?}: {e}"));
    outputs[0].clone().expect("a first output")
}

fn vector(values: &[i64]) -> Tensor {
    Tensor::from_i64(vec![values.len()], values)
}

fn transpose(x: &Tensor, order: &[usize]) -> Tensor {
    one(
        Op::Transpose {
            perm: Some(order.to_vec()),
        },
        &[x],
    )
}

fn reshape(x: &Tensor, to: &[usize]) -> Tensor {
    x.reshaped(to.to_vec()).expect("an equal volume")
}

fn swapped(x: &Tensor, op: MatrixOp) -> Tensor {
    let mut order: Vec<usize> = (0..x.shape().len()).collect();
    let rank = order.len();
    match op {
        MatrixOp::None => x.clone(),
        MatrixOp::Transpose => {
            order.swap(rank - 1, rank - 2);
            transpose(x, &order)
        }
    }
}

fn run(network: &Network, layer: &Layer, dtype: DType, inputs: &[Tensor], tokens: usize) -> Tensor {
    let x = || &inputs[0];
    let all: Vec<&Tensor> = inputs.iter().collect();
    match &layer.kind {
        LayerKind::Weight(id) => network.weight(*id).constant.materialize().expect("weights at hand"),
        LayerKind::Constant(tensor) => tensor.clone(),
        LayerKind::MatrixMultiply { op_a, op_b } => {
            one(Op::MatMul, &[&swapped(x(), *op_a), &swapped(&inputs[1], *op_b)])
        }
        LayerKind::Elementwise(op) => elementwise(*op, &all),
        LayerKind::Unary(op) => one(unary(*op), &[x()]),
        LayerKind::Activation(op) => {
            let op = match op {
                Activation::Relu => Op::Unary(Unary::Relu),
                Activation::Sigmoid => Op::Unary(Unary::Sigmoid),
                Activation::Tanh => Op::Unary(Unary::Tanh),
                Activation::Softplus => Op::Unary(Unary::Softplus),
                Activation::GeluErf => Op::Gelu { tanh: false },
                Activation::GeluTanh => Op::Gelu { tanh: true },
            };
            one(op, &[x()])
        }
        LayerKind::Reduce { op, axes, keep_dims } => {
            let reduction = match op {
                ReduceOp::Sum => Reduction::Sum,
                ReduceOp::Prod => Reduction::Prod,
                ReduceOp::Max => Reduction::Max,
                ReduceOp::Min => Reduction::Min,
                ReduceOp::Avg => Reduction::Mean,
            };
            let op = Op::Reduce {
                reduction,
                keepdims: *keep_dims,
                noop_with_empty_axes: false,
            };
            let axes: Vec<i64> = axes.iter().map(|a| *a as i64).collect();
            one(op, &[x(), &vector(&axes)])
        }
        LayerKind::Softmax { axis } => one(Op::Softmax { axis: *axis as i64 }, &[x()]),
        LayerKind::Shuffle {
            first,
            reshape: to,
            second,
        } => {
            let mut y = x().clone();
            if let Some(order) = first {
                y = transpose(&y, order);
            }
            if let Some(to) = to {
                y = reshape(&y, &to.iter().map(|d| size(d, tokens)).collect::<Vec<_>>());
            }
            match second {
                Some(order) => transpose(&y, order),
                None => y,
            }
        }
        LayerKind::Slice {
            start,
            size: sizes,
            stride,
        } => {
            // By indices on each axis: ONNX has no stride of 0.
            let mut y = x().clone();
            for (axis, ((start, length), stride)) in start.iter().zip(sizes).zip(stride).enumerate() {
                let picks: Vec<i64> = (0..size(length, tokens) as i64).map(|i| start + stride * i).collect();
                assert!(
                    picks.iter().all(|i| (0..y.shape()[axis] as i64).contains(i)),
                    "{}",
                    layer.name
                );
                y = one(Op::Gather { axis: axis as i64 }, &[&y, &vector(&picks)]);
            }
            y
        }
        LayerKind::Concatenation { axis } => one(Op::Concat { axis: *axis as i64 }, &all),
        LayerKind::Gather { axis } => one(Op::Gather { axis: *axis as i64 }, &all),
        LayerKind::Select => one(Op::Where, &all),
        LayerKind::Cast { to } => one(Op::Cast { to: *to }, &[x()]),
        LayerKind::Fill { length, start, step } => {
            let values: Vec<f64> = (0..size(length, tokens)).map(|i| start + step * i as f64).collect();
            match dtype {
                DType::I32 => Tensor::from_i32(
                    vec![values.len()],
                    &values.iter().map(|v| *v as i32).collect::<Vec<_>>(),
                ),
                _ => Tensor::from_f64_as(dtype, vec![values.len()], &values),
            }
        }
        LayerKind::Normalization { axes, epsilon } => {
            let op = Op::LayerNormalization {
                axis: axes[0] as i64,
                epsilon: *epsilon,
            };
            let flat = |t: &Tensor| reshape(t, &t.shape()[axes[0]..]);
            one(op, &[x(), &flat(&inputs[1]), &flat(&inputs[2])])
        }
        LayerKind::RotaryEmbedding {
            interleaved,
            rotary_dim,
        } => {
            let op = Op::RotaryEmbedding {
                interleaved: *interleaved,
                num_heads: None,
                rotary_dim: *rotary_dim,
            };
            one(
                op,
                &[
                    x(),
                    &inputs[1],
                    &inputs[2],
                    &one(Op::Cast { to: DType::I64 }, &[&inputs[3]]),
                ],
            )
        }
        LayerKind::Attention => {
            let op = Op::Attention(op::Attention {
                is_causal: false,
                scale: Some(1.0),
                softcap: 0.0,
                q_num_heads: None,
                kv_num_heads: None,
                softmax_precision: None,
            });
            one(op, &all)
        }
        LayerKind::TopK { k, part } => {
            let op = Op::TopK {
                axis: -1,
                largest: true,
                sorted: true,
            };
            let results = eval_op(&op, &[Some(x().clone()), Some(vector(&[*k as i64]))]).unwrap();
            match part {
                Greatest::Values => results[0].clone().unwrap(),
                Greatest::Indices => one(Op::Cast { to: DType::I32 }, &[results[1].as_ref().unwrap()]),
            }
        }
        LayerKind::Experts { experts, gating } => {
            let of = ExpertInputs::of(&all).expect("as many inputs as it takes");
            let op = Op::Experts(op::Experts {
                experts: *experts,
                activation: gating.activation,
                alpha: gating.alpha,
                beta: gating.beta,
                limit: gating.limit,
            });
            let chosen = one(Op::Cast { to: DType::I64 }, &[of.experts]);
            let (a, b, c) = match of.biases {
                Some((a, b, c)) => (Some(a), b, Some(c)),
                None => (None, None, None),
            };
            let inputs = [
                Some(of.x),
                Some(of.weights),
                Some(&chosen),
                Some(of.gate),
                of.up,
                Some(of.down),
                a,
                b,
                c,
            ];
            let inputs: Vec<Option<Tensor>> = inputs.iter().map(|t| t.cloned()).collect();
            eval_op(&op, &inputs).unwrap().remove(0).unwrap()
        }
        LayerKind::Dequantize(granularity) => lapidary::tensor::quantized::dequantize(x(), all[1], None, *granularity),
        LayerKind::RowProduct(_) | LayerKind::DecodeAttention(_) => unreachable!("written out before"),
        LayerKind::KvCacheUpdate => {
            let op = Op::TensorScatter {
                axis: 2,
                circular: false,
            };
            let at = one(Op::Cast { to: DType::I64 }, &[&inputs[2]]);
            one(op, &[x(), &inputs[1], &at])
        }
    }
}

fn elementwise(op: Elementwise, inputs: &[&Tensor]) -> Tensor {
    let binary = match op {
        Elementwise::Sum => Binary::Add,
        Elementwise::Sub => Binary::Sub,
        Elementwise::Prod => Binary::Mul,
        Elementwise::Div => Binary::Div,
        Elementwise::Pow => Binary::Pow,
        Elementwise::Max => Binary::Max,
        Elementwise::Min => Binary::Min,
        Elementwise::And => Binary::And,
        Elementwise::Or => Binary::Or,
        Elementwise::Xor => Binary::Xor,
        Elementwise::Equal => Binary::Equal,
        Elementwise::Greater => Binary::Greater,
        Elementwise::Less => Binary::Less,
        Elementwise::FloorDiv => {
            let wide = |t: &Tensor| one(Op::Cast { to: DType::F64 }, &[t]);
            let quotient = one(Op::Binary(Binary::Div), &[&wide(inputs[0]), &wide(inputs[1])]);
            let floor = one(Op::Unary(Unary::Floor), &[&quotient]);
            return one(Op::Cast { to: inputs[0].dtype() }, &[&floor]);
        }
    };
    one(Op::Binary(binary), inputs)
}

fn unary(op: UnaryOp) -> Op {
    let round = |to| Op::RoundToCodes {
        to,
        scale: 1.0,
        zero_point: 0,
    };
    Op::Unary(match op {
        UnaryOp::RoundE4M3 => return round(DType::F8E4M3Fn),
        UnaryOp::RoundE5M2 => return round(DType::F8E5M2),
        UnaryOp::Abs => Unary::Abs,
        UnaryOp::Ceil => Unary::Ceil,
        UnaryOp::Cos => Unary::Cos,
        UnaryOp::Erf => Unary::Erf,
        UnaryOp::Exp => Unary::Exp,
        UnaryOp::Floor => Unary::Floor,
        UnaryOp::IsNan => Unary::IsNan,
        UnaryOp::Log => Unary::Log,
        UnaryOp::Neg => Unary::Neg,
        UnaryOp::Not => Unary::Not,
        UnaryOp::Recip => Unary::Reciprocal,
        UnaryOp::Round => Unary::Round,
        UnaryOp::Sign => Unary::Sign,
        UnaryOp::Sin => Unary::Sin,
        UnaryOp::Sqrt => Unary::Sqrt,
    })
}
