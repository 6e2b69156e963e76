//! Quantized weights in networks of an engine: codes, scales and zero points as weights of their own, called as a file calls
//! them (`NAME.codes`, `NAME.scales`, `NAME.zero_points`), and layers that make values of them or multiply with them.
//!
//! [`QuantizedForm`] says how; a value is always `(code - zero point) * scale`. What no layers can read stays one weight of
//! floats ([`widened_formats`]): codes of nf4, fp4, f4e2m1 and f8e5m2, scales that are quantized themselves, rows of packed
//! codes that do not fill their bytes, and of constants what TensorRT fails on (docs/tensorrt-notes.md).
//!
//! # Codes of less than a byte as numbers
//!
//! No arithmetic of TensorRT takes i4, but an i8 input can be gathered, reshaped and cast. So packed codes enter as their
//! bytes, and come apart in floating point, exactly. Of two's complement codes of b bits in a byte `s`, the last is `floor(s /
//! 2^(8-b))`; the first is `s - 2^b * floor((s + 2^(b-1)) / 2^b)`, and the rest is `floor(s / 2^b)`.

use std::collections::BTreeMap;

use super::context::{Lowered, Lowering, one};
use super::{LinearForm, LowerOptions, QuantizedForm};
use crate::dim::Dim;
use crate::graph::quantized::Quantized;
use crate::graph::{Constant, Graph};
use crate::network::{Elementwise, LayerKind, MatrixOp, ReduceOp, Shape, TensorId, Tokens, UnaryOp, WeightMode};
use crate::tensor::quantized::Granularity;
use crate::tensor::{DType, Tensor};

/// `x · weightᵀ`.
const BY_ROWS: LayerKind = LayerKind::MatrixMultiply {
    op_a: MatrixOp::None,
    op_b: MatrixOp::Transpose,
};

/// What the elements of `codes` are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Coding {
    /// Codes that a Dequantize layer reads together with their scales.
    Scaled,
    /// Integers of 8 bits.
    Integers,
    /// Bytes of so many integers each.
    Bytes(usize),
    /// f8e4m3fn.
    Floats,
}

/// What is taken from codes before they are scaled.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Zero<T> {
    Number(i64),
    /// In the scales' shape, integers of 8 bits.
    Points(T),
    /// Zero points times scales, in the scales' shape and dtype: taken from values.
    Scaled(T),
}

/// The parts of a quantized weight: constants, or tensors of the network.
#[derive(Clone, Copy, Debug)]
struct Parts<T> {
    granularity: Granularity,
    codes: T,
    coding: Coding,
    scales: T,
    zero: Zero<T>,
}

/// A quantized weight whose parts stand in the network.
#[derive(Clone, Debug)]
pub(super) struct QuantizedWeight {
    parts: Parts<TensorId>,
    /// Of the values.
    shape: Vec<usize>,
    /// Whether products read the Dequantize layer itself.
    before_products: bool,
}

/// Whether weights can be one below the other: a row keeps its scales.
pub(super) fn stacks(constant: &Constant) -> bool {
    constant.as_quantized().is_none_or(|parts| {
        matches!(
            parts.granularity,
            Granularity::Channel { axis: 0 } | Granularity::Block { axis: 1, .. }
        )
    })
}

/// The parts as they enter the network; `None` if no layers can read them.
fn parts(constant: &Constant, form: QuantizedForm, mode: WeightMode, is_table: bool) -> Option<Parts<Constant>> {
    let quantized = constant.as_quantized()?;
    if quantized.scales.as_quantized().is_some() || quantized.codes.shape().is_empty() {
        return None;
    }
    let bound = mode == WeightMode::Bind;
    let four_bits = matches!(quantized.codes.dtype(), DType::I4 | DType::U4);
    match form {
        QuantizedForm::Whole => None,
        // Rows of a table are gathered, for which no Dequantize layer gives its codes.
        _ if bound && is_table => for_elementwise(quantized),
        QuantizedForm::Elementwise if bound => for_elementwise(quantized),
        _ if bound => for_dequantize(quantized).or_else(|| for_elementwise(quantized)),
        // Constants of 8 bits are slower than floats are (docs/gpu.md), and plans without them are not built.
        _ if is_table || !four_bits => None,
        _ => for_dequantize(quantized),
    }
}

/// Quantized weights that enter networks of an engine as floats, since no layers can read their codes: how many of each
/// format.
pub fn widened_formats(graph: &Graph, options: &LowerOptions) -> BTreeMap<String, usize> {
    let mut formats = BTreeMap::new();
    for weight in super::weights(graph) {
        if let Some(quantized) = weight.constant.as_quantized()
            && parts(
                &weight.constant,
                options.quantized,
                options.weight_mode,
                weight.is_table,
            )
            .is_none()
        {
            *formats.entry(quantized.to_string()).or_insert(0) += 1;
        }
    }
    formats
}

/// Integer codes in two's complement.
fn signed(codes: &Constant) -> Constant {
    match codes.dtype() {
        DType::U8 | DType::U4 | DType::U2 => codes.half_range_moved(),
        _ => codes.clone(),
    }
}

/// What an unsigned code of 0 is in two's complement.
fn lowest(codes: DType) -> i64 {
    match codes {
        DType::U8 | DType::U4 | DType::U2 => -(1 << (codes.bits() - 1)),
        _ => 0,
    }
}

/// Codes that elementwise layers read.
fn for_elementwise(quantized: Quantized<'_>) -> Option<Parts<Constant>> {
    let dtype = quantized.codes.dtype();
    let zero = match quantized.zero_points {
        Some(points) => Zero::Points(signed(points).cast(DType::I8)),
        None => Zero::Number(lowest(dtype)),
    };
    let (codes, coding, zero) = match dtype {
        DType::F8E4M3Fn => (quantized.codes.clone(), Coding::Floats, Zero::Number(0)),
        DType::I8 | DType::U8 => (signed(quantized.codes), Coding::Integers, zero),
        DType::I4 | DType::U4 | DType::I2 | DType::U2 => {
            let bytes = signed(quantized.codes).bytes_as_i8()?;
            (bytes, Coding::Bytes(8 / dtype.bits()), zero)
        }
        _ => return None,
    };
    Some(Parts {
        granularity: quantized.granularity,
        codes,
        coding,
        scales: quantized.scales.clone(),
        zero,
    })
}

/// Codes that a Dequantize layer reads with their scales. It has no zero points.
fn for_dequantize(quantized: Quantized<'_>) -> Option<Parts<Constant>> {
    let Quantized {
        codes,
        scales,
        zero_points,
        granularity,
    } = quantized;
    let dtype = codes.dtype();
    let pairs = codes.shape().last().is_some_and(|n| n.is_multiple_of(2));
    let (granularity, by_block) = in_blocks(codes.shape(), granularity)?;
    let zero = match (dtype, zero_points) {
        (DType::I4 | DType::U4, _) if !pairs => return None,
        (DType::I8 | DType::U8 | DType::I4 | DType::U4, Some(points)) => {
            let Granularity::Block { axis, .. } = granularity else {
                return None;
            };
            let each = Granularity::Block { axis, size: 1 };
            Zero::Scaled(Constant::quantized(signed(&by_block(points)), by_block(scales), None, each).ok()?)
        }
        (DType::U8 | DType::U4, None) => Zero::Scaled(by_block(scales).scaled(lowest(dtype) as f64)),
        (DType::I8 | DType::I4 | DType::F8E4M3Fn, None) => Zero::Number(0),
        _ => return None,
    };
    Some(Parts {
        granularity,
        codes: signed(codes),
        coding: Coding::Scaled,
        scales: by_block(scales),
        zero,
    })
}

/// A granularity as blocks, and what makes scales or zero points those of blocks. Of an input with a scale a channel TensorRT's
/// Dequantize gives wrong values; constants of f8 it widens then, or takes for a product of f8 whose other side must have
/// the same type of scale. `None` for columns that share a scale.
fn in_blocks(shape: &[usize], granularity: Granularity) -> Option<(Granularity, impl Fn(&Constant) -> Constant)> {
    let (rows, depth) = match (granularity, shape) {
        (Granularity::Block { .. }, _) => (0, 0),
        (Granularity::Tensor | Granularity::Channel { axis: 0 }, [rows, depth]) => (*rows, *depth),
        _ => return None,
    };
    let blocks = match granularity {
        Granularity::Block { .. } => granularity,
        _ => Granularity::Block { axis: 1, size: depth },
    };
    let of_blocks = move |part: &Constant| match granularity {
        Granularity::Block { .. } => part.clone(),
        Granularity::Channel { .. } => part.reshaped(vec![rows, 1]),
        Granularity::Tensor => {
            let first = Constant::tensor(Tensor::from_i64(vec![rows], &vec![0; rows]));
            part.reshaped(vec![1, 1]).taken(0, &first)
        }
    };
    Some((blocks, of_blocks))
}

impl<T> Parts<T> {
    /// Each part with what it is called behind the weight's name.
    fn map<U, E>(self, mut with: impl FnMut(&str, T) -> Result<U, E>) -> Result<Parts<U>, E> {
        Ok(Parts {
            granularity: self.granularity,
            codes: with("codes", self.codes)?,
            coding: self.coding,
            scales: with("scales", self.scales)?,
            zero: match self.zero {
                Zero::Number(number) => Zero::Number(number),
                Zero::Points(points) => Zero::Points(with("zero_points", points)?),
                Zero::Scaled(offsets) => Zero::Scaled(with("offsets", offsets)?),
            },
        })
    }
}

/// The part of each weight, which are made of the same parts.
fn columns(all: Vec<Parts<Constant>>) -> Parts<Vec<Constant>> {
    let first = all[0].clone();
    let zero_of = |parts: &Parts<Constant>| match &parts.zero {
        Zero::Points(part) | Zero::Scaled(part) => part.clone(),
        Zero::Number(_) => unreachable!("weights that stand one below the other have the same parts"),
    };
    Parts {
        granularity: first.granularity,
        coding: first.coding,
        zero: match first.zero {
            Zero::Number(number) => Zero::Number(number),
            Zero::Points(_) => Zero::Points(all.iter().map(zero_of).collect()),
            Zero::Scaled(_) => Zero::Scaled(all.iter().map(zero_of).collect()),
        },
        codes: all.iter().map(|parts| parts.codes.clone()).collect(),
        scales: all.into_iter().map(|parts| parts.scales).collect(),
    }
}

/// How codes lie when those that share a scale have an axis of their own: the values' shape with that axis, and the scales'.
fn blocks(shape: &[Dim], granularity: Granularity) -> (Shape, Shape) {
    let mut scales = vec![one(); shape.len()];
    match granularity {
        Granularity::Tensor => (shape.to_vec(), scales),
        Granularity::Channel { axis } => {
            scales[axis] = shape[axis].clone();
            (shape.to_vec(), scales)
        }
        Granularity::Block { axis, size } => {
            let count = shape[axis].as_const().map_or(0, |n| n as usize / size);
            let split = |last: usize| -> Shape {
                let ends = [Dim::from(count), Dim::from(last)];
                [&shape[..axis], &ends, &shape[axis + 1..]].concat()
            };
            (split(size), split(1))
        }
    }
}

impl Lowering<'_> {
    /// Weights, one below the other if they are several, as a tensor of their values. Layers that multiply with it or gather
    /// from it may read its codes instead.
    pub(super) fn weights(&mut self, weights: &[(String, Constant)], is_table: bool) -> Lowered {
        let mode = self.options.weight_mode;
        let named = |part: &str| {
            let names: Vec<String> = weights.iter().map(|(name, _)| format!("{name}{part}")).collect();
            names.join(&super::fuse::SEPARATOR.to_string())
        };
        let stacked = |parts: &[Constant]| match parts {
            [only] => only.clone(),
            several => Constant::concat(several, 0),
        };
        let constants: Vec<Constant> = weights.iter().map(|(_, constant)| constant.clone()).collect();
        let all = constants
            .iter()
            .map(|constant| parts(constant, self.quantized_form(constant), mode, is_table));
        let Some(all) = all.collect::<Option<Vec<_>>>() else {
            return Ok(self.b.weight(&named(""), stacked(&constants), mode)?);
        };
        let mut shape = constants[0].shape().to_vec();
        shape[0] = constants.iter().map(|constant| constant.shape()[0]).sum();
        let parts = columns(all)
            .map(|part, constants| self.b.weight(&named(&format!(".{part}")), stacked(&constants), mode))?;
        let form = self.quantized_form(&constants[0]);
        let weight = QuantizedWeight {
            parts,
            shape,
            before_products: form == QuantizedForm::Dequantize,
        };
        let values = self.values_of_codes(&named(""), &weight)?;
        self.quantized.insert(values, weight);
        Ok(values)
    }

    fn quantized_form(&self, constant: &Constant) -> QuantizedForm {
        let options = self.options;
        let one_row = self.profile.tokens == Tokens::Static(1) && self.profile.batch == 1;
        let form = match options.prefill_quantized {
            Some(form) if !one_row => form,
            _ => options.quantized,
        };
        // Numbers of codes that no sum reads would be written and read again.
        let depth = constant.shape().last().copied().unwrap_or(1);
        let deep = options.reduce_depth.is_some_and(|limit| depth > limit);
        match form {
            QuantizedForm::Elementwise if one_row && deep => QuantizedForm::Dequantize,
            form => form,
        }
    }

    fn values_of_codes(&mut self, name: &str, weight: &QuantizedWeight) -> Lowered {
        let Parts {
            codes,
            coding,
            scales,
            zero,
            ..
        } = weight.parts;
        let shape: Shape = weight.shape.iter().map(|n| Dim::from(*n)).collect();
        let layout = blocks(&shape, weight.parts.granularity);
        if coding == Coding::Scaled {
            let part = |part: &str| format!("{name}/{part}");
            let kind = LayerKind::Dequantize(weight.parts.granularity);
            let values = self.b.add(&part("values"), kind, &[codes, scales])?;
            let Zero::Scaled(offsets) = zero else {
                return match weight.before_products {
                    true => Ok(values),
                    false => self.kept_apart(name, values),
                };
            };
            let values = self.reshape(&part("blocks"), values, layout.0)?;
            let offsets = self.reshape(&part("offsets"), offsets, layout.1)?;
            let centered = self
                .b
                .elementwise(&part("centered"), Elementwise::Sub, values, offsets)?;
            return self.reshape(&part("weight"), centered, shape);
        }
        let dtype = self.b.dtype(scales);
        let numbers = self.codes_as_numbers(name, codes, coding, dtype)?;
        self.scaled_codes(name, numbers, (scales, zero), layout, shape)
    }

    /// `(number - zero) * scale`, of numbers of any shape with the volume of `view`, as `to`.
    fn scaled_codes(
        &mut self,
        name: &str,
        numbers: TensorId,
        (scales, zero): (TensorId, Zero<TensorId>),
        (view, of_scales): (Shape, Shape),
        to: Shape,
    ) -> Lowered {
        let part = |part: &str| format!("{name}/{part}");
        let (dtype, rank) = (self.b.dtype(scales), view.len());
        let numbers = self.reshape(&part("blocks"), numbers, view)?;
        let scales = self.reshape(&part("scale"), scales, of_scales.clone())?;
        let centered = match zero {
            Zero::Number(0) => numbers,
            Zero::Number(number) => {
                let number = self.number(dtype, rank, number as f64)?;
                self.b
                    .elementwise(&part("centered"), Elementwise::Sub, numbers, number)?
            }
            Zero::Points(points) | Zero::Scaled(points) => {
                let points = self.b.cast(&part("zero"), dtype, points)?;
                let points = self.reshape(&part("zeros"), points, of_scales)?;
                self.b
                    .elementwise(&part("centered"), Elementwise::Sub, numbers, points)?
            }
        };
        let values = self
            .b
            .elementwise(&part("values"), Elementwise::Prod, centered, scales)?;
        self.reshape(&part("weight"), values, to)
    }

    /// Codes in floating point, in the shape of the values; those of bytes count from their least.
    fn codes_as_numbers(&mut self, name: &str, codes: TensorId, coding: Coding, dtype: DType) -> Lowered {
        let part = |part: &str| format!("{name}/{part}");
        match coding {
            Coding::Integers => Ok(self.b.cast(&part("numbers"), dtype, codes)?),
            Coding::Floats => {
                let unit = self.number(dtype, 0, 1.0)?;
                let kind = LayerKind::Dequantize(Granularity::Tensor);
                Ok(self.b.add(&part("numbers"), kind, &[codes, unit])?)
            }
            Coding::Bytes(each) => {
                let digits = self.digits(name, codes, each, dtype)?;
                let mut to = self.b.shape(codes).clone();
                let last = to.len();
                to.push(one());
                let mut columns = Vec::with_capacity(each);
                for digit in digits {
                    columns.push(self.reshape(&part("column"), digit, to.clone())?);
                }
                let kind = LayerKind::Concatenation { axis: last };
                let joined = self.b.add(&part("numbers"), kind, &columns)?;
                to.pop();
                to[last - 1] = &to[last - 1] * &Dim::from(each);
                self.reshape(&part("numbers/flat"), joined, to)
            }
            Coding::Scaled => unreachable!("a Dequantize layer reads these codes"),
        }
    }

    /// The codes of bytes, from the one in the lowest bits, as the head of the file says.
    fn digits(&mut self, name: &str, bytes: TensorId, each: usize, dtype: DType) -> Lowered<Vec<TensorId>> {
        let part = |part: &str| format!("{name}/{part}");
        let rank = self.b.rank(bytes);
        let base = f64::from(1u32 << (8 / each));
        let mut number = |value: f64| self.number(dtype, rank, value);
        let (over, times, half) = (number(base.recip())?, number(base)?, number(0.5)?);
        let mut rest = self.b.cast(&part("bytes"), dtype, bytes)?;
        let mut digits = Vec::with_capacity(each);
        for _ in 1..each {
            let quotient = self.b.elementwise(&part("quotient"), Elementwise::Prod, rest, over)?;
            let nearest = self.b.elementwise(&part("nearest"), Elementwise::Sum, quotient, half)?;
            let nearest = self.b.unary(&part("whole"), UnaryOp::Floor, nearest)?;
            let multiple = self
                .b
                .elementwise(&part("multiple"), Elementwise::Prod, nearest, times)?;
            digits.push(self.b.elementwise(&part("digit"), Elementwise::Sub, rest, multiple)?);
            rest = self.b.unary(&part("rest"), UnaryOp::Floor, quotient)?;
        }
        digits.push(rest);
        Ok(digits)
    }

    /// `x · weightᵀ` for a quantized weight `[out, in]`, if `weight` is one.
    pub(super) fn quantized_linear(&mut self, name: &str, x: TensorId, values: TensorId) -> Lowered<Option<TensorId>> {
        let weight = match self.quantized.get(&values) {
            Some(weight) if weight.shape.len() == 2 => weight.clone(),
            _ => return Ok(None),
        };
        let shape = self.b.shape(x).clone();
        let flat = match shape.len() {
            2 => x,
            _ => self.flattened(x)?,
        };
        let by_row = self.b.shape(flat)[0].is_one()
            && weight.parts.coding != Coding::Scaled
            && self.options.linear == LinearForm::ReduceRow;
        let in_sums = match by_row {
            true => self.reduced_codes(name, flat, &weight)?,
            false => None,
        };
        let product = match (in_sums, weight.parts.zero) {
            (Some(product), _) => product,
            (None, Zero::Scaled(offsets)) if weight.before_products => {
                match self.centered_product(name, flat, &weight, offsets)? {
                    Some(product) => product,
                    None => self.b.add(name, BY_ROWS, &[flat, values])?,
                }
            }
            (None, _) => self.b.add(name, BY_ROWS, &[flat, values])?,
        };
        let to = shape[..shape.len() - 1].iter().cloned();
        let to = to.chain([Dim::from(weight.shape[0])]).collect();
        Ok(Some(self.reshape(&format!("{name}/unflat"), product, to)?))
    }

    /// `x · (codes * scales)ᵀ - sums of x by block · offsetsᵀ`: offsets taken from values would come between codes and the
    /// product. `None` unless blocks lie along rows.
    fn centered_product(
        &mut self,
        name: &str,
        x: TensorId,
        weight: &QuantizedWeight,
        offsets: TensorId,
    ) -> Lowered<Option<TensorId>> {
        let part = |part: &str| format!("{name}/{part}");
        let Granularity::Block { axis: 1, size } = weight.parts.granularity else {
            return Ok(None);
        };
        let blocks = weight.shape[1] / size;
        let kind = LayerKind::Dequantize(weight.parts.granularity);
        let scaled = self
            .b
            .add(&part("scaled"), kind, &[weight.parts.codes, weight.parts.scales])?;
        let product = self.b.add(&part("uncentered"), BY_ROWS, &[x, scaled])?;
        let view = vec![self.b.shape(x)[0].clone(), Dim::from(blocks), Dim::from(size)];
        let x = self.reshape(&part("blocks"), x, view)?;
        let sums = LayerKind::Reduce {
            op: ReduceOp::Sum,
            axes: vec![2],
            keep_dims: false,
        };
        let sums = self.b.add(&part("sums"), sums, &[x])?;
        let offset = self.b.add(&part("offset"), BY_ROWS, &[sums, offsets])?;
        let centered = self.b.elementwise(name, Elementwise::Sub, product, offset)?;
        Ok(Some(centered))
    }

    /// `[1, k] · [n, k]ᵀ` as sums over products with codes, in fp32. `None` if scales do not belong to rows.
    fn reduced_codes(&mut self, name: &str, x: TensorId, weight: &QuantizedWeight) -> Lowered<Option<TensorId>> {
        let part = |part: &str| format!("{name}/{part}");
        let (rows, depth) = (weight.shape[0], weight.shape[1]);
        let Parts {
            codes,
            coding,
            scales,
            zero,
            ..
        } = weight.parts;
        let each = match coding {
            Coding::Bytes(each) => each,
            _ => 1,
        };
        let (count, of_rows) = match weight.parts.granularity {
            Granularity::Block { axis: 1, size } => (depth / size, rows),
            Granularity::Channel { axis: 0 } => (1, rows),
            Granularity::Tensor => (1, 1),
            _ => return Ok(None),
        };
        let size = depth / count;
        if !size.is_multiple_of(each) {
            return Ok(None);
        }
        let dtype = self.b.dtype(x);
        let dims = |dims: [usize; 3]| -> Shape { dims.map(Dim::from).to_vec() };
        let x = self.b.cast(&part("row"), DType::F32, x)?;
        let x = self.reshape(&part("blocks"), x, dims([1, count, size]))?;
        let scales = self.b.cast(&part("scale"), DType::F32, scales)?;
        let scales = self.reshape(&part("scales"), scales, dims([of_rows, count, 1]))?;
        let numbers = match coding {
            Coding::Bytes(each) => {
                let codes = self.reshape(&part("codes"), codes, dims([rows, count, size / each]))?;
                self.digits(name, codes, each, DType::F32)?
            }
            _ => {
                let numbers = self.codes_as_numbers(name, codes, coding, DType::F32)?;
                vec![self.reshape(&part("codes"), numbers, dims([rows, count, size]))?]
            }
        };
        let zero = match zero {
            Zero::Number(0) => None,
            Zero::Number(number) => Some(self.number(DType::F32, 3, number as f64)?),
            Zero::Points(points) | Zero::Scaled(points) => {
                let points = self.b.cast(&part("zero"), DType::F32, points)?;
                Some(self.reshape(&part("zeros"), points, dims([of_rows, count, 1]))?)
            }
        };
        let mut terms = None;
        for (i, number) in numbers.into_iter().enumerate() {
            let x = match each {
                1 => x,
                _ => {
                    let kind = LayerKind::Slice {
                        start: vec![0, 0, i as i64],
                        size: dims([1, count, size / each]),
                        stride: vec![1, 1, each as i64],
                    };
                    self.b.add(&part("every"), kind, &[x])?
                }
            };
            let number = match zero {
                Some(zero) => self.b.elementwise(&part("centered"), Elementwise::Sub, number, zero)?,
                None => number,
            };
            let product = self.b.elementwise(&part("terms"), Elementwise::Prod, number, x)?;
            terms = Some(match terms {
                Some(sum) => self.b.elementwise(&part("sum"), Elementwise::Sum, sum, product)?,
                None => product,
            });
        }
        let terms = terms.expect("a byte holds codes");
        let scaled = self.b.elementwise(&part("scaled"), Elementwise::Prod, terms, scales)?;
        let sum = LayerKind::Reduce {
            op: ReduceOp::Sum,
            axes: vec![1, 2],
            keep_dims: true,
        };
        let sums = self.b.add(&part("sums"), sum, &[scaled])?;
        let sums = self.b.cast(&part("narrow"), dtype, sums)?;
        Ok(Some(self.reshape(name, sums, vec![one(), Dim::from(rows)])?))
    }

    /// Rows of a quantized table, as values; `None` if `table` is none, or rows are not by themselves.
    pub(super) fn quantized_rows(
        &mut self,
        name: &str,
        table: TensorId,
        indices: TensorId,
    ) -> Lowered<Option<TensorId>> {
        let weight = match self.quantized.get(&table) {
            // No layer gathers codes of floats.
            Some(weight) if !matches!(weight.parts.coding, Coding::Scaled | Coding::Floats) => weight.clone(),
            _ => return Ok(None),
        };
        if matches!(weight.parts.granularity, Granularity::Block { axis: 0, .. }) {
            return Ok(None);
        }
        // Scales of other axes than that of the rows are the same for all.
        let by_row = !matches!(
            weight.parts.granularity,
            Granularity::Tensor | Granularity::Channel { axis: 1.. }
        );
        let parts = weight.parts.map(|part, tensor| match part == "codes" || by_row {
            true => self.b.add(
                &format!("{name}/{part}"),
                LayerKind::Gather { axis: 0 },
                &[tensor, indices],
            ),
            false => Ok(tensor),
        })?;
        let leading = self.b.shape(indices).clone();
        let row: Shape = weight.shape[1..].iter().map(|n| Dim::from(*n)).collect();
        let more = leading.len();
        let to = [&leading[..], &row].concat();
        let layout = match weight.parts.granularity {
            Granularity::Channel { axis: 0 } => (to.clone(), [&leading[..], &vec![one(); row.len()]].concat()),
            Granularity::Channel { axis } => blocks(&to, Granularity::Channel { axis: axis + more - 1 }),
            Granularity::Block { axis, size } => {
                let axis = axis + more - 1;
                blocks(&to, Granularity::Block { axis, size })
            }
            Granularity::Tensor => blocks(&to, Granularity::Tensor),
        };
        let dtype = self.b.dtype(parts.scales);
        let numbers = self.codes_as_numbers(name, parts.codes, parts.coding, dtype)?;
        Ok(Some(self.scaled_codes(
            name,
            numbers,
            (parts.scales, parts.zero),
            layout,
            to,
        )?))
    }
}
