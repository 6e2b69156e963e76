//! Checkpoint names of the modules in [`super::modules`]: Hugging Face's Llama-like models and GPT-2, TensorRT-LLM.
//!
//! A [`Convention`] is a table from modules to tensors. Tensors may hold several modules (`c_attn`, `qkv`), and GPT-2's
//! `Conv1D` keeps its matrices `[in, out]`. Names and layouts are from the models' own `state_dict`s and, for
//! TensorRT-LLM, from its documentation of the checkpoint format
//! (<https://nvidia.github.io/TensorRT-LLM/legacy/architecture/checkpoint.html>).

use std::collections::HashMap;

use crate::graph::Constant;

/// A naming convention.
#[derive(Debug)]
pub struct Convention {
    /// Display name.
    pub name: &'static str,
    /// Entries in groups, which conventions may share.
    entries: &'static [&'static [Entry]],
    /// A prefix of every name that may be missing if only a part of a model was saved.
    prefix: &'static str,
}

/// Modules and the tensor that holds them; `N` is the layer.
#[derive(Debug)]
struct Entry {
    /// The modules, joined on their rows.
    modules: &'static [&'static str],
    tensor: &'static str,
    /// Matrices are `[in, out]`.
    transposed: bool,
}

const fn one(module: &'static [&'static str; 1], tensor: &'static str) -> Entry {
    Entry {
        modules: module,
        tensor,
        transposed: false,
    }
}

const fn transposed(modules: &'static [&'static str], tensor: &'static str) -> Entry {
    Entry {
        modules,
        tensor,
        transposed: true,
    }
}

const QKV: &[&str] = &[
    "layers.N.attention.query",
    "layers.N.attention.key",
    "layers.N.attention.value",
];

/// The common part of Llama-like models in Hugging Face's format.
const LLAMA_PARTS: &[Entry] = &[
    one(&["embedding"], "model.embed_tokens"),
    one(&["norm"], "model.norm"),
    one(&["head"], "lm_head"),
    one(&["layers.N.attention_norm"], "model.layers.N.input_layernorm"),
    one(&["layers.N.attention.query"], "model.layers.N.self_attn.q_proj"),
    one(&["layers.N.attention.key"], "model.layers.N.self_attn.k_proj"),
    one(&["layers.N.attention.value"], "model.layers.N.self_attn.v_proj"),
    Entry {
        modules: QKV,
        tensor: "model.layers.N.self_attn.qkv_proj",
        transposed: false,
    },
    one(&["layers.N.attention.query_norm"], "model.layers.N.self_attn.q_norm"),
    one(&["layers.N.attention.key_norm"], "model.layers.N.self_attn.k_norm"),
    one(&["layers.N.attention.output"], "model.layers.N.self_attn.o_proj"),
    // gpt-oss's sinks.
    one(&["layers.N.attention"], "model.layers.N.self_attn"),
    one(&["layers.N.feed_forward.gate"], "model.layers.N.mlp.gate_proj"),
    one(&["layers.N.feed_forward.up"], "model.layers.N.mlp.up_proj"),
    Entry {
        modules: &["layers.N.feed_forward.gate", "layers.N.feed_forward.up"],
        tensor: "model.layers.N.mlp.gate_up_proj",
        transposed: false,
    },
    one(&["layers.N.feed_forward.down"], "model.layers.N.mlp.down_proj"),
];

/// Mixtures of experts, where `M` is the expert: Qwen, DeepSeek, GLM, OLMoE and others; gpt-oss; Mixtral.
const MIXTURES: &[Entry] = &[
    one(&["layers.N.feed_forward.router"], "model.layers.N.mlp.gate"),
    one(&["layers.N.feed_forward.router"], "model.layers.N.mlp.router"),
    one(
        &["layers.N.feed_forward.router"],
        "model.layers.N.block_sparse_moe.gate",
    ),
    one(
        &["layers.N.feed_forward.router"],
        "model.layers.N.block_sparse_moe.router",
    ),
    one(
        &["layers.N.feed_forward.router"],
        "model.layers.N.block_sparse_moe.router.layer",
    ),
    one(
        &["layers.N.feed_forward.experts.M.gate"],
        "model.layers.N.mlp.experts.M.gate_proj",
    ),
    one(
        &["layers.N.feed_forward.experts.M.up"],
        "model.layers.N.mlp.experts.M.up_proj",
    ),
    one(
        &["layers.N.feed_forward.experts.M.down"],
        "model.layers.N.mlp.experts.M.down_proj",
    ),
    one(
        &["layers.N.feed_forward.experts.M.gate"],
        "model.layers.N.block_sparse_moe.experts.M.w1",
    ),
    one(
        &["layers.N.feed_forward.experts.M.up"],
        "model.layers.N.block_sparse_moe.experts.M.w3",
    ),
    one(
        &["layers.N.feed_forward.experts.M.down"],
        "model.layers.N.block_sparse_moe.experts.M.w2",
    ),
    one(
        &["layers.N.feed_forward.shared.gate"],
        "model.layers.N.mlp.shared_expert.gate_proj",
    ),
    one(
        &["layers.N.feed_forward.shared.up"],
        "model.layers.N.mlp.shared_expert.up_proj",
    ),
    one(
        &["layers.N.feed_forward.shared.down"],
        "model.layers.N.mlp.shared_expert.down_proj",
    ),
    one(
        &["layers.N.feed_forward.shared.gate"],
        "model.layers.N.mlp.shared_experts.gate_proj",
    ),
    one(
        &["layers.N.feed_forward.shared.up"],
        "model.layers.N.mlp.shared_experts.up_proj",
    ),
    one(
        &["layers.N.feed_forward.shared.down"],
        "model.layers.N.mlp.shared_experts.down_proj",
    ),
    one(
        &["layers.N.feed_forward.shared_gate"],
        "model.layers.N.mlp.shared_expert_gate",
    ),
];

/// Names of tensors with gate and up, and with down, of all experts of a layer; Granite's names come last.
const STACKED_EXPERTS: [[&str; 2]; 3] = [
    [
        "model.layers.N.mlp.experts.gate_up_proj",
        "model.layers.N.mlp.experts.down_proj",
    ],
    [
        "model.layers.N.block_sparse_moe.experts.gate_up_proj",
        "model.layers.N.block_sparse_moe.experts.down_proj",
    ],
    [
        "model.layers.N.block_sparse_moe.input_linear.weight",
        "model.layers.N.block_sparse_moe.output_linear.weight",
    ],
];

/// Llama, Qwen, Mistral and similar models; Phi-3's fused matrices too.
pub const LLAMA: Convention = Convention {
    name: "Hugging Face, Llama-like",
    prefix: "model.",
    entries: &[
        LLAMA_PARTS,
        MIXTURES,
        &[one(
            &["layers.N.feed_forward_norm"],
            "model.layers.N.post_attention_layernorm",
        )],
    ],
};

/// Gemma 2 and 3, OLMo 2: a norm after each block, and `post_attention_layernorm` is one of these.
pub const HUGGING_FACE_OUTPUT_NORMS: Convention = Convention {
    name: "Hugging Face, Gemma-like",
    prefix: "model.",
    entries: &[
        LLAMA_PARTS,
        &[
            one(
                &["layers.N.attention_output_norm"],
                "model.layers.N.post_attention_layernorm",
            ),
            one(
                &["layers.N.feed_forward_norm"],
                "model.layers.N.pre_feedforward_layernorm",
            ),
            one(
                &["layers.N.feed_forward_output_norm"],
                "model.layers.N.post_feedforward_layernorm",
            ),
        ],
    ],
};

/// GPT-2, whose matrices are `[in, out]`.
pub const GPT2: Convention = Convention {
    name: "Hugging Face, GPT-2",
    prefix: "transformer.",
    entries: &[&[
        one(&["embedding"], "transformer.wte"),
        one(&["positions"], "transformer.wpe"),
        one(&["norm"], "transformer.ln_f"),
        one(&["head"], "lm_head"),
        one(&["layers.N.attention_norm"], "transformer.h.N.ln_1"),
        transposed(QKV, "transformer.h.N.attn.c_attn"),
        transposed(&["layers.N.attention.output"], "transformer.h.N.attn.c_proj"),
        one(&["layers.N.feed_forward_norm"], "transformer.h.N.ln_2"),
        transposed(&["layers.N.feed_forward.up"], "transformer.h.N.mlp.c_fc"),
        transposed(&["layers.N.feed_forward.down"], "transformer.h.N.mlp.c_proj"),
    ]],
};

/// GPT-J, with parallel blocks after one norm.
pub const GPT_J: Convention = Convention {
    name: "Hugging Face, GPT-J",
    prefix: "transformer.",
    entries: &[&[
        one(&["embedding"], "transformer.wte"),
        one(&["norm"], "transformer.ln_f"),
        one(&["head"], "lm_head"),
        one(&["layers.N.attention_norm"], "transformer.h.N.ln_1"),
        one(&["layers.N.attention.query"], "transformer.h.N.attn.q_proj"),
        one(&["layers.N.attention.key"], "transformer.h.N.attn.k_proj"),
        one(&["layers.N.attention.value"], "transformer.h.N.attn.v_proj"),
        one(&["layers.N.attention.output"], "transformer.h.N.attn.out_proj"),
        one(&["layers.N.feed_forward.up"], "transformer.h.N.mlp.fc_in"),
        one(&["layers.N.feed_forward.down"], "transformer.h.N.mlp.fc_out"),
    ]],
};

/// One rank of a checkpoint for TensorRT-LLM, not quantized.
pub const TENSORRT_LLM: Convention = Convention {
    name: "TensorRT-LLM",
    prefix: "transformer.",
    entries: &[&[
        one(&["embedding"], "transformer.vocab_embedding"),
        one(&["positions"], "transformer.position_embedding"),
        one(&["norm"], "transformer.ln_f"),
        one(&["head"], "lm_head"),
        one(&["layers.N.attention_norm"], "transformer.layers.N.input_layernorm"),
        Entry {
            modules: QKV,
            tensor: "transformer.layers.N.attention.qkv",
            transposed: false,
        },
        one(
            &["layers.N.attention.query_norm"],
            "transformer.layers.N.attention.q_layernorm",
        ),
        one(
            &["layers.N.attention.key_norm"],
            "transformer.layers.N.attention.k_layernorm",
        ),
        one(&["layers.N.attention.output"], "transformer.layers.N.attention.dense"),
        one(&["layers.N.feed_forward_norm"], "transformer.layers.N.post_layernorm"),
        // With a gate, the activation is applied to `fc`, and the result is multiplied by `gate`.
        one(&["layers.N.feed_forward.gate"], "transformer.layers.N.mlp.fc"),
        one(&["layers.N.feed_forward.up"], "transformer.layers.N.mlp.gate"),
        one(&["layers.N.feed_forward.down"], "transformer.layers.N.mlp.proj"),
    ]],
};

/// Names of a TensorRT-LLM checkpoint whose feed-forward blocks have no gate.
const TENSORRT_LLM_PLAIN_UP: Entry = one(&["layers.N.feed_forward.up"], "transformer.layers.N.mlp.fc");

/// Whether a model with these module names has gated feed-forward blocks.
pub fn has_gate<T>(modules: &HashMap<String, T>) -> bool {
    modules.contains_key("layers.0.feed_forward.gate.weight")
}

/// All known conventions. If two match equally many names of a checkpoint, the later one applies.
pub const CONVENTIONS: [&Convention; 5] = [&LLAMA, &HUGGING_FACE_OUTPUT_NORMS, &GPT_J, &GPT2, &TENSORRT_LLM];

/// A tensor of a checkpoint that holds a module, possibly with others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Possible names, most likely first.
    pub names: Vec<String>,
    /// The modules in the tensor, joined on their rows, including the requested one.
    pub modules: Vec<String>,
    /// `[in, out]`.
    pub transposed: bool,
}

impl Convention {
    /// Possible tensors of a module such as `layers.3.attention.query.weight`. `has_gate`: the model has gated
    /// feed-forwards.
    pub fn places(&self, module: &str, has_gate: bool) -> Vec<Place> {
        let Some((path, what)) = module.rsplit_once('.') else {
            return Vec::new();
        };
        // DeepSeek's correction of router scores.
        let what = if what == "correction" {
            "e_score_correction_bias"
        } else {
            what
        };
        let (layer, path) = match path.strip_prefix("layers.").and_then(|rest| rest.split_once('.')) {
            Some((layer, rest)) => (layer, format!("layers.N.{rest}")),
            None => ("", path.to_string()),
        };
        const EXPERTS: &str = "layers.N.feed_forward.experts.";
        let (expert, path) = match path.strip_prefix(EXPERTS).and_then(|rest| rest.split_once('.')) {
            Some((expert, part)) => (expert.to_string(), format!("{EXPERTS}M.{part}")),
            None => (String::new(), path),
        };
        let plain_up = (self.name == TENSORRT_LLM.name && !has_gate).then_some(&TENSORRT_LLM_PLAIN_UP);
        let entries = plain_up.into_iter().chain(self.entries.iter().copied().flatten());
        let holding = entries.filter(|entry| entry.modules.contains(&path.as_str()));
        let full = |pattern: &str| format!("{}.{what}", pattern.replace('N', layer).replace('M', &expert));
        holding
            .map(|entry| {
                let name = full(entry.tensor);
                let short = name.strip_prefix(self.prefix).map(str::to_string);
                Place {
                    names: std::iter::once(name.clone()).chain(short).collect(),
                    modules: entry.modules.iter().map(|m| full(m)).collect(),
                    transposed: entry.transposed && what == "weight",
                }
            })
            .collect()
    }

    /// The module among tensors of a checkpoint, in our orientation: `tensor` finds one by name, `rows` has the rows of
    /// modules that share a tensor. Also returns the tensor's name.
    pub fn find(
        &self,
        module: &str,
        has_gate: bool,
        tensor: impl Fn(&str) -> Option<Constant>,
        rows: &HashMap<String, usize>,
    ) -> Option<(String, Constant)> {
        let apart = self.places(module, has_gate).into_iter().find_map(|place| {
            let (name, found) = place
                .names
                .iter()
                .find_map(|name| Some((name.clone(), tensor(name)?)))?;
            let whole = match place.transposed && found.shape().len() == 2 {
                true => found.transposed(&[1, 0]),
                false => found,
            };
            Some((name, place.part(module, whole, rows)?))
        });
        apart.or_else(|| self.find_stacked(module, tensor, rows))
    }

    /// An expert's matrix or bias among those of all experts: `gate_up_proj` `[experts, 2 * hidden, in]`, gate above
    /// up, and `down_proj` `[experts, out, hidden]`; gpt-oss, the only one with biases, stores both transposed, with
    /// gate and up interleaved.
    fn find_stacked(
        &self,
        module: &str,
        tensor: impl Fn(&str) -> Option<Constant>,
        rows: &HashMap<String, usize>,
    ) -> Option<(String, Constant)> {
        let mut entries = self.entries.iter().copied().flatten();
        if !entries.any(|entry| entry.modules.iter().any(|module| module.contains(".experts."))) {
            return None;
        }
        let (layer, rest) = module.strip_prefix("layers.")?.split_once('.')?;
        let (expert, rest) = rest.strip_prefix("feed_forward.experts.")?.split_once('.')?;
        let (part, what) = rest.split_once('.')?;
        let expert: usize = expert.parse().ok()?;
        let find = |pattern: &str, suffix: &str| {
            let name = format!("{}{suffix}", pattern.replace('N', layer));
            let short = name.strip_prefix(self.prefix).map(str::to_string);
            let mut names = std::iter::once(name.clone()).chain(short);
            names.find_map(|name| Some((name.clone(), tensor(&name)?)))
        };
        let (name, all, is_turned) = STACKED_EXPERTS.iter().find_map(|of| {
            let pattern = of[usize::from(part == "down")];
            let bias = find(pattern, "_bias");
            let is_turned = bias.is_some();
            let (name, all) = match what {
                "weight" => find(pattern, "")?,
                "bias" => bias?,
                _ => return None,
            };
            Some((name, all, is_turned))
        })?;
        let (count, each) = all.shape().split_first()?;
        if expert >= *count {
            return None;
        }
        let one = all.sliced(0, expert, expert + 1).reshaped(each.to_vec());
        let one = match is_turned && each.len() == 2 {
            true => one.transposed(&[1, 0]),
            false => one,
        };
        let which = match part {
            "gate" => 0,
            "up" => 1,
            _ => return Some((name, one)),
        };
        let fits = rows
            .get(module)
            .is_some_and(|rows| one.shape().first() == Some(&(2 * rows)));
        // A tensor with a different number of rows is not cut: the caller reports the shape.
        Some((
            name,
            if fits {
                one.half_of_rows(1, is_turned, which)
            } else {
                one
            },
        ))
    }
}

impl Place {
    /// The rows of a module in the matrix or vector of all modules here, `[rows, ..]`; `rows` has the number of rows of
    /// each. A tensor with a different total is not cut: the caller reports the shape.
    pub fn part(&self, module: &str, whole: Constant, rows: &HashMap<String, usize>) -> Option<Constant> {
        if let [_] = self.modules[..] {
            return Some(whole);
        }
        let sizes: Vec<usize> = self
            .modules
            .iter()
            .map(|m| rows.get(m).copied())
            .collect::<Option<_>>()?;
        let at = self.modules.iter().position(|m| m == module)?;
        let start: usize = sizes[..at].iter().sum();
        let fits = whole.shape().first() == Some(&sizes.iter().sum::<usize>());
        Some(match fits {
            true => whole.sliced(0, start, start + sizes[at]),
            false => whole,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;

    fn matrix(shape: [usize; 2]) -> Constant {
        let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| i as f32).collect();
        Constant::tensor(Tensor::from_f32(shape.to_vec(), &values))
    }

    #[test]
    fn names_in_each_convention() {
        let first = |c: &Convention, module: &str, gate| c.places(module, gate)[0].names.clone();
        let query = "layers.12.attention.query.weight";
        assert_eq!(
            first(&LLAMA, query, true),
            [
                "model.layers.12.self_attn.q_proj.weight",
                "layers.12.self_attn.q_proj.weight"
            ]
        );
        assert_eq!(first(&GPT2, query, false)[1], "h.12.attn.c_attn.weight");
        assert_eq!(first(&LLAMA, "head.weight", true), ["lm_head.weight"]);
        let up = "layers.0.feed_forward.up.weight";
        assert_eq!(
            first(&TENSORRT_LLM, up, true)[0],
            "transformer.layers.0.mlp.gate.weight"
        );
        assert_eq!(first(&TENSORRT_LLM, up, false)[0], "transformer.layers.0.mlp.fc.weight");
        assert!(LLAMA.places("positions.weight", true).is_empty());
        assert!(!GPT2.places("layers.0.attention.query.bias", false)[0].transposed);
    }

    /// Gate and up of the second of two experts, of three rows each and two columns, in the forms of Qwen, gpt-oss and Granite.
    #[test]
    fn experts_in_tensors_of_all_of_them() {
        let modules = ["gate", "up"].map(|part| format!("layers.4.feed_forward.experts.1.{part}.weight"));
        let rows: HashMap<String, usize> = modules.iter().map(|module| (module.clone(), 3)).collect();
        let of = |shape: Vec<usize>| {
            let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| i as f32).collect();
            Constant::tensor(Tensor::from_f32(shape, &values))
        };
        let above = [
            [12.0, 13.0, 14.0, 15.0, 16.0, 17.0],
            [18.0, 19.0, 20.0, 21.0, 22.0, 23.0],
        ];
        let in_turn = [
            [12.0, 18.0, 14.0, 20.0, 16.0, 22.0],
            [13.0, 19.0, 15.0, 21.0, 17.0, 23.0],
        ];
        for (name, shape, bias, wanted) in [
            ("mlp.experts.gate_up_proj", vec![2, 6, 2], false, above),
            ("mlp.experts.gate_up_proj", vec![2, 2, 6], true, in_turn),
            ("block_sparse_moe.input_linear.weight", vec![2, 6, 2], false, above),
        ] {
            let name = format!("model.layers.4.{name}");
            let tensor = |asked: &str| match asked {
                asked if asked == name => Some(of(shape.clone())),
                asked if bias && asked == format!("{name}_bias") => Some(of(vec![2, 6])),
                _ => None,
            };
            for (module, wanted) in modules.iter().zip(wanted) {
                let (found, part) = LLAMA.find(module, true, tensor, &rows).unwrap();
                assert_eq!((found, part.shape()), (name.clone(), &[3, 2][..]));
                assert_eq!(part.materialize().unwrap().to_f32(), wanted);
            }
            assert!(GPT2.find(&modules[0], true, tensor, &rows).is_none());
        }
        // Individual tensors come first; Mixtral uses different names.
        let places = LLAMA.places(&modules[1], true);
        assert_eq!(places[0].names[0], "model.layers.4.mlp.experts.1.up_proj.weight");
        assert_eq!(
            places[1].names[0],
            "model.layers.4.block_sparse_moe.experts.1.w3.weight"
        );
    }

    #[test]
    fn a_part_of_a_turned_matrix() {
        // Two inputs; query 2, key 1 and value 1 outputs.
        let fused = matrix([2, 4]);
        let names = ["query", "key", "value"].map(|m| format!("layers.0.attention.{m}.weight"));
        let rows: HashMap<String, usize> = names.iter().cloned().zip([2, 1, 1]).collect();
        let tensor = |name: &str| (name == "h.0.attn.c_attn.weight").then(|| fused.clone());
        let (name, key) = GPT2.find(&names[1], false, tensor, &rows).unwrap();
        assert_eq!(name, "h.0.attn.c_attn.weight");
        assert_eq!(key.shape(), [1, 2]);
        assert_eq!(key.materialize().unwrap().to_f32(), [2.0, 6.0]);
        assert!(LLAMA.find(&names[1], false, tensor, &rows).is_none());
    }
}
