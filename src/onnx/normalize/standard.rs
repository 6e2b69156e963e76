//! ONNX's own operators: what each node of opset 14 to 24 is in opset 24.

use super::{Failure, Replacement, SourceNode};
use crate::graph::ValueId;
use crate::graph::op::{Attention, Binary, Op, Reduction, ScatterMode, Unary};
use crate::onnx::tensor::{code_name, dtype_of};
use crate::tensor::{DType, Tensor};

impl SourceNode<'_> {
    pub(super) fn plan_onnx(&self) -> Result<Replacement, Failure> {
        if let Some(op) = unary(self.op_type) {
            return Ok(Replacement::Op(Op::Unary(op)));
        }
        if let Some(op) = binary(self.op_type) {
            return Ok(Replacement::Op(Op::Binary(op)));
        }
        let a = &self.attributes;
        Ok(Replacement::Op(match self.op_type {
            "Mod" => return self.modulo(),
            "Max" => return self.chain(Binary::Max, false),
            "Min" => return self.chain(Binary::Min, false),
            "Sum" => return self.chain(Binary::Add, false),
            "Mean" => return self.chain(Binary::Add, true),
            "ReduceMean" => return self.reduce(Reduction::Mean),
            "ReduceSum" => return self.reduce(Reduction::Sum),
            "ReduceMax" => return self.reduce(Reduction::Max),
            "ReduceMin" => return self.reduce(Reduction::Min),
            "ReduceProd" => return self.reduce(Reduction::Prod),
            "ReduceSumSquare" => return self.reduce(Reduction::SumSquare),
            "Constant" => return self.constant(),
            "Dropout" => return self.dropout(),
            "Gelu" => match a.string_or("approximate", "none")?.as_str() {
                "none" => Op::Gelu { tanh: false },
                "tanh" => Op::Gelu { tanh: true },
                other => return Ok(Replacement::Unknown(Some(format!("approximate={other}")))),
            },
            "Swish" => Op::Swish {
                alpha: a.float_or("alpha", 1.0)?,
            },
            "Clip" => Op::Clip,
            "Identity" => Op::Identity,
            "Cast" => {
                // They matter for float8 only.
                a.ignore(&["saturate", "round_mode"]);
                let code = a.int("to")?.ok_or("its attribute \"to\" is missing")?;
                let code = i32::try_from(code).unwrap_or(-1);
                match dtype_of(code) {
                    Some(to) => Op::Cast { to },
                    None => return Ok(Replacement::Unknown(Some(format!("to={}", code_name(code))))),
                }
            }
            "CastLike" => {
                a.ignore(&["saturate", "round_mode"]);
                Op::CastLike
            }
            "Where" => Op::Where,
            "MatMul" => Op::MatMul,
            "Gemm" => Op::Gemm {
                alpha: a.float_or("alpha", 1.0)?,
                beta: a.float_or("beta", 1.0)?,
                trans_a: a.flag("transA", false)?,
                trans_b: a.flag("transB", false)?,
            },
            "Softmax" => Op::Softmax {
                axis: a.int_or("axis", -1)?,
            },
            "LogSoftmax" => Op::LogSoftmax {
                axis: a.int_or("axis", -1)?,
            },
            "CumSum" => Op::CumSum {
                exclusive: a.flag("exclusive", false)?,
                reverse: a.flag("reverse", false)?,
            },
            "Shape" => Op::Shape {
                start: a.int_or("start", 0)?,
                end: a.int("end")?,
            },
            "Size" => Op::Size,
            "Reshape" => Op::Reshape {
                allowzero: a.flag("allowzero", false)?,
            },
            "Transpose" => Op::Transpose {
                perm: self.permutation()?,
            },
            "Squeeze" => Op::Squeeze,
            "Unsqueeze" => Op::Unsqueeze,
            "Flatten" => Op::Flatten {
                axis: a.int_or("axis", 1)?,
            },
            "Expand" => Op::Expand,
            "Tile" => Op::Tile,
            "Concat" => Op::Concat {
                axis: a.int("axis")?.ok_or("its attribute \"axis\" is missing")?,
            },
            "Split" => {
                if let Some(count) = a.count("num_outputs")?
                    && count != self.outputs.len()
                {
                    let found = self.outputs.len();
                    return Err(format!("num_outputs is {count}, but it has {found} outputs").into());
                }
                Op::Split {
                    axis: a.int_or("axis", 0)?,
                }
            }
            "Slice" => Op::Slice,
            "Gather" => Op::Gather {
                axis: a.int_or("axis", 0)?,
            },
            "GatherElements" => Op::GatherElements {
                axis: a.int_or("axis", 0)?,
            },
            "GatherND" => Op::GatherNd {
                batch_dims: a.count("batch_dims")?.unwrap_or(0),
            },
            "Range" => Op::Range,
            "ConstantOfShape" => Op::ConstantOfShape {
                value: match self.tensor("value")? {
                    Some(value) if value.len() == 1 => value,
                    Some(value) => return Err(format!("its value has {} elements, not one", value.len()).into()),
                    None => Tensor::from_f32(vec![1], &[0.0]),
                },
            },
            "Trilu" => Op::Trilu {
                upper: a.flag("upper", true)?,
            },
            "ScatterND" => match self.scatter_mode()? {
                Ok(mode) => Op::ScatterNd { mode },
                Err(unknown) => return Ok(unknown),
            },
            "ScatterElements" => match self.scatter_mode()? {
                Ok(mode) => Op::ScatterElements {
                    axis: a.int_or("axis", 0)?,
                    mode,
                },
                Err(unknown) => return Ok(unknown),
            },
            "TensorScatter" => Op::TensorScatter {
                axis: a.int_or("axis", -2)?,
                circular: match a.string_or("mode", "linear")?.as_str() {
                    "linear" => false,
                    "circular" => true,
                    other => return Ok(Replacement::Unknown(Some(format!("mode={other}")))),
                },
            },
            "LayerNormalization" => {
                a.ignore(&["stash_type"]);
                Op::LayerNormalization {
                    axis: a.int_or("axis", -1)?,
                    epsilon: a.float_or("epsilon", 1e-5)?,
                }
            }
            // The second is what ONNX Runtime's optimizer writes into the standard domain.
            "RMSNormalization" | "SimplifiedLayerNormalization" => self.rms_normalization()?,
            "RotaryEmbedding" => Op::RotaryEmbedding {
                interleaved: a.flag("interleaved", false)?,
                num_heads: a.count("num_heads")?,
                rotary_dim: a.count("rotary_embedding_dim")?.unwrap_or(0),
            },
            "Attention" => return self.attention(),
            _ => return Ok(Replacement::Unknown(None)),
        }))
    }

    fn tensor(&self, name: &str) -> Result<Option<Tensor>, Failure> {
        let Some(proto) = self.attributes.tensor(name)? else {
            return Ok(None);
        };
        let tensor = self.folder.tensor(proto, &self.name).map_err(Failure::Tensor)?;
        Ok(Some(tensor))
    }

    fn modulo(&self) -> Result<Replacement, Failure> {
        if !self.attributes.flag("fmod", false)? {
            return Ok(Replacement::Op(Op::Binary(Binary::Mod)));
        }
        // fmod on integers takes the sign of the dividend; our `Mod` does so for floats alone.
        let float = |v: &Option<ValueId>| v.and_then(|v| self.graph.value(v).dtype).is_some_and(DType::is_float);
        Ok(if self.inputs.iter().any(float) {
            Replacement::Op(Op::Binary(Binary::Mod))
        } else {
            Replacement::Unknown(Some("fmod=1".to_string()))
        })
    }

    fn chain(&self, op: Binary, mean: bool) -> Result<Replacement, Failure> {
        match self.inputs.len() {
            0 => Err("it has no inputs".into()),
            1 => Ok(Replacement::Pass),
            _ if self.outputs.is_empty() => Err("it has no output".into()),
            _ => Ok(Replacement::Chain(op, mean)),
        }
    }

    fn reduce(&self, reduction: Reduction) -> Result<Replacement, Failure> {
        let op = Op::Reduce {
            reduction,
            keepdims: self.attributes.flag("keepdims", true)?,
            noop_with_empty_axes: self.attributes.flag("noop_with_empty_axes", false)?,
        };
        // An input since opset 18; of ReduceSum since 13.
        if self.opset < 18
            && reduction != Reduction::Sum
            && let Some(axes) = self.attributes.ints("axes")?
        {
            return Ok(Replacement::WithList(op, axes));
        }
        Ok(Replacement::Op(op))
    }

    fn constant(&self) -> Result<Replacement, Failure> {
        let a = &self.attributes;
        if let Some(tensor) = self.tensor("value")? {
            return Ok(Replacement::Constant(tensor));
        }
        if let Some(value) = a.float("value_float")? {
            return Ok(Replacement::Constant(Tensor::from_f32(vec![], &[value])));
        }
        if let Some(value) = a.int("value_int")? {
            return Ok(Replacement::Constant(Tensor::from_i64(vec![], &[value])));
        }
        if let Some(values) = a.floats("value_floats") {
            return Ok(Replacement::Constant(Tensor::from_f32(vec![values.len()], &values)));
        }
        if let Some(values) = a.ints("value_ints")? {
            return Ok(Replacement::Constant(Tensor::from_i64(vec![values.len()], &values)));
        }
        match a.left_over() {
            Some(form) => Ok(Replacement::Unknown(Some(form))),
            None => Err("it has no value".into()),
        }
    }

    fn dropout(&self) -> Result<Replacement, Failure> {
        self.attributes.ignore(&["seed"]);
        let training = self.inputs.get(2).copied().flatten();
        let inference = training.is_none_or(|v| {
            let tensor = self.graph.constant(v).and_then(|c| c.materialize().ok());
            tensor.and_then(|t| t.scalar()) == Some(0.0)
        });
        Ok(match (inference, self.inputs.is_empty()) {
            (_, true) => return Err("it has no inputs".into()),
            (true, _) => Replacement::Pass,
            (false, _) => Replacement::Unknown(Some("training_mode".to_string())),
        })
    }

    fn permutation(&self) -> Result<Option<Vec<usize>>, Failure> {
        let Some(perm) = self.attributes.ints("perm")? else {
            return Ok(None);
        };
        let mut seen = vec![false; perm.len()];
        for axis in &perm {
            match usize::try_from(*axis).ok().and_then(|i| seen.get_mut(i)) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(format!("perm {perm:?} is not a permutation").into()),
            }
        }
        Ok(Some(perm.iter().map(|p| *p as usize).collect()))
    }

    fn scatter_mode(&self) -> Result<Result<ScatterMode, Replacement>, Failure> {
        Ok(Ok(match self.attributes.string_or("reduction", "none")?.as_str() {
            "none" => ScatterMode::Replace,
            "add" => ScatterMode::Add,
            "mul" => ScatterMode::Mul,
            "max" => ScatterMode::Max,
            "min" => ScatterMode::Min,
            other => return Ok(Err(Replacement::Unknown(Some(format!("reduction={other}"))))),
        }))
    }

    pub(super) fn rms_normalization(&self) -> Result<Op, Failure> {
        self.attributes.ignore(&["stash_type"]);
        Ok(Op::RmsNormalization {
            axis: self.attributes.int_or("axis", -1)?,
            epsilon: self.attributes.float_or("epsilon", 1e-5)?,
        })
    }

    /// Attributes that change the meaning unless 0 are left over, and so reported, unless they are 0.
    pub(super) fn expect_zero(&self, names: &[&str]) -> Result<(), Failure> {
        for name in names {
            if self.attributes.is_zero(name) {
                self.attributes.ignore(&[name]);
            }
        }
        Ok(())
    }

    fn attention(&self) -> Result<Replacement, Failure> {
        let a = &self.attributes;
        // It says what output 3 holds.
        if self.outputs.get(3).copied().flatten().is_none() {
            a.ignore(&["qk_matmul_output_mode"]);
        }
        self.expect_zero(&["qk_matmul_output_mode"])?;
        let softmax_precision = match a.int("softmax_precision")? {
            None | Some(0) => None,
            Some(code) => match i32::try_from(code).ok().and_then(dtype_of) {
                Some(dtype) if dtype.is_float() => Some(dtype),
                _ => return Err(format!("its softmax_precision is {code}, which is no float type").into()),
            },
        };
        Ok(Replacement::Op(Op::Attention(Attention {
            is_causal: a.flag("is_causal", false)?,
            scale: a.float("scale")?,
            softcap: a.float_or("softcap", 0.0)?,
            q_num_heads: a.count("q_num_heads")?,
            kv_num_heads: a.count("kv_num_heads")?,
            softmax_precision,
        })))
    }
}

fn unary(op_type: &str) -> Option<Unary> {
    Some(match op_type {
        "Abs" => Unary::Abs,
        "Ceil" => Unary::Ceil,
        "Cos" => Unary::Cos,
        "Erf" => Unary::Erf,
        "Exp" => Unary::Exp,
        "Floor" => Unary::Floor,
        "IsNaN" => Unary::IsNan,
        "Log" => Unary::Log,
        "Neg" => Unary::Neg,
        "Not" => Unary::Not,
        "Reciprocal" => Unary::Reciprocal,
        "Relu" => Unary::Relu,
        "Round" => Unary::Round,
        "Sigmoid" => Unary::Sigmoid,
        "Sign" => Unary::Sign,
        "Sin" => Unary::Sin,
        "Softplus" => Unary::Softplus,
        "Sqrt" => Unary::Sqrt,
        "Tanh" => Unary::Tanh,
        _ => return None,
    })
}

fn binary(op_type: &str) -> Option<Binary> {
    Some(match op_type {
        "Add" => Binary::Add,
        "Sub" => Binary::Sub,
        "Mul" => Binary::Mul,
        "Div" => Binary::Div,
        "Pow" => Binary::Pow,
        "And" => Binary::And,
        "Or" => Binary::Or,
        "Xor" => Binary::Xor,
        "Equal" => Binary::Equal,
        "Less" => Binary::Less,
        "LessOrEqual" => Binary::LessOrEqual,
        "Greater" => Binary::Greater,
        "GreaterOrEqual" => Binary::GreaterOrEqual,
        _ => return None,
    })
}
