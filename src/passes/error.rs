//! Why an export cannot become canonical: one error, several at once, or another kind of model.

use super::attention::Obstacle;
use super::{ModelKind, contract, moved_codes};
use crate::graph::eval::EvalError;
use crate::graph::infer::InferError;
use crate::graph::{ConstantError, CycleError, Obstacles};
use crate::help::{Fault, Help, REPORT_BUG};
use crate::tensor::DType;

/// Why an export cannot become canonical. All but [`PassError::Broken`] are caused by the export.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PassError {
    /// A node reads its own result.
    #[error(transparent)]
    Cycle(#[from] CycleError),
    /// dtypes or shapes do not match.
    // Boxed: it holds whole operands, and every pass returns this type.
    #[error(transparent)]
    Infer(Box<InferError>),
    /// A constant has no bytes, or invalid ones.
    #[error(transparent)]
    Constant(#[from] ConstantError),
    /// Constants that an operator cannot process.
    #[error("folding constants: {0}")]
    Eval(#[from] EvalError),
    /// The export violates rules of a graph.
    #[error(transparent)]
    Invalid(#[from] Obstacles),
    /// Inputs without a role.
    #[error(
        "it is not clear what these inputs are for: {} (expected are token ids, masks, positions, lengths and past keys \
         and values)", .names.join(", ")
    )]
    UnmatchedInputs {
        /// In the export.
        names: Vec<String>,
    },
    /// No input of token ids or embeddings, or several.
    #[error(
        "one input of token ids, [batch, tokens], or of embeddings, [batch, tokens, hidden], is needed; found {}",
        if .found.is_empty() { "none".to_string() } else { .found.join(", ") }
    )]
    TokenInput {
        /// Inputs that look like one.
        found: Vec<String>,
    },
    /// Exported without a cache.
    #[error("the model takes no past keys and values")]
    NoCache,
    /// An input whose shape does not match its role.
    #[error("the input {name:?} has the shape {found}, expected {expected}")]
    InputRank {
        /// In the export.
        name: String,
        /// Shapes that its role can have.
        expected: &'static str,
        /// Its shape.
        found: String,
    },
    /// Fixed dims of inputs that a session needs to vary.
    #[error("the export fixes dims that a decoder needs free: {}", .dims.join("; "))]
    FixedDims {
        /// Each with its input and its meaning.
        dims: Vec<String>,
    },
    /// Masks that the caller fills, which cannot all be causal.
    #[error(
        "the caller fills the masks {}, so nothing in the export says which slots they hide: several, or one for a window, \
         cannot be taken for causal", .names.join(" and ")
    )]
    UnknownMasks {
        /// Inputs, with their shapes.
        names: Vec<String>,
        /// Only their names.
        inputs: Vec<String>,
    },
    /// A window for an input that is not a mask of `[.., tokens, slots]`.
    #[error(
        "a window is given for {name:?}, and {}", if .masks.is_empty() {
            "no input of the export is a mask of [.., tokens, slots]".to_string()
        } else {
            format!("the masks of [.., tokens, slots] are {}", .masks.join(", "))
        }
    )]
    NoSuchMask {
        /// As it was given.
        name: String,
        /// Inputs that are.
        masks: Vec<String>,
    },
    /// Activations rounded to codes at places where no operator here can round them.
    #[error(
        "it rounds activations to codes inside attention or its rotary embedding where that cannot be kept: {}{}",
        .values[..values.len().min(4)].join("; "), if values.len() > 4 { "; .." } else { "" }
    )]
    RoundedAttention {
        /// In the export, each with the reason.
        values: Vec<String>,
    },
    /// Activations with an invalid scale.
    #[error(
        "it rounds activations to codes whose scale is no positive number: {}{}",
        .values[..values.len().min(4)].join(", "), if values.len() > 4 { ", .." } else { "" }
    )]
    RoundingScale {
        /// In the export, each with its scale.
        values: Vec<String>,
    },
    /// What was not recognized.
    #[error("{}", list(.obstacles))]
    Obstacles {
        /// All obstacles.
        obstacles: Vec<Obstacle>,
    },
    /// It is not a decoder with a cache.
    #[error("{kind}{}", besides(.errors))]
    Kind {
        /// Its kind.
        kind: ModelKind,
        /// Other obstacles.
        errors: Vec<PassError>,
    },
    /// Several of these at once.
    #[error("{}", together(.errors))]
    Several {
        /// All of them.
        errors: Vec<PassError>,
    },
    /// Numbers that the requested dtype cannot represent.
    #[error("{dtype} cannot hold these constants: {}", .constants.join(", "))]
    Range {
        /// The requested dtype.
        dtype: DType,
        /// Names, each with its largest number.
        constants: Vec<String>,
    },
    /// A bug of a pass.
    #[error("after the pass {pass:?} the graph is broken: {reason}")]
    Broken {
        /// The pass after which the graph was checked.
        pass: &'static str,
        /// The violated rule.
        reason: String,
    },
}

impl PassError {
    /// One error of several; at least one.
    pub(crate) fn together(mut errors: Vec<PassError>) -> PassError {
        match errors.len() {
            1 => errors.remove(0),
            _ => PassError::Several { errors },
        }
    }

    /// The errors that this one contains.
    pub(crate) fn each(self) -> Vec<PassError> {
        match self {
            PassError::Several { errors } => errors,
            other => vec![other],
        }
    }

    /// The refusal of a model by kind, with other obstacles. Obstacles that follow from the kind are omitted.
    pub(crate) fn of_kind(kind: Option<ModelKind>, mut errors: Vec<PassError>) -> PassError {
        let Some(kind) = kind else {
            return PassError::together(errors);
        };
        for error in &mut errors {
            if let PassError::Obstacles { obstacles } = error {
                obstacles.retain(|o| !o.reason.starts_with("these inputs come from an encoder"));
            }
        }
        let said = |error: &PassError| match error {
            PassError::NoCache => true,
            PassError::Obstacles { obstacles } => obstacles.is_empty(),
            PassError::TokenInput { .. } => matches!(kind, ModelKind::NoTokens { .. }),
            PassError::UnmatchedInputs { .. } => {
                matches!(kind, ModelKind::NoTokens { .. } | ModelKind::EncoderDecoder { .. })
            }
            PassError::InputRank { .. } => matches!(kind, ModelKind::States { .. }),
            _ => false,
        };
        errors.retain(|error| !said(error));
        PassError::Kind { kind, errors }
    }
}

fn besides(errors: &[PassError]) -> String {
    let texts: Vec<String> = errors.iter().map(PassError::to_string).collect();
    match texts.is_empty() {
        true => String::new(),
        false => format!("; besides:\n  {}", texts.join("\n  ")),
    }
}

fn together(errors: &[PassError]) -> String {
    let texts: Vec<String> = errors.iter().map(PassError::to_string).collect();
    format!(
        "the model cannot be converted, for {} reasons:\n  {}",
        errors.len(),
        texts.join("\n  ")
    )
}

impl Help for PassError {
    fn fault(&self) -> Fault {
        match self {
            PassError::Broken { .. } => Fault::Bug,
            _ => Fault::Input,
        }
    }

    fn help(&self) -> Option<String> {
        match self {
            PassError::Cycle(error) => error.help(),
            PassError::Constant(error) => error.help(),
            PassError::FixedDims { .. } => Some(
                "export with dynamic axes for the batch (or one number for all inputs, up to 64), the new tokens, the past and the mask's length: \
                 optimum does so by itself, torch.onnx.export with dynamic_shapes (dynamic_axes for TorchScript)"
                    .to_string(),
            ),
            PassError::UnknownMasks { inputs, .. } => {
                let flags: Vec<String> = inputs.iter().map(|name| format!("--mask-window {name}=N")).collect();
                Some(format!(
                    "say how many positions each lets a query attend to, the model's sliding_window or `full`: {}; a config.json \
                     with sliding_window and layer_types beside the export says it, too; or export with one attention_mask of \
                     [batch, past + tokens], from which the graph computes the mask of each layer",
                    flags.join(" ")
                ))
            }
            PassError::NoCache => Some(ModelKind::NoCache.help()),
            PassError::Kind { kind, .. } => Some(kind.help()),
            PassError::Several { errors } => {
                let mut helps: Vec<String> = Vec::new();
                for help in errors.iter().filter_map(PassError::help) {
                    if !helps.contains(&help) {
                        helps.push(help);
                    }
                }
                (!helps.is_empty()).then(|| helps.join("; "))
            }
            PassError::Obstacles { obstacles } if obstacles.iter().any(|o| o.reason.contains("the operator If(")) => Some(
                "export it without the switch: of a decoder that was merged give decoder_with_past_model.onnx (`optimum-cli export \
                 onnx --no-post-process` writes it), and of a scaling that switches with the length export one side"
                    .to_string(),
            ),
            PassError::Obstacles { obstacles }
                if obstacles.iter().any(|o| moved_codes::is_left(o) || contract::is_unknown_on_codes(o)) =>
            {
                Some(
                    "give the file that the quantizer wrote, before an optimizer joined its operators (a session saves one \
                     with optimized_model_filepath; ORT_ENABLE_BASIC keeps them apart), with one constant scale for each \
                     activation; or the export in floating point: `convert --quantize` makes codes of its weights"
                        .to_string(),
                )
            }
            PassError::Obstacles { obstacles } if obstacles.iter().any(contract::is_unknown_operator) => Some(
                "export it again with operators of ONNX: `optimum-cli export onnx --model MODEL --task text-generation-with-past \
                 OUT`, or torch.onnx.export as in docs/guides/exporting.md, in fp32 or fp16; `convert --quantize` makes codes of its \
                 weights"
                    .to_string(),
            ),
            PassError::RoundedAttention { .. } => Some(
                "leave these in floating point with --activations partial, or all of them with --activations float; what is \
                 left out changes answers a little, and the manifest says so"
                    .to_string(),
            ),
            PassError::RoundingScale { .. } => Some(
                "calibrate it again without what has no finite range, such as scores with a mask of -inf, or leave activations \
                 in floating point with --activations partial or float"
                    .to_string(),
            ),
            PassError::Range { .. } => {
                Some("choose bf16 or fp32, or --allow-overflow to make weights infinite".to_string())
            }
            PassError::Broken { .. } => Some(REPORT_BUG.to_string()),
            _ => None,
        }
    }
}

impl From<InferError> for PassError {
    fn from(error: InferError) -> Self {
        PassError::Infer(Box::new(error))
    }
}

/// A few obstacles in full and the number of others: thirty layers often share one.
fn list(obstacles: &[Obstacle]) -> String {
    const SHOWN: usize = 8;
    let mut text = match obstacles.len() {
        1 => "the model was not understood: ".to_string(),
        n => format!("the model was not understood, for {n} reasons:\n  "),
    };
    let shown: Vec<String> = obstacles.iter().take(SHOWN).map(Obstacle::to_string).collect();
    text += &shown.join("\n  ");
    if obstacles.len() > SHOWN {
        text += &format!("\n  and {} more", obstacles.len() - SHOWN);
    }
    text
}
