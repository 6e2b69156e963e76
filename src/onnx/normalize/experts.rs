//! ONNX Runtime's mixtures of experts, `MoE` and `QMoE`, as Lapidary's operators for routing and experts:
//! <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md>. Both take the softmax of all logits, and
//! divide the weights of the chosen experts by their sum where `normalize_routing_weights` is set.

use super::quantized::{code_type, of_shape, viewed};
use super::{Failure, Replacement, SourceNode};
use crate::graph::op::{AttributeSource, ChosenWeights, ExpertActivation, Experts, RouterScores, Routing};
use crate::graph::{Constant, ValueId};
use crate::tensor::quantized::Granularity;

/// The result for one node.
pub(super) struct ExpertNodes {
    /// `[.., hidden]`.
    pub x: Option<ValueId>,
    /// `[tokens, experts]`.
    pub logits: Option<ValueId>,
    pub routing: Routing,
    pub experts: Experts,
    /// Elements per token.
    pub hidden: usize,
    pub gate: Constant,
    pub up: Option<Constant>,
    pub down: Constant,
    /// Biases of gate, up and down.
    pub biases: [Option<Constant>; 3],
}

/// One layer of all experts, with their matrices `[out, in]` concatenated.
struct Layer {
    matrix: Constant,
    experts: usize,
    bias: Option<Constant>,
}

/// Indices of a layer's inputs.
struct Places {
    weight: usize,
    scales: Option<usize>,
    bias: usize,
    zero_points: Option<usize>,
}

impl SourceNode<'_> {
    /// `com.microsoft::MoE`.
    pub(super) fn mixture(&self) -> Result<Replacement, Failure> {
        let places = |weight: usize| Places {
            weight,
            scales: None,
            bias: weight + 1,
            zero_points: None,
        };
        let layer = |i| self.expert_layer(&places(i), 0, None);
        self.mixture_of([layer(2)?, layer(4)?, layer(6)?])
    }

    /// `com.microsoft::QMoE` with integer codes.
    pub(super) fn quantized_mixture(&self) -> Result<Replacement, Failure> {
        let a = &self.attributes;
        // The precision of a runtime's arithmetic.
        a.ignore(&["accuracy_level"]);
        if let Some(kind) = self.text("quant_type")?.filter(|kind| kind != "int") {
            return Ok(Replacement::Unknown(Some(format!("quant_type={kind}"))));
        }
        for (i, what) in [
            (14, "router_weights"),
            (15, "fc1_global_scale"),
            (16, "fc2_global_scale"),
        ] {
            if self.inputs.get(i).copied().flatten().is_some() {
                return Ok(Replacement::Unknown(Some(what.to_string())));
            }
        }
        let scales = self.constant_input(3).map(|scales| scales.dtype());
        match a.int("weights_prepacked")?.unwrap_or(-1) {
            0 => {}
            // Left to the execution provider. Those of CPUs and of WebGPU do not change codes; CUDA's, whose scales are
            // fp16, reorders them, and the file does not record it.
            -1 if scales.is_some_and(|dtype| dtype.is_half()) => {
                return Ok(Replacement::Unknown(Some(
                    "weights_prepacked=-1 with scales of 16 bits: codes may be in the order of a GPU's kernels"
                        .to_string(),
                )));
            }
            -1 => {}
            other => return Ok(Replacement::Unknown(Some(format!("weights_prepacked={other}")))),
        }
        let bits = a.count("expert_weight_bits")?.unwrap_or(4);
        let size = match a.int("block_size")?.unwrap_or(0) {
            size if size <= 0 => None,
            size => Some(size as usize),
        };
        let layer = |weight: usize, zeros: usize, width: &str| {
            let places = Places {
                weight,
                scales: Some(weight + 1),
                bias: weight + 2,
                zero_points: Some(zeros),
            };
            self.expert_layer(&places, a.count(width)?.unwrap_or(bits), size)
        };
        self.mixture_of([
            layer(2, 11, "fc1_expert_weight_bits")?,
            layer(5, 12, "fc2_expert_weight_bits")?,
            layer(8, 13, "fc3_expert_weight_bits")?,
        ])
    }

    /// One layer of all experts; `None` if the node has none there.
    fn expert_layer(&self, places: &Places, bits: usize, size: Option<usize>) -> Result<Option<Layer>, Failure> {
        let Some(weight) = self.optional_constant(places.weight, "weights of experts")? else {
            return Ok(None);
        };
        let [experts, rows, last] = *weight.shape() else {
            return Err(Failure::Problem(format!(
                "the weights of its experts have the shape {:?}, not [experts, out, in]",
                weight.shape()
            )));
        };
        let bias = match self.optional_constant(places.bias, "biases of experts")? {
            Some(bias) => Some(of_shape(&bias, &[experts * rows], "biases")?),
            None => None,
        };
        let matrix = match places.scales {
            None => weight.reshaped(vec![experts * rows, last]),
            Some(scales) => {
                let dtype = code_type(bits)?;
                let depth = last * 8 / bits;
                let codes = viewed(&weight, dtype, vec![experts * rows, depth], "a weight")?;
                let scales = self.required_constant(scales, "scales")?;
                let (granularity, of) = match size {
                    Some(size) if depth.is_multiple_of(size) => {
                        (Granularity::Block { axis: 1, size }, vec![experts * rows, depth / size])
                    }
                    Some(size) => {
                        return Err(Failure::Problem(format!(
                            "blocks of {size} do not divide rows of {depth}"
                        )));
                    }
                    None => (Granularity::Channel { axis: 0 }, vec![experts * rows]),
                };
                let scales = of_shape(&scales, &of, "scales")?;
                let zeros = places.zero_points.map(|i| self.optional_constant(i, "zero points"));
                match zeros.transpose()?.flatten() {
                    None => Constant::quantized(codes.half_range_moved(), scales, None, granularity)?,
                    Some(zeros) => {
                        // Without blocks they are packed over the rows of an expert.
                        let shape = match of[..] {
                            [rows, blocks] => [rows, blocks],
                            _ => [experts, rows],
                        };
                        let zeros = self.packed_zero_points(&zeros, dtype, shape)?.reshaped(of);
                        Constant::quantized(codes, scales, Some(zeros), granularity)?
                    }
                }
            }
        };
        Ok(Some(Layer { matrix, experts, bias }))
    }

    fn mixture_of(&self, [first, second, third]: [Option<Layer>; 3]) -> Result<Replacement, Failure> {
        let a = &self.attributes;
        let input = |i: usize| self.inputs.get(i).copied().flatten();
        let (Some(first), Some(second)) = (first, second) else {
            return Err("it has no weights".into());
        };
        let unknown = |what: String| Ok(Replacement::Unknown(Some(what)));
        self.expect_zero(&["use_sparse_mixer"]);
        let counts = [Some(&first), Some(&second), third.as_ref()].map(|layer| layer.map(|layer| layer.experts));
        if counts.iter().flatten().any(|count| *count != first.experts) {
            let counts: Vec<usize> = counts.into_iter().flatten().collect();
            return Err(Failure::Problem(format!("its weights are of {counts:?} experts")));
        }
        let experts = first.experts;
        let top_k = a.count("k")?.unwrap_or(1);
        if top_k > experts {
            return Err(Failure::Problem(format!("it chooses {top_k} of {experts} experts")));
        }
        let name = self.text("activation_type")?.unwrap_or_else(|| "relu".to_string());
        let fusion = a.int("swiglu_fusion")?.unwrap_or(0);
        let (alpha, beta) = (
            a.float_or("activation_alpha", 1.0)?,
            a.float_or("activation_beta", 0.0)?,
        );
        let limit = a.float("swiglu_limit")?;
        let is_gated = name == "swiglu";
        let activation = match name.as_str() {
            "swiglu" | "silu" => ExpertActivation::Swish,
            "relu" => ExpertActivation::Relu,
            // As its kernels do.
            "gelu" => ExpertActivation::GeluTanh,
            other => return unknown(format!("activation_type={other}")),
        };
        let halves = |interleaved: bool| -> Result<[Layer; 2], Failure> {
            let rows = first.matrix.shape()[0] / experts;
            if !rows.is_multiple_of(2) {
                return Err(Failure::Problem(format!(
                    "{rows} rows of an expert are not gate and up"
                )));
            }
            Ok([0, 1].map(|which| Layer {
                matrix: first.matrix.half_of_rows(experts, interleaved, which),
                experts,
                bias: first
                    .bias
                    .as_ref()
                    .map(|bias| bias.half_of_rows(experts, interleaved, which)),
            }))
        };
        let (gate, up) = match (is_gated, fusion) {
            (true, 1 | 2) if third.is_none() => {
                let [gate, up] = halves(fusion == 1)?;
                (gate, Some(up))
            }
            (true, 0) if third.is_some() => (first, third),
            (false, _) => (first, third),
            _ => return unknown(format!("swiglu_fusion={fusion}")),
        };
        let hidden = gate.matrix.shape()[1];
        let fits = second.matrix.shape()[1] * experts == gate.matrix.shape()[0]
            && up.as_ref().is_none_or(|up| up.matrix.shape() == gate.matrix.shape());
        if !fits {
            return Err(Failure::Problem(format!(
                "the layers' shapes {:?} and {:?} do not match",
                gate.matrix.shape(),
                second.matrix.shape()
            )));
        }
        let [of_gate, of_up] = [gate.bias, up.as_ref().and_then(|up| up.bias.clone())];
        Ok(Replacement::Experts(Box::new(ExpertNodes {
            x: input(0),
            logits: input(1),
            routing: Routing {
                top_k,
                scores: RouterScores::Softmax,
                weights: match a.flag("normalize_routing_weights", false)? {
                    true => ChosenWeights::Normalized,
                    false => ChosenWeights::Scores,
                },
                margin: 0.0,
                scale: 1.0,
                groups: 0,
                top_groups: 0,
                group_best: 0,
            },
            experts: Experts {
                experts,
                activation,
                alpha: if is_gated { alpha } else { 1.0 },
                beta: if is_gated { beta } else { 0.0 },
                limit: if is_gated {
                    limit.filter(|l| l.is_finite()).unwrap_or(0.0)
                } else {
                    0.0
                },
            },
            hidden,
            gate: gate.matrix,
            up: up.map(|up| up.matrix),
            down: second.matrix,
            biases: [of_gate, of_up, second.bias],
        })))
    }
}
