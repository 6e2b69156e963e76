//! Names in the attributes of the operators of a mixture of experts.

use super::attributes::Words;

/// What a router makes of its logits, of all experts.
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

/// How the weights of a token's experts follow from the scores of those that were chosen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ChosenWeights {
    /// They are the scores.
    Scores,
    /// The scores divided by their sum.
    Normalized,
    /// The softmax of the scores.
    Softmax,
}

impl Words for ChosenWeights {
    const WORDS: &'static [(Self, &'static str)] = &[
        (ChosenWeights::Scores, "scores"),
        (ChosenWeights::Normalized, "normalized"),
        (ChosenWeights::Softmax, "softmax"),
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
    /// As attributes and dumps say it.
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

/// What stands before the second matrix of an expert, as [`Op::Experts`](super::Op::Experts) says it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Gating {
    /// The function.
    pub activation: ExpertActivation,
    /// Of [`ExpertActivation::Swish`].
    pub alpha: f32,
    /// Added to `up`.
    pub beta: f32,
    /// The bound of what the function takes from above, and of `up` from both sides; 0: none.
    pub limit: f32,
}

impl super::Experts {
    /// What stands before the second matrix.
    pub fn gating(&self) -> Gating {
        Gating {
            activation: self.activation,
            alpha: self.alpha,
            beta: self.beta,
            limit: self.limit,
        }
    }
}
