//! The product of few rows with one to three matrices, with a norm before and an epilogue after.

use super::one_of;
use crate::ir_text::{Cursor, Parsed};

/// `y = residual + activation(bias + norm(x) Wᵀ)`; gated, with two matrices: `y = residual + activation(gate) * up`,
/// where gate and up are `bias + norm(x) Wᵀ` each. Several matrices that are not gated have concatenated outputs.
///
/// x is `[.., k]` in fp16 or bf16; each matrix `[n, k]` in x's dtype, or codes of it; `norm` `[k]`, biases `[n]` and
/// the residual `[.., outputs]` in x's dtype. The output is `[.., outputs]` in x's dtype, or fp32. `norm(x)` is `x *
/// rsqrt(mean(x²) + epsilon) * norm`, rounded to x's dtype; everything else is fp32 until the output is rounded.
///
/// Codes are two's complement i8 or i4 in ONNX's order, `(code - zero point) * scale`. The scales of rows are `[n]`;
/// those of groups and their zero points are in the order of [`CodeLayout`].
#[derive(Clone, PartialEq, Debug)]
pub struct RowProduct {
    /// The matrices; two if gated, gate before up.
    pub parts: Vec<ProductPart>,
    /// The epsilon of the norm, if there is one.
    pub norm: Option<f32>,
    /// Activation of the sum with the bias; of the gate, if gated.
    pub activation: RowActivation,
    /// Whether the first matrix gates the second.
    pub gated: bool,
    /// Whether something is added to the result.
    pub residual: bool,
    /// Whether the output is fp32 instead of x's dtype.
    pub to_f32: bool,
}

/// One matrix of a [`RowProduct`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ProductPart {
    /// How its codes are scaled; `None` for a matrix in x's dtype.
    pub codes: Option<CodeLayout>,
    /// Whether it has a bias.
    pub bias: bool,
}

/// Which codes share a scale, and the order of the scales.
///
/// One scale per group of `group` codes along a row, with or without zero points. A *column* is 64 bytes of a row: 64
/// codes of i8, 128 of i4. Scales are `[ceil(n / 8), columns, 8, groups of a column]`, or if a group is longer than a
/// column `[ceil(n / 8), k / group, 8, 1]`, with zeros where there is no row or group. Zero points are in the same
/// order, one byte (u8) each: the zero point plus 8 (i4) or 128 (i8).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct CodeLayout {
    /// Codes per group; `None` for one scale per row, `[n]`.
    pub group: Option<usize>,
    /// Whether groups have zero points.
    pub zero_points: bool,
}

impl CodeLayout {
    /// Codes in 64 bytes of a row.
    pub fn depth(bits: usize) -> usize {
        512 / bits
    }

    /// The shape of scales and zero points of codes `[n, k]` of so many bits.
    pub fn scale_shape(self, bits: usize, n: usize, k: usize) -> Vec<usize> {
        let depth = CodeLayout::depth(bits);
        match self.group {
            None => vec![n],
            Some(group) if group > depth => vec![n.div_ceil(8), k / group, 8, 1],
            Some(group) => vec![n.div_ceil(8), k.div_ceil(depth), 8, depth / group],
        }
    }

    /// Whether there are kernels for such codes in rows of `k`, which must be a multiple of the group and of 16 bytes.
    pub fn fits(self, bits: usize, k: usize) -> bool {
        let row = k.is_multiple_of(128 / bits);
        let groups: &[usize] = match bits {
            4 => &[16, 32, 64, 128],
            8 => &[32, 64, 128],
            _ => &[],
        };
        match self.group {
            None => row && bits == 8 && !self.zero_points,
            Some(group) => row && groups.contains(&group) && k.is_multiple_of(group),
        }
    }

    /// `rows`, `g32`, `g128z`: the form in a network's text and in names of kernel variants.
    pub(crate) fn word(self) -> String {
        match self.group {
            None => "rows".to_string(),
            Some(group) => format!("g{group}{}", if self.zero_points { "z" } else { "" }),
        }
    }

    fn named(word: &str) -> Option<CodeLayout> {
        if word == "rows" {
            return Some(CodeLayout {
                group: None,
                zero_points: false,
            });
        }
        let digits = word.strip_prefix('g')?;
        let number = digits.trim_end_matches('z');
        Some(CodeLayout {
            group: Some(number.parse().ok().filter(|n| *n > 0)?),
            zero_points: number.len() + 1 == digits.len(),
        })
    }
}

impl ProductPart {
    fn word(self) -> String {
        let codes = self.codes.map_or_else(|| "floats".to_string(), CodeLayout::word);
        format!("{codes}{}", if self.bias { "+bias" } else { "" })
    }

    fn named(word: &str) -> Option<ProductPart> {
        let (codes, bias) = match word.strip_suffix("+bias") {
            Some(codes) => (codes, true),
            None => (word, false),
        };
        let codes = match codes {
            "floats" => None,
            codes => Some(CodeLayout::named(codes)?),
        };
        Some(ProductPart { codes, bias })
    }
}

/// The activation of a [`RowProduct`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum RowActivation {
    /// Nothing.
    #[default]
    None,
    /// `x * sigmoid(x)`.
    Silu,
    /// `x / 2 * (1 + erf(x / sqrt(2)))`.
    GeluErf,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x³)))`.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)²`.
    ReluSquared,
}

impl RowActivation {
    const ALL: [(RowActivation, &'static str); 6] = [
        (RowActivation::None, "none"),
        (RowActivation::Silu, "silu"),
        (RowActivation::GeluErf, "gelu_erf"),
        (RowActivation::GeluTanh, "gelu_tanh"),
        (RowActivation::Relu, "relu"),
        (RowActivation::ReluSquared, "relu_squared"),
    ];

    fn word(self) -> &'static str {
        RowActivation::ALL[self as usize].1
    }
}

/// The inputs of a [`RowProduct`] by name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProductInputs<T> {
    /// The rows.
    pub x: T,
    /// The norm's weight.
    pub norm: Option<T>,
    /// Added to the result.
    pub residual: Option<T>,
    /// The inputs of each matrix.
    pub parts: Vec<PartInputs<T>>,
}

/// The inputs of one matrix of a [`RowProduct`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PartInputs<T> {
    /// The matrix or its codes.
    pub weights: T,
    /// Scales of codes.
    pub scales: Option<T>,
    /// Zero points of codes, if they have any.
    pub zero_points: Option<T>,
    /// Bias of the outputs.
    pub bias: Option<T>,
}

impl<T: Copy> ProductInputs<T> {
    /// From a layer's inputs; `None` if there are too many or too few.
    pub fn of(product: &RowProduct, inputs: &[T]) -> Option<Self> {
        let mut inputs = inputs.iter().copied();
        // An input that the layer does not have is `Some(None)`, a missing one `None`.
        let mut next_if = |there: bool| match there {
            true => inputs.next().map(Some),
            false => Some(None),
        };
        let x = next_if(true)??;
        let norm = next_if(product.norm.is_some())?;
        let residual = next_if(product.residual)?;
        let mut parts = Vec::new();
        for part in &product.parts {
            parts.push(PartInputs {
                weights: next_if(true)??,
                scales: next_if(part.codes.is_some())?,
                zero_points: next_if(part.codes.is_some_and(|codes| codes.zero_points))?,
                bias: next_if(part.bias)?,
            });
        }
        let read = ProductInputs {
            x,
            norm,
            residual,
            parts,
        };
        next_if(true).is_none().then_some(read)
    }

    /// In the layer's order.
    pub fn listed(&self) -> Vec<T> {
        let mut inputs = vec![self.x];
        inputs.extend(self.norm);
        inputs.extend(self.residual);
        for part in &self.parts {
            inputs.push(part.weights);
            inputs.extend([part.scales, part.zero_points, part.bias].into_iter().flatten());
        }
        inputs
    }
}

impl RowProduct {
    /// The maximum number of rows for kernels.
    pub const MOST_ROWS: usize = 16;

    /// `parts: floats floats+bias, norm: 1e-5, ...`: the layer's text without its inputs.
    pub(in crate::network) fn parameters(&self) -> Vec<String> {
        let parts: Vec<String> = self.parts.iter().map(|part| part.word()).collect();
        let mut text = vec![format!("parts: {}", parts.join(" "))];
        text.extend(self.norm.map(|epsilon| format!("norm: {epsilon}")));
        if self.activation != RowActivation::None {
            text.push(format!("activation: {}", self.activation.word()));
        }
        for (flag, name) in [(self.gated, "gated"), (self.residual, "residual"), (self.to_f32, "f32")] {
            if flag {
                text.push(format!("{name}: true"));
            }
        }
        text
    }

    /// Reads what [`RowProduct::parameters`] writes, from the first word after `parts: ` on. `parameter` skips the name
    /// of a parameter if it comes next.
    pub(in crate::network) fn parse(
        line: &mut Cursor,
        mut parameter: impl FnMut(&mut Cursor, &str) -> bool,
    ) -> Parsed<RowProduct> {
        let mut parts = vec![part(line)?];
        while line.eat(" ") {
            parts.push(part(line)?);
        }
        let mut product = RowProduct {
            parts,
            norm: None,
            activation: RowActivation::None,
            gated: false,
            residual: false,
            to_f32: false,
        };
        if parameter(line, "norm") {
            product.norm = Some(line.number(crate::tensor::DType::F32)?.float as f32);
        }
        if parameter(line, "activation") {
            let named = |word: &str| RowActivation::ALL.into_iter().find(|(_, name)| *name == word);
            product.activation = one_of(line, "an activation such as silu", named)?.0;
        }
        for (flag, name) in [
            (&mut product.gated, "gated"),
            (&mut product.residual, "residual"),
            (&mut product.to_f32, "f32"),
        ] {
            if parameter(line, name) {
                line.expect("true")?;
                *flag = true;
            }
        }
        Ok(product)
    }
}

fn part(line: &mut Cursor) -> Parsed<ProductPart> {
    one_of(line, "floats, rows or a group such as g32", ProductPart::named)
}
