//! ONNX's own operators: the opset-24 form of each node of opset 11 to 25, where the table of operators (`graph::op`) does
//! not define it. Differences of opsets before 14 are in `older`.

use super::{Failure, Replacement, SourceNode};
use crate::graph::ValueId;
use crate::graph::op::{AttributeSource, Binary, Op};
use crate::tensor::{DType, Tensor};

impl SourceNode<'_> {
    pub(super) fn standard_operator(&self) -> Result<Replacement, Failure> {
        if let Some(replacement) = self.older_meaning()? {
            return Ok(replacement);
        }
        match self.op_type {
            "Mod" => return self.modulo(),
            "Max" => return self.chain(Binary::Max, false),
            "Min" => return self.chain(Binary::Min, false),
            "Sum" => return self.chain(Binary::Add, false),
            "Mean" => return self.chain(Binary::Add, true),
            "Constant" => return self.constant(),
            "DequantizeLinear" => return self.dequantize_linear(),
            "QuantizeLinear" => return self.quantize_linear(),
            "QLinearMatMul" => return self.q_linear_mat_mul(),
            "Dropout" => return self.dropout(),
            "Einsum" => return self.einsum(),
            "Split" => self.check_split()?,
            "Attention" => {
                self.pass_over_scores();
                // Of opset 25: bounds of a window, -1 where there is none.
                for name in ["left_window_size", "right_window_size"] {
                    if self.attributes.is_int(name, -1) {
                        self.attributes.ignore(&[name]);
                    }
                }
            }
            // Operators that ONNX Runtime's optimizer writes into the standard domain.
            "SimplifiedLayerNormalization" => return self.read_as("", "RMSNormalization"),
            _ => {}
        }
        let Some(op) = Op::read("", self.op_type, self)? else {
            return Ok(Replacement::Unknown(None));
        };
        Ok(match self.listed(&op)? {
            Some((name, list)) => Replacement::WithList(op, name, list),
            None => Replacement::Op(op),
        })
    }

    /// Another spelling of a known operator, with the same attributes.
    pub(super) fn read_as(&self, domain: &str, op_type: &str) -> Result<Replacement, Failure> {
        Ok(match Op::read(domain, op_type, self)? {
            Some(op) => Replacement::Op(op),
            None => Replacement::Unknown(None),
        })
    }

    fn check_split(&self) -> Result<(), Failure> {
        let (count, found) = (self.attributes.count("num_outputs")?, self.outputs.len());
        match count {
            Some(count) if count != found => Err(format!("num_outputs is {count}, but it has {found} outputs").into()),
            _ => Ok(()),
        }
    }

    /// `qk_matmul_output_mode` selects the content of output 3: without effect if that is omitted or the mode is 0.
    fn pass_over_scores(&self) {
        if self.outputs.get(3).copied().flatten().is_none() {
            self.attributes.ignore(&["qk_matmul_output_mode"]);
        }
        self.expect_zero(&["qk_matmul_output_mode"]);
    }

    fn modulo(&self) -> Result<Replacement, Failure> {
        if !self.attributes.flag("fmod", false)? {
            return Ok(Replacement::Op(Op::Binary(Binary::Mod)));
        }
        // fmod on integers takes the sign of the dividend; our `Mod` does so only for floats.
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

    fn constant(&self) -> Result<Replacement, Failure> {
        let a = &self.attributes;
        if let Some(tensor) = self.tensor("value")? {
            return Ok(Replacement::Constant(tensor.into()));
        }
        if let Some(value) = a.float("value_float")? {
            return Ok(Replacement::Constant(Tensor::from_f32(vec![], &[value]).into()));
        }
        if let Some(value) = a.int("value_int")? {
            return Ok(Replacement::Constant(Tensor::from_i64(vec![], &[value]).into()));
        }
        if let Some(values) = a.floats("value_floats") {
            return Ok(Replacement::Constant(
                Tensor::from_f32(vec![values.len()], &values).into(),
            ));
        }
        if let Some(values) = a.ints("value_ints")? {
            return Ok(Replacement::Constant(
                Tensor::from_i64(vec![values.len()], &values).into(),
            ));
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

    /// Attributes that change the meaning unless they are 0 stay unread, and are therefore reported, unless they are 0.
    pub(super) fn expect_zero(&self, names: &[&str]) {
        for name in names {
            if self.attributes.is_zero(name) {
                self.attributes.ignore(&[name]);
            }
        }
    }
}
