//! Quantized weights: every exporter's form becomes a constant of codes, scales and zero points with the semantics of
//! ONNX's `DequantizeLinear` ([`Constant::quantized`]), under ordinary `MatMul` and `Gather` nodes.
//!
//! Codes stay the bytes of the file: another element type is another view of them, and computations are deferred.
//! Symmetric integer codes become signed codes without zero points, whatever form the exporter uses.

use super::{Failure, Replacement, SourceNode};
use crate::graph::eval::reshape_target;
use crate::graph::op::{AttributeSource, LAPIDARY, Op};
use crate::graph::{Constant, ConstantSource, ValueId};
use crate::onnx::functions::table_of;
use crate::onnx::tensor::code_name;
use crate::tensor::quantized::{Granularity, QuantizedError, zero_points_as};
use crate::tensor::{DType, Tensor};

/// A linear layer `x · weight + bias` whose weight is a constant.
pub(super) struct QuantizedLinear {
    /// `[.., in]`.
    pub x: Option<ValueId>,
    /// `[in, out]`.
    pub weight: Constant,
    /// `[in]`, i64: the column of x for each row of the weight.
    pub order: Option<Constant>,
    /// `[out]`.
    pub bias: Option<ValueId>,
}

impl From<QuantizedError> for Failure {
    fn from(error: QuantizedError) -> Self {
        Failure::Problem(error.to_string())
    }
}

fn problem(text: String) -> Failure {
    Failure::Problem(text)
}

impl SourceNode<'_> {
    /// Lapidary's operators, which only its own files contain.
    pub(super) fn own_operator(&self) -> Result<Replacement, Failure> {
        match table_of(self.op_type) {
            Some(dtype) => self.dequantize_table(dtype),
            None => self.read_as(LAPIDARY, self.op_type),
        }
    }

    /// Codes of a table of numbers, stored as uint4 in ONNX: see [`crate::onnx::functions`].
    fn dequantize_table(&self, dtype: DType) -> Result<Replacement, Failure> {
        let size = self.attributes.required_count("block_size")?;
        let codes = self.required_constant(0, "codes")?;
        let scales = self.required_constant(1, "scales")?;
        let axis = codes.shape().len().checked_sub(1);
        let axis = axis.ok_or_else(|| problem("its codes are a scalar".to_string()))?;
        let codes = viewed(&codes, dtype, codes.shape().to_vec(), "codes")?;
        let constant = Constant::quantized(codes, scales, None, Granularity::Block { axis, size })?;
        Ok(Replacement::Constant(constant))
    }

    pub(super) fn input(&self, i: usize) -> Option<ValueId> {
        self.inputs.get(i).copied().flatten()
    }

    /// The constant that an input is, over reshapes to known shapes.
    pub(super) fn constant_input(&self, i: usize) -> Option<Constant> {
        self.constant_of(self.input(i)?, 0)
    }

    fn constant_of(&self, value: ValueId, depth: usize) -> Option<Constant> {
        const LONGEST: usize = 8;
        if let Some(constant) = self.graph.constant(value) {
            return Some(constant.clone());
        }
        let (_, node) = self.graph.def(value)?;
        let source = (depth < LONGEST)
            .then(|| self.constant_of(node.input(0)?, depth + 1))
            .flatten()?;
        match node.op {
            Op::Identity => Some(source),
            Op::Reshape { allowzero } => {
                let shape = self.graph.constant(node.input(1)?)?.materialize().ok()?.to_i64();
                let shape = reshape_target(source.shape(), &shape, allowzero).ok()?;
                of_shape(&source, &shape, "constant").ok()
            }
            _ => None,
        }
    }

    /// The constant that an input is; `None` if the input is omitted.
    pub(super) fn optional_constant(&self, i: usize, what: &str) -> Result<Option<Constant>, Failure> {
        match (self.constant_input(i), self.input(i)) {
            (None, Some(_)) => Err(Failure::Unsupported(format!("{what} that are not constant"))),
            (constant, _) => Ok(constant),
        }
    }

    pub(super) fn required_constant(&self, i: usize, what: &str) -> Result<Constant, Failure> {
        let constant = self.optional_constant(i, what)?;
        constant.ok_or_else(|| problem(format!("it has no {what}")))
    }

    /// The float zero points, or integer ones, of codes, in the codes' type.
    fn zero_points(&self, i: usize, codes: DType) -> Result<Option<Constant>, Failure> {
        let constant = self.optional_constant(i, "zero points")?;
        Ok(constant.filter(|constant| !is_idle(constant, codes)))
    }

    /// `DequantizeLinear`: a constant if codes and scales are constants, the operator otherwise.
    pub(super) fn dequantize_linear(&self) -> Result<Replacement, Failure> {
        let axis = self.attributes.int("axis")?.unwrap_or(1);
        let block_size = self.block_size()?;
        let output = self.dtype("output_dtype")?;
        let (Some(codes), Some(scales)) = (self.constant_input(0), self.constant_input(1)) else {
            if let Some(dtype) = output {
                return Err(Failure::Unsupported(format!("output_dtype={dtype}")));
            }
            return Ok(Replacement::Op(Op::DequantizeLinear { axis, block_size }));
        };
        if self.input(2).is_some() && self.constant_input(2).is_none() {
            return Ok(Replacement::Op(Op::DequantizeLinear { axis, block_size }));
        }
        if codes.dtype() == DType::F8E8M0 {
            return Err(problem(format!(
                "its codes are {}, a type for scales only",
                codes.dtype()
            )));
        }
        let zero_points = self.zero_points(2, codes.dtype())?;
        let granularity = granularity(codes.shape(), &scales, axis, block_size)?;
        let (scales, output) = match (scales.dtype(), output) {
            (DType::F8E8M0, None) => {
                return Err(problem("its scales are f8e8m0, and it has no output_dtype".to_string()));
            }
            // The product has the output's type, in which powers of two are exact.
            (DType::F8E8M0, Some(dtype)) => (scales.microscales(dtype)?, None),
            (_, output) => (scales, output),
        };
        let constant = Constant::quantized(codes, scales, zero_points, granularity)?;
        Ok(Replacement::Constant(match output {
            Some(dtype) => constant.cast(dtype),
            None => constant,
        }))
    }

    /// `QuantizeLinear`: deferred codes if all inputs are constants, the operator otherwise.
    pub(super) fn quantize_linear(&self) -> Result<Replacement, Failure> {
        let axis = self.attributes.int("axis")?.unwrap_or(1);
        let block_size = self.block_size()?;
        // `precision`: the quotient's type, which matters only for half floats. `saturate`: out-of-range floats, which
        // saturate in every case here.
        self.attributes.ignore(&["precision"]);
        if self.attributes.is_int("saturate", 1) {
            self.attributes.ignore(&["saturate"]);
        }
        let code = self.attributes.int("output_dtype")?.filter(|code| *code != 0);
        let stated = code.map(|code| i32::try_from(code).unwrap_or(-1));
        let stated = match stated {
            Some(code) => Some(
                DType::of_onnx_code(code)
                    .ok_or_else(|| Failure::Unsupported(format!("output_dtype={}", code_name(code))))?,
            ),
            None => None,
        };
        let zero_point = self.input(2).and_then(|v| self.graph.value(v).dtype);
        if self.input(2).is_some() && zero_point.is_none() {
            return Err(Failure::Unsupported("zero points of an unknown type".to_string()));
        }
        let to = zero_point.or(stated).unwrap_or(DType::U8);
        if let (Some(stated), Some(zero)) = (stated, zero_point)
            && stated != zero
        {
            return Err(problem(format!(
                "its output_dtype is {stated}, and its zero points are {zero}"
            )));
        }
        let (Some(values), Some(scales)) = (self.constant_input(0), self.constant_input(1)) else {
            return Ok(Replacement::Op(Op::QuantizeLinear { axis, block_size, to }));
        };
        let granularity = granularity(values.shape(), &scales, axis, block_size)?;
        let zero_points = self.zero_points(2, to)?;
        Ok(Replacement::Constant(values.quantize(
            to,
            scales,
            zero_points,
            granularity,
        )?))
    }

    fn block_size(&self) -> Result<usize, Failure> {
        let size = self.attributes.int("block_size")?.unwrap_or(0);
        usize::try_from(size).map_err(|_| problem(format!("its block_size is {size}")))
    }

    /// `com.microsoft::MatMulNBits`. Inputs: A `[.., K]`, B `[N, blocks, block_size·bits/8]` u8, scales `[N, blocks]` (or
    /// flat), zero points packed row by row or as floats, g_idx `[K]`, bias `[N]`.
    pub(super) fn matmul_n_bits(&self) -> Result<Replacement, Failure> {
        let a = &self.attributes;
        let (depth, columns) = (a.required_count("K")?, a.required_count("N")?);
        let (bits, size) = (a.count("bits")?.unwrap_or(4), a.required_count("block_size")?);
        // The precision of a runtime's arithmetic; Lapidary always computes with the dequantized values.
        a.ignore(&["accuracy_level"]);
        self.expect_zero(&["weight_prepacked"]);
        let dtype = code_type(bits)?;
        if size == 0 {
            return Err(problem("its block_size is 0".to_string()));
        }
        let blocks = depth.div_ceil(size);
        let padded = blocks * size;
        let codes = self.required_constant(1, "codes")?;
        let codes = viewed(&codes, dtype, vec![columns, padded], "B")?.sliced(1, 0, depth);
        let scales = self.required_constant(2, "scales")?;
        let mut scales = of_shape(&scales, &[columns, blocks], "scales")?;
        let mut zero_points = match self.optional_constant(3, "zero points")? {
            Some(zeros) => Some(self.packed_zero_points(&zeros, dtype, [columns, blocks])?),
            None => None,
        };
        let mut codes = codes;
        if zero_points.is_none() {
            codes = codes.half_range_moved();
        }
        let order = match self.constant_input(4) {
            Some(groups) => self.group_order(&groups, depth, size)?,
            None if self.input(4).is_some() => {
                return Err(Failure::Unsupported("g_idx that is not constant".to_string()));
            }
            None => None,
        };
        if let Some(order) = &order {
            codes = codes.taken(1, order);
        }
        let mut size = size;
        if depth != padded {
            // If the depth is not a multiple of the block size: smaller blocks that divide it.
            let divisor = gcd(depth, size);
            let finer = |part: &Constant| {
                let apart = part.reshaped(vec![columns, blocks, 1]);
                let repeated = Constant::concat(&vec![apart; size / divisor], 2);
                let flat = repeated.reshaped(vec![columns, padded / divisor]);
                flat.sliced(1, 0, depth / divisor)
            };
            (scales, zero_points) = (finer(&scales), zero_points.as_ref().map(finer));
            size = divisor;
        }
        let weight = Constant::quantized(codes, scales, zero_points, Granularity::Block { axis: 1, size })?;
        Ok(Replacement::Linear(QuantizedLinear {
            x: self.input(0),
            weight: weight.transposed(&[1, 0]),
            order,
            bias: self.input(5),
        }))
    }

    /// Zero points of `[columns, blocks]` in the codes' type: bytes whose rows are padded, or floats that are whole numbers.
    pub(super) fn packed_zero_points(
        &self,
        zeros: &Constant,
        codes: DType,
        [columns, blocks]: [usize; 2],
    ) -> Result<Constant, Failure> {
        if zeros.dtype().is_float() {
            let zeros = of_shape(zeros, &[columns, blocks], "zero points")?;
            let Ok(tensor) = zeros.materialize() else {
                return Err(Failure::Unsupported("absent floating-point zero points".to_string()));
            };
            let whole: Vec<i64> = tensor.to_f64().into_iter().map(|v| v as i64).collect();
            if tensor.to_f64().iter().zip(&whole).any(|(v, w)| *v != *w as f64) {
                return Err(Failure::Unsupported("zero points that are not integers".to_string()));
            }
            let whole = Tensor::from_i64(tensor.shape().to_vec(), &whole);
            return Ok(zero_points_as(codes, &whole)?.into());
        }
        if zeros.dtype() != DType::U8 {
            return Err(problem(format!("its zero points are {}", zeros.dtype())));
        }
        let each = 8 / codes.bits();
        let padded = blocks.div_ceil(each) * each;
        Ok(viewed(zeros, codes, vec![columns, padded], "zero points")?.sliced(1, 0, blocks))
    }

    /// The order of columns that makes each group contiguous; `None` if groups already are.
    fn group_order(&self, groups: &Constant, depth: usize, size: usize) -> Result<Option<Constant>, Failure> {
        // Some exporters pad to whole blocks.
        if groups.shape().len() != 1 || groups.len() < depth {
            return Err(problem(format!(
                "its g_idx has the shape {:?}, and K is {depth}",
                groups.shape()
            )));
        }
        let groups = groups.sliced(0, 0, depth);
        let Ok(tensor) = groups.materialize() else {
            return Err(Failure::Unsupported("an absent g_idx".to_string()));
        };
        let found = tensor.to_i64();
        if found.iter().enumerate().all(|(k, group)| *group == (k / size) as i64) {
            return Ok(None);
        }
        let mut counts = vec![0usize; depth.div_ceil(size)];
        for (k, group) in found.iter().enumerate() {
            let count = usize::try_from(*group).ok().and_then(|group| counts.get_mut(group));
            let Some(count) = count else {
                return Err(problem(format!(
                    "its g_idx has the group {group} at {k}, and there are {}",
                    counts.len()
                )));
            };
            *count += 1;
        }
        // The last group is short if blocks do not divide the depth.
        let columns = |group: usize| size.min(depth - group * size);
        match (0..counts.len()).find(|group| counts[*group] != columns(*group)) {
            Some(group) => Err(Failure::Unsupported(format!(
                "g_idx with {} columns in group {group}, where block_size is {size} and K is {depth}",
                counts[group]
            ))),
            None => Ok(Some(groups.order())),
        }
    }

    /// `com.microsoft::MatMulBnb4`. Inputs: A, B u8 flat with the first of two codes in the high half, absmax of blocks of the
    /// flat `[N, K]`.
    pub(super) fn matmul_bnb4(&self) -> Result<Replacement, Failure> {
        let a = &self.attributes;
        let (depth, columns) = (a.required_count("K")?, a.required_count("N")?);
        let size = a.required_count("block_size")?;
        let dtype = match a.int("quant_type")? {
            Some(0) => DType::Fp4,
            Some(1) => DType::Nf4,
            other => return Err(problem(format!("its quant_type is {other:?}"))),
        };
        a.ignore(&["training_mode", "transB"]);
        if size == 0 || !depth.is_multiple_of(size) {
            return Err(Failure::Unsupported(format!(
                "blocks of {size} that do not divide K={depth}"
            )));
        }
        let codes = self.required_constant(1, "codes")?;
        let codes = viewed(&codes, dtype, vec![columns, depth], "B")?.halves_swapped();
        let scales = self.required_constant(2, "absmax")?;
        let scales = of_shape(&scales, &[columns, depth / size], "absmax")?;
        let weight = Constant::quantized(codes, scales, None, Granularity::Block { axis: 1, size })?;
        Ok(Replacement::Linear(QuantizedLinear {
            x: self.input(0),
            weight: weight.transposed(&[1, 0]),
            order: None,
            bias: None,
        }))
    }

    /// `com.microsoft::GatherBlockQuantized`. Inputs: data, indices, scales, zero points. Data of u8 has `bits` per
    /// code and the zero point 2^(bits-1) by default; int4 and uint4 have 0.
    pub(super) fn gather_block_quantized(&self) -> Result<Replacement, Failure> {
        let a = &self.attributes;
        let data = self.required_constant(0, "codes")?;
        let rank = data.shape().len() as i64;
        let axis = |name: &str, default: i64| -> Result<usize, Failure> {
            let axis = a.int_or(name, default)?;
            let found = if axis < 0 { axis + rank } else { axis };
            usize::try_from(found)
                .ok()
                .filter(|axis| (*axis as i64) < rank)
                .ok_or_else(|| problem(format!("its {name} is {axis}, of codes of rank {rank}")))
        };
        let (gather, quantize) = (axis("gather_axis", 0)?, axis("quantize_axis", 1)?);
        let size = a.count("block_size")?.unwrap_or(128);
        let bits = a.count("bits")?.unwrap_or(4);
        if gather == quantize {
            return Err(Failure::Unsupported("gather_axis=quantize_axis".to_string()));
        }
        let scales = self.required_constant(2, "scales")?;
        let mut shape = data.shape().to_vec();
        let is_bytes = data.dtype() == DType::U8;
        let dtype = if is_bytes { code_type(bits)? } else { data.dtype() };
        if is_bytes {
            if quantize + 1 != shape.len() {
                return Err(Failure::Unsupported(
                    "bytes that are not quantized on the last axis".to_string(),
                ));
            }
            shape[quantize] *= 8 / bits;
        }
        let mut codes = viewed(&data, dtype, shape.clone(), "data")?;
        let granularity = Granularity::Block { axis: quantize, size };
        let of_scales = granularity.scale_shape(&shape)?;
        let scales = of_shape(&scales, &of_scales, "scales")?;
        let zero_points = match self.optional_constant(3, "zero points")? {
            Some(zeros) if is_bytes => {
                let [rows, blocks] = [of_scales[..quantize].iter().product(), of_scales[quantize]];
                Some(
                    self.packed_zero_points(&zeros, dtype, [rows, blocks])?
                        .reshaped(of_scales),
                )
            }
            Some(zeros) => Some(of_shape(&zeros, &of_scales, "zero points")?),
            None => None,
        };
        if zero_points.is_none() && is_bytes {
            codes = codes.half_range_moved();
        }
        let table = Constant::quantized(codes, scales, zero_points, granularity)?;
        Ok(Replacement::Lookup {
            table,
            indices: self.input(1),
            axis: gather as i64,
        })
    }
}

/// Zero points without effect, for types that have none: exporters write zeros for float codes.
pub(super) fn is_idle(zero_points: &Constant, codes: DType) -> bool {
    let has_none = codes.is_float_format() || codes == DType::I32;
    has_none
        && zero_points
            .materialize()
            .is_ok_and(|tensor| tensor.to_f32().iter().all(|v| *v == 0.0))
}

/// The unsigned type of this many bits.
pub(super) fn code_type(bits: usize) -> Result<DType, Failure> {
    match bits {
        2 => Ok(DType::U2),
        4 => Ok(DType::U4),
        8 => Ok(DType::U8),
        _ => Err(Failure::Unsupported(format!("bits={bits}"))),
    }
}

/// Which codes share a scale, by `DequantizeLinear`'s attributes.
fn granularity(shape: &[usize], scales: &Constant, axis: i64, block_size: usize) -> Result<Granularity, Failure> {
    Granularity::of_attributes(shape.len(), axis, block_size, scales.shape())
        .ok_or_else(|| problem(format!("its axis is {axis}, of a tensor of shape {shape:?}")))
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Bytes viewed as packed elements of another type; nothing is copied.
pub(super) fn viewed(bytes: &Constant, dtype: DType, shape: Vec<usize>, what: &str) -> Result<Constant, Failure> {
    let found = (bytes.dtype(), bytes.byte_len());
    let expected = dtype.byte_len_of(&shape);
    if expected != Some(found.1) || bytes.dtype().bits() > 8 {
        return Err(problem(format!(
            "{what} is {} {:?}, and {dtype} {shape:?} takes {} bytes",
            bytes.dtype(),
            bytes.shape(),
            expected.map_or("too many".to_string(), |n| n.to_string())
        )));
    }
    if bytes.dtype() == dtype {
        return Ok(bytes.reshaped(shape));
    }
    // Reshapes in between do not change the bytes.
    let mut source = bytes;
    while let ConstantSource::Derived(derived) = source.source()
        && derived.transform == crate::graph::Transform::Reshape
    {
        source = &derived.inputs[0];
    }
    let view = match source.source() {
        ConstantSource::Tensor(tensor) => {
            Constant::tensor(Tensor::new(dtype, shape, tensor.data().clone()).expect("the length was compared"))
        }
        ConstantSource::Absent => Constant::absent(dtype, shape),
        ConstantSource::Derived(_) => {
            return Err(Failure::Unsupported(format!("{what} computed by other operators")));
        }
    };
    Ok(match source.origin() {
        Some(origin) => view.with_origin(origin),
        None => view,
    })
}

/// A constant of this shape, or flat with as many elements.
pub(super) fn of_shape(constant: &Constant, shape: &[usize], what: &str) -> Result<Constant, Failure> {
    let volume = shape.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim));
    if volume == Some(constant.len()) {
        return Ok(constant.reshaped(shape.to_vec()));
    }
    Err(problem(format!(
        "the {what} have the shape {:?}, and {shape:?} is needed",
        constant.shape()
    )))
}
