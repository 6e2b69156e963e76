//! The contrib operators of ONNX Runtime, domain `com.microsoft`:
//! <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md>. Those that equal one of ONNX's own
//! operators become that operator.

use super::{Failure, Replacement, SourceNode};
use crate::graph::op::{Attention, AttributeSource, Binary, MICROSOFT, Op, Unary};

impl SourceNode<'_> {
    pub(super) fn contrib_operator(&self) -> Result<Replacement, Failure> {
        let a = &self.attributes;
        match self.op_type {
            "Gelu" => return Ok(Replacement::Op(Op::Gelu { tanh: false })),
            "FastGelu" => return self.biased_gelu(true),
            "BiasGelu" => return self.biased_gelu(false),
            "QuickGelu" => {
                return Ok(Replacement::Op(Op::Swish {
                    alpha: a.float_or("alpha", 1.702)?,
                }));
            }
            "FusedGemm" => return self.fused_gemm(),
            "SimplifiedLayerNormalization" => return self.read_as("", "RMSNormalization"),
            "MultiHeadAttention" => return self.multi_head_attention(),
            "MatMulNBits" => return self.matmul_n_bits(),
            "MoE" => return self.mixture(),
            "QMoE" => return self.quantized_mixture(),
            "MatMulBnb4" => return self.matmul_bnb4(),
            "GatherBlockQuantized" => return self.gather_block_quantized(),
            // ONNX Runtime's variants of standard operators, from before those accepted every type.
            "QuantizeLinear" => return self.quantize_linear(),
            "DequantizeLinear" => return self.dequantize_linear(),
            "FusedMatMul" => self.expect_zero(&["transBatchA", "transBatchB"]),
            "RotaryEmbedding" => {
                self.expect_zero(&["is_packed_batching"]);
                if let Some(scale) = a.float("scale")?
                    && scale != 1.0
                {
                    return Ok(Replacement::Unknown(Some(format!("scale={scale}"))));
                }
            }
            "GroupQueryAttention" => {
                self.pass_over_idle();
                self.pass_over_eviction();
            }
            _ => {
                if let Some(replacement) = self.on_codes()? {
                    return Ok(replacement);
                }
            }
        }
        self.read_as(MICROSOFT, self.op_type)
    }

    fn biased_gelu(&self, tanh: bool) -> Result<Replacement, Failure> {
        Ok(match self.inputs.get(1).copied().flatten() {
            Some(_) => Replacement::Pipe(Op::Binary(Binary::Add), Op::Gelu { tanh }),
            None => Replacement::Op(Op::Gelu { tanh }),
        })
    }

    /// `Gemm` followed by an activation.
    fn fused_gemm(&self) -> Result<Replacement, Failure> {
        let Some(gemm) = Op::read("", "Gemm", self)? else {
            return Ok(Replacement::Unknown(None));
        };
        let name = self.text("activation")?.unwrap_or_default();
        let activation = match Unary::named(&name) {
            Some(op @ (Unary::Relu | Unary::Sigmoid | Unary::Tanh | Unary::Softplus)) => op,
            _ if name.is_empty() => return Ok(Replacement::Op(gemm)),
            _ => return Ok(Replacement::Unknown(Some(format!("activation={name}")))),
        };
        // For activations with parameters, which these do not have.
        self.attributes
            .ignore(&["activation_alpha", "activation_beta", "activation_gamma"]);
        Ok(Replacement::Pipe(gemm, Op::Unary(activation)))
    }

    /// Quantized caches and extra outputs are not supported.
    fn pass_over_idle(&self) {
        let a = &self.attributes;
        self.expect_zero(&["qk_output", "kv_cache_bit_width"]);
        for name in ["k_quant_type", "v_quant_type"] {
            if a.is_string(name, "NONE") {
                a.ignore(&[name]);
            }
        }
    }

    /// Attention reads nothing but the window, so a cache may drop rows outside it. In an export with a fixed number of
    /// slots, rows would have to be dropped here, too.
    fn pass_over_eviction(&self) {
        let window = self.attributes.int("local_window_size").ok().flatten().unwrap_or(-1);
        let past = self
            .inputs
            .get(3)
            .copied()
            .flatten()
            .and_then(|past| self.graph.shape(past));
        let grows = past
            .and_then(|shape| shape.get(2))
            .is_some_and(|slots| slots.as_const().is_none());
        if window > 0 && grows {
            self.attributes.ignore(&["sliding_window_cache"]);
        }
        self.expect_zero(&["sliding_window_cache"]);
    }

    /// Inputs: q, k, v, bias?, key_padding_mask?, attention_bias?, past_key?, past_value?, …, all of q, k, v are
    /// `[batch, tokens, heads*head_dim]`: ONNX's own attention with as many key heads as query heads.
    fn multi_head_attention(&self) -> Result<Replacement, Failure> {
        let a = &self.attributes;
        self.expect_zero(&["unidirectional"]);
        // The value that the padding mask writes; there must be no padding mask.
        a.ignore(&["mask_filter_value"]);
        let heads = a.required_count("num_heads")?;
        let input = |i: usize| self.inputs.get(i).copied().flatten();
        for (i, name) in [(3, "bias"), (4, "key_padding_mask")] {
            if input(i).is_some() {
                return Ok(Replacement::Unknown(Some(name.to_string())));
            }
        }
        if input(1).is_none() || input(2).is_none() || self.inputs.len() > 8 {
            return Ok(Replacement::Unknown(Some(format!("{} inputs", self.inputs.len()))));
        }
        let attention = Op::Attention(Attention {
            is_causal: false,
            scale: a.float("scale")?.filter(|s| *s != 0.0),
            softcap: 0.0,
            q_num_heads: Some(heads),
            kv_num_heads: Some(heads),
            softmax_precision: None,
        });
        let mut inputs = vec![input(0), input(1), input(2), input(5), input(6), input(7)];
        while inputs.last() == Some(&None) {
            inputs.pop();
        }
        Ok(Replacement::Rewired(attention, inputs))
    }
}
