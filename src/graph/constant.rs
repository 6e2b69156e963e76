//! Constants of a graph: bytes in a mapped file, or a recipe that computes a constant from such bytes.
//!
//! A pass that transposes, slices or converts a weight must not process hundreds of megabytes: it records a
//! [`Transform`], and the bytes are computed once, when the package is written. Shape and dtype are always known.
//!
//! A quantized weight is a recipe too, [`Transform::Dequantize`] over codes, scales and zero points, and has the dtype
//! and shape of its values; [`Constant::as_quantized`] gives the parts. Movements keep it quantized if blocks stay
//! whole (see [`super::quantized`]).

use std::fmt::{self, Write};
use std::sync::Arc;

use bytes::Bytes;

use super::quantize::RoundToNearest;
use super::quantized::Quantized;
use crate::help::Help;
use crate::tensor::quantized::{Granularity, QuantizedError, check_types};
use crate::tensor::{DType, Tensor};

/// A constant tensor, possibly not computed yet. Cloning is cheap.
#[derive(Clone)]
pub struct Constant {
    dtype: DType,
    shape: Vec<usize>,
    source: ConstantSource,
    origin: Option<Arc<str>>,
}

/// Where a constant's bytes come from.
#[derive(Clone)]
pub enum ConstantSource {
    /// Available bytes: mapped from a file, or small and owned.
    Tensor(Tensor),
    /// To be computed from other constants when the bytes are needed.
    Derived(Arc<Derived>),
    /// Absent from a stripped package; only dtype and shape are known.
    Absent,
}

/// A deferred computation on constants.
pub struct Derived {
    /// The computation.
    pub transform: Transform,
    /// Its inputs, in the transform's order.
    pub inputs: Vec<Constant>,
}

/// The computations a pass may defer. Shapes below are of the single input unless said otherwise.
#[derive(Clone, Debug, PartialEq)]
pub enum Transform {
    /// `output[.., i_perm[k], ..] = input[.., i_k, ..]` as in ONNX `Transpose`.
    Transpose(Vec<usize>),
    /// The same bytes under the result's shape.
    Reshape,
    /// Element conversion to the result's dtype, rounding to nearest even.
    Cast,
    /// `input[.., start..end, ..]` on one axis.
    Slice {
        /// Axis of the input.
        axis: usize,
        /// First index.
        start: usize,
        /// After the last index.
        end: usize,
    },
    /// All inputs concatenated on one axis.
    Concat {
        /// Axis of all inputs.
        axis: usize,
    },
    /// Every element multiplied by a number in fp32, as when a scale is folded into a weight.
    Scale(f64),
    /// Every element plus a number in fp32.
    Offset(f64),
    /// Inputs: codes, scales and optionally zero points. ONNX's `DequantizeLinear`, to the scales' dtype.
    Dequantize(Granularity),
    /// Tensors in another program's packing: see [`Constant::decoded`].
    Decode(Decode),
    /// Inputs: floats, scales and optionally zero points. Codes of the result's dtype, as ONNX's `QuantizeLinear`
    /// defines them.
    Quantize(Granularity),
    /// Unsigned codes of b bits to two's complement codes of the same width, each minus 2^(b-1), so that the middle of
    /// the range becomes 0; two's complement codes to unsigned ones.
    HalfRange,
    /// Packed 4-bit codes with the two halves of every byte swapped, for files whose first code is in the high half.
    SwapHalves,
    /// The bytes of packed codes as i8. The last axis is shorter by the number of codes per byte.
    Bytes,
    /// Inputs: a tensor and indices `[n]`. The slices of an axis in the order of the indices, as in ONNX's `Gather`.
    Take {
        /// Axis of the first input.
        axis: usize,
    },
    /// The indices that stably sort a vector of integers; i64.
    Order,
    /// Inputs: floats and optionally the importance of their columns. Codes, scales or zero points.
    RoundToNearest(RoundToNearest),
    /// Inputs: a tensor and a vector. Every element times the vector's element at its index on the axis, in fp32.
    Factors {
        /// Axis of the tensor.
        axis: usize,
    },
    /// Inputs: matrices `w` `[out, in]`, `b` `[out, rank]`, `a` `[rank, in]`. `w + scale * b a`, in fp32.
    PlusProduct {
        /// Scale of the product.
        scale: f64,
    },
    /// Inputs: a matrix `[out, in]` and lengths `[out]`. Every row scaled to its length (Euclidean norm), in fp32.
    RowLengths,
}

/// How tensors in another program's packing are decoded.
#[derive(Clone)]
pub struct Decode {
    /// For dumps.
    name: &'static str,
    read: Arc<DecodeFn>,
}

/// The elements of the result from the materialized inputs; as many bytes as its dtype and shape require.
type DecodeFn = dyn Fn(&[Tensor]) -> Bytes + Send + Sync;

impl Decode {
    /// The bytes of the result.
    pub(super) fn read(&self, inputs: &[Tensor]) -> Bytes {
        (self.read)(inputs)
    }
}

impl PartialEq for Decode {
    fn eq(&self, other: &Decode) -> bool {
        Arc::ptr_eq(&self.read, &other.read)
    }
}

impl fmt::Debug for Decode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// Why a constant's bytes are not available.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConstantError {
    /// A weight of a stripped package.
    #[error("the weight {name:?} is not in this stripped package")]
    Absent {
        /// In the export, or `unnamed`.
        name: String,
    },
    /// A weight to be quantized.
    #[error("{name:?} cannot be quantized: {count} of {len} values are NaN or infinite")]
    NotFinite {
        /// In the export, or `unnamed`.
        name: String,
        /// How many.
        count: usize,
        /// Numbers of the weight.
        len: usize,
    },
}

impl Help for ConstantError {
    fn help(&self) -> Option<String> {
        match self {
            ConstantError::Absent { .. } => Some("bring it back with `lapidary refit`".to_string()),
            ConstantError::NotFinite { name, .. } => Some(format!(
                "keep it in floating point with `keep={name}` in --quantize, or repair the weight"
            )),
        }
    }
}

impl Constant {
    /// Available bytes.
    pub fn tensor(tensor: Tensor) -> Self {
        Constant {
            dtype: tensor.dtype(),
            shape: tensor.shape().to_vec(),
            source: ConstantSource::Tensor(tensor),
            origin: None,
        }
    }

    /// A weight whose bytes are elsewhere.
    pub fn absent(dtype: DType, shape: Vec<usize>) -> Self {
        Constant {
            dtype,
            shape,
            source: ConstantSource::Absent,
            origin: None,
        }
    }

    /// A quantized weight: [`Transform::Dequantize`] over parts whose dtypes and shapes match.
    pub fn quantized(
        codes: Constant,
        scales: Constant,
        zero_points: Option<Constant>,
        granularity: Granularity,
    ) -> Result<Self, QuantizedError> {
        let parts = Quantized {
            codes: &codes,
            scales: &scales,
            zero_points: zero_points.as_ref(),
            granularity,
        };
        parts.check_types()?;
        let (dtype, shape) = (scales.dtype, codes.shape.clone());
        let inputs = [codes, scales].into_iter().chain(zero_points).collect();
        Ok(Self::derive(inputs, Transform::Dequantize(granularity), dtype, shape))
    }

    /// The parts of a quantized weight; `None` if it is stored as plain values.
    pub fn as_quantized(&self) -> Option<Quantized<'_>> {
        match &self.source {
            ConstantSource::Derived(derived) => match (&derived.transform, &derived.inputs[..]) {
                (Transform::Dequantize(granularity), [codes, scales, zero_points @ ..]) => Some(Quantized {
                    codes,
                    scales,
                    zero_points: zero_points.first(),
                    granularity: *granularity,
                }),
                _ => None,
            },
            _ => None,
        }
    }

    /// A movement of a quantized weight, with its name; `None` if it is not quantized, or splits blocks.
    fn moved(&self, movement: impl FnOnce(Quantized<'_>) -> Result<Constant, QuantizedError>) -> Option<Self> {
        let moved = movement(self.as_quantized()?).ok()?;
        Some(Constant {
            origin: self.origin.clone(),
            ..moved
        })
    }

    /// Records the tensor's name in the export, which the manifest reports as its source name.
    pub fn with_origin(mut self, name: &str) -> Self {
        self.origin = Some(Arc::from(name));
        self
    }

    /// Element type; for a quantized weight, of its values.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    /// Where the bytes come from.
    pub fn source(&self) -> &ConstantSource {
        &self.source
    }
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Bytes of the tensor that [`Constant::materialize`] returns.
    pub fn byte_len(&self) -> usize {
        self.dtype.byte_len(self.len())
    }
    /// Bytes stored in a file; for a quantized weight, of its parts.
    pub fn stored_byte_len(&self) -> usize {
        match self.as_quantized() {
            Some(parts) => parts.each().map(|(_, part)| part.stored_byte_len()).sum(),
            None => self.byte_len(),
        }
    }

    /// Whether the bytes are available: none of its sources is absent.
    pub fn is_present(&self) -> bool {
        match &self.source {
            ConstantSource::Tensor(_) => true,
            ConstantSource::Absent => false,
            ConstantSource::Derived(derived) => derived.inputs.iter().all(Constant::is_present),
        }
    }

    /// The initializer this constant was made from; that of the first input if several were joined.
    pub fn origin(&self) -> Option<&str> {
        match (&self.origin, &self.source) {
            (Some(name), _) => Some(name),
            (None, ConstantSource::Derived(derived)) => derived.inputs.iter().find_map(|c| c.origin()),
            _ => None,
        }
    }

    /// Equal for constants with the same bytes and shape by construction: a clone, or the same recipe over the same
    /// source. (Contents are not compared.) Valid as long as the sources are in memory.
    pub fn identity(&self) -> String {
        let mut text = String::new();
        self.describe(&mut text);
        text
    }

    fn describe(&self, text: &mut String) {
        write!(text, "{self:?}").expect("writing to a string");
        match &self.source {
            ConstantSource::Tensor(tensor) => write!(text, "@{:p}", tensor.data().as_ptr()),
            ConstantSource::Absent => write!(text, "?{:?}", self.origin()),
            ConstantSource::Derived(derived) => {
                write!(text, "{:?}(", derived.transform).expect("writing to a string");
                for input in &derived.inputs {
                    input.describe(text);
                }
                write!(text, ")")
            }
        }
        .expect("writing to a string");
    }

    pub(super) fn derive(inputs: Vec<Constant>, transform: Transform, dtype: DType, shape: Vec<usize>) -> Self {
        Constant {
            dtype,
            shape,
            source: ConstantSource::Derived(Arc::new(Derived { transform, inputs })),
            origin: None,
        }
    }

    /// Axes permuted as in ONNX `Transpose`. Panics unless `perm` is a permutation of the axes.
    pub fn transposed(&self, perm: &[usize]) -> Self {
        assert_eq!(perm.len(), self.shape.len(), "permutation of another rank");
        // A transpose of a transpose that restores the source is the source.
        if let ConstantSource::Derived(derived) = &self.source
            && let Transform::Transpose(first) = &derived.transform
            && perm.iter().enumerate().all(|(i, p)| first[*p] == i)
        {
            return derived.inputs[0].clone();
        }
        if let Some(moved) = self.moved(|parts| parts.transposed(perm)) {
            return moved;
        }
        let shape = perm.iter().map(|p| self.shape[*p]).collect();
        Self::derive(
            vec![self.clone()],
            Transform::Transpose(perm.to_vec()),
            self.dtype,
            shape,
        )
    }

    /// Another shape of the same volume. Panics if the volume differs.
    pub fn reshaped(&self, shape: Vec<usize>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), self.len(), "reshape to another volume");
        if shape == self.shape {
            return self.clone();
        }
        if let Some(moved) = self.moved(|parts| parts.reshaped(&shape)) {
            return moved;
        }
        Self::derive(vec![self.clone()], Transform::Reshape, self.dtype, shape)
    }

    /// Elements converted, rounded to nearest even. For a quantized weight with another float type, the scales are
    /// converted: the values are those of the new scales.
    pub fn cast(&self, dtype: DType) -> Self {
        if dtype == self.dtype {
            return self.clone();
        }
        let is_scale = dtype.is_float() && dtype != DType::F64;
        if is_scale && let Some(cast) = self.moved(|parts| parts.with_scales(parts.scales.cast(dtype))) {
            return cast;
        }
        Self::derive(vec![self.clone()], Transform::Cast, dtype, self.shape.clone())
    }

    /// `start..end` of an axis. Panics if the range is outside the axis.
    pub fn sliced(&self, axis: usize, start: usize, end: usize) -> Self {
        assert!(start <= end && end <= self.shape[axis], "slice outside the axis");
        if let Some(moved) = self.moved(|parts| parts.sliced(axis, start, end)) {
            return moved;
        }
        let mut shape = self.shape.clone();
        shape[axis] = end - start;
        Self::derive(
            vec![self.clone()],
            Transform::Slice { axis, start, end },
            self.dtype,
            shape,
        )
    }

    /// Rows in `groups` equal parts: the first or the second half of each part, or with `interleaved` every other row,
    /// starting with the first or the second. Panics unless the parts have an even number of rows.
    pub fn half_of_rows(&self, groups: usize, interleaved: bool, which: usize) -> Self {
        let (rows, rest) = self.shape.split_first().expect("rows");
        let half = rows / groups / 2;
        assert_eq!(half * groups * 2, *rows, "parts of an even number of rows");
        let (split, axis) = match interleaved {
            true => ([groups, half, 2], 2),
            false => ([groups, 2, half], 1),
        };
        let split = [&split[..], rest].concat();
        let whole = [&[groups * half], rest].concat();
        self.reshaped(split).sliced(axis, which, which + 1).reshaped(whole)
    }

    /// Concatenated on an axis. Panics on an empty list, or on parts whose dtype or other axes differ.
    pub fn concat(parts: &[Constant], axis: usize) -> Self {
        let mut shape = parts[0].shape.clone();
        shape[axis] = parts.iter().map(|p| p.shape[axis]).sum();
        for part in parts {
            let same = (0..shape.len()).all(|i| i == axis || part.shape[i] == shape[i]);
            assert!(same && part.dtype == parts[0].dtype, "concat of unlike constants");
        }
        let quantized = parts.iter().map(Constant::as_quantized).collect::<Option<Vec<_>>>();
        if let Some(joined) = quantized.and_then(|parts| Quantized::concat(&parts, axis).ok()) {
            return joined;
        }
        Self::derive(parts.to_vec(), Transform::Concat { axis }, parts[0].dtype, shape)
    }

    /// Tensors in another program's packing, decoded by `read` when the bytes are needed. `name` names the packing;
    /// `read` must return as many bytes as `dtype` and `shape` require.
    pub fn decoded(
        name: &'static str,
        inputs: Vec<Constant>,
        dtype: DType,
        shape: Vec<usize>,
        read: impl Fn(&[Tensor]) -> Bytes + Send + Sync + 'static,
    ) -> Self {
        let read = Arc::new(read);
        Self::derive(inputs, Transform::Decode(Decode { name, read }), dtype, shape)
    }

    /// Codes of these floats: see [`Transform::Quantize`].
    pub fn quantize(
        &self,
        dtype: DType,
        scales: Constant,
        zero_points: Option<Constant>,
        granularity: Granularity,
    ) -> Result<Self, QuantizedError> {
        let part = |part: &Constant| (part.dtype, part.shape.clone());
        let (scale, zero) = (part(&scales), zero_points.as_ref().map(part));
        check_types(
            (dtype, &self.shape),
            (scale.0, &scale.1),
            zero.as_ref().map(|(dtype, shape)| (*dtype, &shape[..])),
            granularity,
        )?;
        let inputs = [self.clone(), scales].into_iter().chain(zero_points).collect();
        let shape = self.shape.clone();
        Ok(Self::derive(inputs, Transform::Quantize(granularity), dtype, shape))
    }

    /// Codes moved by half their range, unsigned to signed ones or the reverse: see [`Transform::HalfRange`]. Panics unless
    /// they are integers of at most 8 bits.
    pub fn half_range_moved(&self) -> Self {
        let dtype = match self.dtype {
            DType::U8 => DType::I8,
            DType::U4 => DType::I4,
            DType::U2 => DType::I2,
            DType::I8 => DType::U8,
            DType::I4 => DType::U4,
            DType::I2 => DType::U2,
            other => panic!("{other} is not a type of integer codes"),
        };
        // Moved back, they are the original codes.
        if let ConstantSource::Derived(derived) = &self.source
            && derived.transform == Transform::HalfRange
        {
            return derived.inputs[0].clone();
        }
        Self::derive(vec![self.clone()], Transform::HalfRange, dtype, self.shape.clone())
    }

    /// The halves of every byte swapped: see [`Transform::SwapHalves`]. Panics unless the codes have 4 bits and fill
    /// their bytes.
    pub fn halves_swapped(&self) -> Self {
        assert!(
            self.dtype.bits() == 4 && self.len().is_multiple_of(2),
            "{self:?} has no halves to exchange"
        );
        if let ConstantSource::Derived(derived) = &self.source
            && derived.transform == Transform::SwapHalves
        {
            return derived.inputs[0].clone();
        }
        Self::derive(
            vec![self.clone()],
            Transform::SwapHalves,
            self.dtype,
            self.shape.clone(),
        )
    }

    /// The bytes of packed codes: see [`Transform::Bytes`]. `None` unless the codes have less than a byte and rows of the last
    /// axis fill their bytes.
    pub fn bytes_as_i8(&self) -> Option<Self> {
        let each = 8 / self.dtype.bits();
        let (last, leading) = self.shape.split_last()?;
        if each <= 1 || !last.is_multiple_of(each) {
            return None;
        }
        let shape = leading.iter().copied().chain([last / each]).collect();
        Some(Self::derive(vec![self.clone()], Transform::Bytes, DType::I8, shape))
    }

    /// Slices of an axis in the order of indices: see [`Transform::Take`]. Panics unless the indices are a vector.
    pub fn taken(&self, axis: usize, indices: &Constant) -> Self {
        let [count] = indices.shape[..] else {
            panic!("no vector of indices: {:?}", indices.shape);
        };
        let mut shape = self.shape.clone();
        shape[axis] = count;
        let inputs = vec![self.clone(), indices.clone()];
        Self::derive(inputs, Transform::Take { axis }, self.dtype, shape)
    }

    /// The indices that sort a vector: see [`Transform::Order`].
    pub fn order(&self) -> Self {
        Self::derive(vec![self.clone()], Transform::Order, DType::I64, self.shape.clone())
    }

    /// Every element times a number, in fp32.
    pub fn scaled(&self, factor: f64) -> Self {
        Self::derive(
            vec![self.clone()],
            Transform::Scale(factor),
            self.dtype,
            self.shape.clone(),
        )
    }

    /// Every element plus a number, in fp32.
    pub fn offset(&self, addend: f64) -> Self {
        Self::derive(
            vec![self.clone()],
            Transform::Offset(addend),
            self.dtype,
            self.shape.clone(),
        )
    }

    /// `self + scale * b a` in fp32, for `[out, in]`, `[out, rank]` and `[rank, in]`. Panics on other shapes.
    pub fn plus_product(&self, b: &Constant, a: &Constant, scale: f64) -> Self {
        let [out, width] = self.shape[..] else {
            panic!("not a matrix: {:?}", self.shape);
        };
        let rank = a.shape[0];
        assert!(
            b.shape == [out, rank] && a.shape == [rank, width],
            "a product of another shape"
        );
        let inputs = vec![self.clone(), b.clone(), a.clone()];
        Self::derive(inputs, Transform::PlusProduct { scale }, DType::F32, self.shape.clone())
    }

    /// Every row of a matrix scaled to a Euclidean norm: `lengths[i] * row_i / ||row_i||`, in fp32. Panics unless there is a
    /// length for each row.
    pub fn with_row_lengths(&self, lengths: &Constant) -> Self {
        assert!(
            self.shape.len() == 2 && lengths.shape == [self.shape[0]],
            "lengths of other rows"
        );
        let inputs = vec![self.clone(), lengths.clone()];
        Self::derive(inputs, Transform::RowLengths, DType::F32, self.shape.clone())
    }

    /// The tensor itself. Free for plain tensors; computes the recipe otherwise, holding one intermediate at a time.
    pub fn materialize(&self) -> Result<Tensor, ConstantError> {
        match &self.source {
            ConstantSource::Tensor(tensor) => Ok(tensor.clone()),
            ConstantSource::Absent => Err(ConstantError::Absent {
                name: self.origin().unwrap_or("unnamed").to_string(),
            }),
            ConstantSource::Derived(derived) => super::transform::apply(derived, self.dtype, &self.shape),
        }
    }
}

impl From<Tensor> for Constant {
    fn from(tensor: Tensor) -> Self {
        Constant::tensor(tensor)
    }
}

impl fmt::Debug for Constant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)?;
        match self.as_quantized() {
            Some(parts) => write!(f, " of {parts}"),
            None => Ok(()),
        }
    }
}
