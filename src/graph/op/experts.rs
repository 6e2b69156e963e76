//! Names in the attributes of the operators of a mixture of experts.

use super::attributes::Words;

/// How a router computes scores from the logits of all experts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RouterScores {
    /// Their softmax.
    Softmax,
    /// The sigmoid of each.
    Sigmoid,
    /// The logits themselves.
    Logits,
}

impl Words for RouterScores {
    const WORDS: &'static [(Self, &'static str)] = &[
        (RouterScores::Softmax, "softmax"),
        (RouterScores::Sigmoid, "sigmoid"),
        (RouterScores::Logits, "logits"),
    ];
}

/// How the weights of a token's experts follow from the scores of the chosen ones.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ChosenWeights {
    /// The scores.
    Scores,
    /// The scores divided by their sum.
    Normalized,
    /// The softmax of the scores.
    Softmax,
    /// The sigmoid of each score.
    Sigmoid,
    /// Experts are chosen one after the other. The weight of each is its share of the softmax over those experts that were
    /// not chosen before it and whose score is not below its own by more than `margin` of the greater of its own and their
    /// magnitude (the inference of SparseMixer-v2, [GRIN](https://arxiv.org/abs/2409.12136); Phi-3.5-MoE).
    SparseMixer,
}

impl Words for ChosenWeights {
    const WORDS: &'static [(Self, &'static str)] = &[
        (ChosenWeights::Scores, "scores"),
        (ChosenWeights::Normalized, "normalized"),
        (ChosenWeights::Softmax, "softmax"),
        (ChosenWeights::Sigmoid, "sigmoid"),
        (ChosenWeights::SparseMixer, "sparse_mixer"),
    ];
}

/// The function between the matrices of an expert.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ExpertActivation {
    /// `x * sigmoid(alpha * x)`.
    Swish,
    /// GELU.
    Gelu,
    /// GELU by its approximation with tanh.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)²`.
    ReluSquared,
}

impl Words for ExpertActivation {
    const WORDS: &'static [(Self, &'static str)] = &[
        (ExpertActivation::Swish, "swish"),
        (ExpertActivation::Gelu, "gelu"),
        (ExpertActivation::GeluTanh, "gelu_tanh"),
        (ExpertActivation::Relu, "relu"),
        (ExpertActivation::ReluSquared, "relu_squared"),
    ];
}

impl ExpertActivation {
    /// The word in attributes and dumps.
    pub fn word(self) -> &'static str {
        let word = Self::WORDS.iter().find(|(variant, _)| *variant == self);
        word.map_or("", |(_, word)| word)
    }

    /// The variant of this word.
    pub fn named(word: &str) -> Option<Self> {
        Self::WORDS
            .iter()
            .find(|(_, of)| *of == word)
            .map(|(variant, _)| *variant)
    }
}

/// The function before the second matrix of an expert; see [`Op::Experts`](super::Op::Experts).
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Gating {
    /// The function.
    pub activation: ExpertActivation,
    /// Alpha of [`ExpertActivation::Swish`].
    pub alpha: f32,
    /// Added to `up`.
    pub beta: f32,
    /// Upper bound of the function's argument, and bound of `up` on both sides; 0: none.
    pub limit: f32,
}

impl super::Experts {
    /// The input of the second matrix.
    pub fn gating(&self) -> Gating {
        Gating {
            activation: self.activation,
            alpha: self.alpha,
            beta: self.beta,
            limit: self.limit,
        }
    }
}
