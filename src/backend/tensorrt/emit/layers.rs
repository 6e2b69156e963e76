//! One arm per layer kind.

use trtx::network::Layer as TrtLayer;
use trtx::trtx_sys::AsLayer;
use trtx::{
    ActivationType, AttentionNormalizationOp, Axes, CausalMaskKind, ElementWiseOperation, FillOperation, KVCacheMode,
    MatrixOperation, ReduceOperation, TopKOperation, UnaryOperation,
};

use super::shapes::Extents;
use super::{EmitError, Emitted, Emitter, Handle, data_type};
use crate::dim::Dim;
use crate::network::{Activation, Elementwise, Greatest, Layer, LayerKind, MatrixOp, ReduceOp, Shape, UnaryOp};
use crate::tensor::{DType, Tensor};

/// Adds the layer (and the few layers that it needs in addition) and returns its output.
pub(super) fn emit<'b>(e: &mut Emitter<'b, '_>, layer: &'b Layer) -> Emitted<'b> {
    let name = layer.name.as_str();
    match &layer.kind {
        LayerKind::Weight(id) => e.weight(name, *id),
        LayerKind::Constant(tensor) => e.constant(name, tensor, None),
        LayerKind::MatrixMultiply { op_a, op_b } => {
            let [a, b] = e.inputs(layer)?;
            let added = e
                .definition
                .add_matrix_multiply(&a, matrix_op(*op_a), &b, matrix_op(*op_b))?;
            e.named(added, name)
        }
        LayerKind::Elementwise(op) => {
            let [a, b] = e.inputs(layer)?;
            let added = e.definition.add_elementwise(&a, &b, elementwise(*op))?;
            e.named(added, name)
        }
        LayerKind::Unary(op) => {
            let [x] = e.inputs(layer)?;
            match unary(*op) {
                Some(operation) => {
                    let added = e.definition.add_unary(&x, operation)?;
                    e.named(added, name)
                }
                None => e.rounded_to_float8(layer, *op, x),
            }
        }
        LayerKind::Activation(op) => {
            let [x] = e.inputs(layer)?;
            e.activation(layer, *op, x)
        }
        LayerKind::Reduce { op, axes, keep_dims } => {
            let [x] = e.inputs(layer)?;
            let added = e.definition.add_reduce(&x, reduce(*op), axes_mask(axes)?, *keep_dims)?;
            e.named(added, name)
        }
        LayerKind::Softmax { axis } => {
            let [x] = e.inputs(layer)?;
            let added = e.definition.add_softmax(&x, axes_mask(&[*axis])?)?;
            e.named(added, name)
        }
        LayerKind::Shuffle { first, reshape, second } => {
            let [x] = e.inputs(layer)?;
            e.shuffle(name, &x, first.as_deref(), reshape.as_ref(), second.as_deref())
        }
        LayerKind::Slice { start, size, stride } => {
            let [x] = e.inputs(layer)?;
            e.slice(name, &x, start, size, stride)
        }
        LayerKind::Concatenation { axis } => {
            let inputs = e.all_inputs(layer)?;
            let mut added = e.definition.add_concatenation(&inputs.iter().collect::<Vec<_>>())?;
            added.set_axis(e.definition, axis_number(*axis)?);
            e.named(added, name)
        }
        LayerKind::Gather { axis } => {
            let [data, indices] = e.inputs(layer)?;
            let added = e.definition.add_gather(&data, &indices, axis_number(*axis)?)?;
            e.named(added, name)
        }
        LayerKind::Select => {
            let [condition, yes, no] = e.inputs(layer)?;
            let added = e.definition.add_select(&condition, &yes, &no)?;
            e.named(added, name)
        }
        LayerKind::Cast { to } => {
            let [x] = e.inputs(layer)?;
            let added = e.definition.add_cast(&x, data_type(*to)?)?;
            e.named(added, name)
        }
        LayerKind::Fill { length, start, step } => e.fill(layer, length, *start, *step),
        LayerKind::Normalization { axes, epsilon } => {
            let [x, scale, bias] = e.inputs(layer)?;
            let mut added = e.definition.add_normalization_v2(&x, &scale, &bias, axes_mask(axes)?)?;
            added.set_epsilon(e.definition, *epsilon);
            e.named(added, name)
        }
        LayerKind::RotaryEmbedding {
            interleaved,
            rotary_dim,
        } => {
            let [x, cos, sin, positions] = e.inputs(layer)?;
            let rotary_dim = axis_number(*rotary_dim)?;
            let mut added = e
                .definition
                .add_rotary_embedding(&x, &cos, &sin, *interleaved, rotary_dim)?;
            added.set_input(e.definition, 3, &positions)?;
            e.named(added, name)
        }
        LayerKind::Attention => e.attention(layer),
        LayerKind::Dequantize(granularity) => e.dequantize(layer, *granularity),
        LayerKind::TopK { k, part } => {
            let [x] = e.inputs(layer)?;
            let last = e.declared(layer.inputs[0])?.shape.len() - 1;
            let added = e
                .definition
                .add_topk(&x, TopKOperation::kMAX, axis_number(*k)?, axes_mask(&[last])?)?;
            e.named_output(
                added,
                name,
                match part {
                    Greatest::Values => 0,
                    Greatest::Indices => 1,
                },
            )
        }
        LayerKind::Experts { .. } => Err(EmitError::Malformed(
            "a layer of experts is for the CPU executor; lower it with all experts or the chosen ones".to_string(),
        )),
        LayerKind::RowProduct(_) | LayerKind::DecodeAttention(_) => Err(EmitError::Malformed(
            "a kernel of Lapidary runs it, between the engines of the network's segments".to_string(),
        )),
        LayerKind::KvCacheUpdate => {
            let [cache, update, write_indices] = e.inputs(layer)?;
            let added = e
                .definition
                .add_kv_cache_update(&cache, &update, &write_indices, KVCacheMode::kLINEAR)?;
            e.named(added, name)
        }
    }
}

impl<'b> Emitter<'b, '_> {
    fn all_inputs(&self, layer: &Layer) -> Result<Vec<Handle<'b>>, EmitError> {
        layer.inputs.iter().map(|id| self.handle(*id)).collect()
    }

    /// The layer's inputs, if there are `N`.
    pub(super) fn inputs<const N: usize>(&self, layer: &Layer) -> Result<[Handle<'b>; N], EmitError> {
        let found = layer.inputs.len();
        self.all_inputs(layer)?
            .try_into()
            .map_err(|_| EmitError::Malformed(format!("it has {found} inputs and needs {N}")))
    }

    /// Names a layer just added, and returns its output.
    pub(super) fn named<L: AsLayer>(&mut self, layer: TrtLayer<'b, L>, name: &str) -> Emitted<'b> {
        self.named_output(layer, name, 0)
    }

    /// Like [`Emitter::named`], for a layer with several outputs.
    fn named_output<L: AsLayer>(&mut self, mut layer: TrtLayer<'b, L>, name: &str, output: i32) -> Emitted<'b> {
        layer.set_name(self.definition, name)?;
        Ok(layer.output(self.definition, output)?)
    }

    fn activation(&mut self, layer: &Layer, op: Activation, x: Handle<'b>) -> Emitted<'b> {
        let kind = match op {
            Activation::Relu => ActivationType::kRELU,
            Activation::Sigmoid => ActivationType::kSIGMOID,
            Activation::Tanh => ActivationType::kTANH,
            Activation::GeluErf => ActivationType::kGELU_ERF,
            Activation::GeluTanh => ActivationType::kGELU_TANH,
            Activation::Softplus => return self.softplus(layer, x),
        };
        let added = self.definition.add_activation(&x, kind)?;
        self.named(added, &layer.name)
    }

    /// `max(x, 0) + ln(1 + exp(-|x|))`. TensorRT's own softplus has two factors that the binding cannot set, and
    /// overflows; this form does not.
    fn softplus(&mut self, layer: &Layer, x: Handle<'b>) -> Emitted<'b> {
        let input = self.declared(layer.inputs[0])?;
        if !input.dtype.is_float() {
            return Err(EmitError::Malformed(format!("softplus of {}", input.dtype)));
        }
        let part = |part: &str| format!("{}/{part}", layer.name);
        let mut tail = x;
        for (op, of) in [
            (UnaryOperation::kABS, "abs"),
            (UnaryOperation::kNEG, "neg"),
            (UnaryOperation::kEXP, "exp"),
        ] {
            let added = self.definition.add_unary(&tail, op)?;
            tail = self.named(added, &part(of))?;
        }
        let one = self.small_float(input.shape.len(), input.dtype, 1.0)?;
        let plus_one = self
            .definition
            .add_elementwise(&tail, &one, ElementWiseOperation::kSUM)?;
        let plus_one = self.named(plus_one, &part("plus_one"))?;
        let log = self.definition.add_unary(&plus_one, UnaryOperation::kLOG)?;
        let log = self.named(log, &part("log"))?;
        let relu = self.definition.add_activation(&x, ActivationType::kRELU)?;
        let relu = self.named(relu, &part("relu"))?;
        let sum = self
            .definition
            .add_elementwise(&relu, &log, ElementWiseOperation::kSUM)?;
        self.named(sum, &layer.name)
    }

    fn shuffle(
        &mut self,
        name: &str,
        x: &Handle<'b>,
        first: Option<&[usize]>,
        reshape: Option<&Shape>,
        second: Option<&[usize]>,
    ) -> Emitted<'b> {
        // The shape tensor's layers come before the shuffle that reads them.
        let extents = reshape.map(|shape| self.reshape_extents(name, shape)).transpose()?;
        let mut added = self.definition.add_shuffle(x)?;
        if let Some(order) = first {
            added.set_first_transpose(self.definition, &permutation(order)?)?;
        }
        match extents {
            Some(Extents::Static(dims) | Extents::Inferred(dims)) => {
                added.set_reshape_dimensions(self.definition, &dims)?;
            }
            Some(Extents::Tensor(shape)) => added.set_input(self.definition, 1, &shape)?,
            None => {}
        }
        if let Some(order) = second {
            added.set_second_transpose(self.definition, &permutation(order)?)?;
        }
        self.named(added, name)
    }

    fn slice(&mut self, name: &str, x: &Handle<'b>, start: &[i64], size: &Shape, stride: &[i64]) -> Emitted<'b> {
        if start.len() != size.len() || stride.len() != size.len() {
            return Err(EmitError::Malformed(format!(
                "start {start:?}, size {size:?} and stride {stride:?} differ in length"
            )));
        }
        match self.extents(name, size)? {
            Extents::Static(dims) | Extents::Inferred(dims) => {
                let added = self.definition.add_slice(x, start, &dims, stride)?;
                self.named(added, name)
            }
            Extents::Tensor(shape) => {
                // This size is a placeholder: input 2 replaces it.
                let mut added = self.definition.add_slice(x, start, &vec![0; size.len()], stride)?;
                added.set_input(self.definition, 2, &shape)?;
                self.named(added, name)
            }
        }
    }

    fn fill(&mut self, layer: &Layer, length: &Dim, start: f64, step: f64) -> Emitted<'b> {
        self.inputs::<0>(layer)?;
        let [output] = layer.outputs[..] else {
            return Err(EmitError::Malformed("a fill has one output".to_string()));
        };
        let dtype = self.declared(output)?.dtype;
        let extents = self.extents(&layer.name, std::slice::from_ref(length))?;
        // Input 1 is a scalar; input 2 has one step for each axis.
        let table = |shape: Vec<usize>, value: f64| match dtype {
            DType::F32 => Ok(Tensor::from_f64_as(DType::F32, shape, &[value])),
            DType::I32 => Ok(Tensor::from_i32(shape, &[value as i32])),
            DType::I64 => Ok(Tensor::from_i64(shape, &[value as i64])),
            other => Err(EmitError::Malformed(format!(
                "a fill of {other}; TensorRT fills f32, i32 and i64"
            ))),
        };
        let (start, step) = (table(vec![], start)?, table(vec![1], step)?);
        let (start, step) = (self.small(&start)?, self.small(&step)?);
        let dims = match &extents {
            Extents::Static(dims) | Extents::Inferred(dims) => dims.clone(),
            Extents::Tensor(_) => vec![1], // a placeholder: input 0 replaces it
        };
        let mut added = self
            .definition
            .add_fill(&dims, FillOperation::kLINSPACE, data_type(dtype)?)?;
        if let Extents::Tensor(shape) = &extents {
            added.set_input(self.definition, 0, shape)?;
        }
        added.set_input(self.definition, 1, &start)?;
        added.set_input(self.definition, 2, &step)?;
        self.named(added, &layer.name)
    }

    fn attention(&mut self, layer: &Layer) -> Emitted<'b> {
        let inputs = self.all_inputs(layer)?;
        let (query, key, value, mask) = match inputs[..] {
            [q, k, v] => (q, k, v, None),
            [q, k, v, mask] => (q, k, v, Some(mask)),
            _ => {
                let reason = format!("it has {} inputs and needs 3 or 4", inputs.len());
                return Err(EmitError::Malformed(reason));
            }
        };
        let mask = match mask {
            Some(mask) => Some(self.mask_of_its_own(layer, mask)?),
            None => None,
        };
        let mut added = self.definition.add_attention_v2(
            &query,
            &key,
            &value,
            AttentionNormalizationOp::kSOFTMAX,
            CausalMaskKind::kNONE,
        )?;
        if let Some(mask) = mask {
            added.set_mask(self.definition, &mask)?;
        }
        // Without this TensorRT fails if it has no fused kernel, instead of using several.
        added.set_decomposable(self.definition, true)?;
        added.set_name(self.definition, &layer.name)?;
        Ok(added.output(self.definition, 0)?)
    }
}

pub(super) fn axis_number(axis: usize) -> Result<i32, EmitError> {
    i32::try_from(axis).map_err(|_| EmitError::Malformed(format!("{axis} is out of range")))
}

fn axes_mask(axes: &[usize]) -> Result<Axes, EmitError> {
    // TensorRT has at most eight dims; a larger shift would wrap around to a wrong axis.
    let bits = axes.iter().try_fold(0u32, |bits, axis| {
        let bit = u32::try_from(*axis)
            .ok()
            .filter(|axis| *axis < 8)
            .map(|axis| 1u32 << axis);
        bit.map(|bit| bits | bit)
    });
    bits.map(Axes::from_bits)
        .ok_or_else(|| EmitError::Malformed(format!("the axes {axes:?} are out of range")))
}

fn permutation(order: &[usize]) -> Result<Vec<i32>, EmitError> {
    if order.len() > 8 {
        return Err(EmitError::Malformed(format!("a transpose of {} axes", order.len())));
    }
    order.iter().map(|axis| axis_number(*axis)).collect()
}

fn matrix_op(op: MatrixOp) -> MatrixOperation {
    match op {
        MatrixOp::None => MatrixOperation::kNONE,
        MatrixOp::Transpose => MatrixOperation::kTRANSPOSE,
    }
}

fn elementwise(op: Elementwise) -> ElementWiseOperation {
    match op {
        Elementwise::Sum => ElementWiseOperation::kSUM,
        Elementwise::Sub => ElementWiseOperation::kSUB,
        Elementwise::Prod => ElementWiseOperation::kPROD,
        Elementwise::Div => ElementWiseOperation::kDIV,
        Elementwise::Pow => ElementWiseOperation::kPOW,
        Elementwise::Max => ElementWiseOperation::kMAX,
        Elementwise::Min => ElementWiseOperation::kMIN,
        Elementwise::FloorDiv => ElementWiseOperation::kFLOOR_DIV,
        Elementwise::And => ElementWiseOperation::kAND,
        Elementwise::Or => ElementWiseOperation::kOR,
        Elementwise::Xor => ElementWiseOperation::kXOR,
        Elementwise::Equal => ElementWiseOperation::kEQUAL,
        Elementwise::Greater => ElementWiseOperation::kGREATER,
        Elementwise::Less => ElementWiseOperation::kLESS,
    }
}

/// `None`: TensorRT has no such operation.
fn unary(op: UnaryOp) -> Option<UnaryOperation> {
    Some(match op {
        UnaryOp::RoundE4M3 | UnaryOp::RoundE5M2 => return None,
        UnaryOp::Abs => UnaryOperation::kABS,
        UnaryOp::Ceil => UnaryOperation::kCEIL,
        UnaryOp::Cos => UnaryOperation::kCOS,
        UnaryOp::Erf => UnaryOperation::kERF,
        UnaryOp::Exp => UnaryOperation::kEXP,
        UnaryOp::Floor => UnaryOperation::kFLOOR,
        UnaryOp::IsNan => UnaryOperation::kISNAN,
        UnaryOp::Log => UnaryOperation::kLOG,
        UnaryOp::Neg => UnaryOperation::kNEG,
        UnaryOp::Not => UnaryOperation::kNOT,
        UnaryOp::Recip => UnaryOperation::kRECIP,
        UnaryOp::Round => UnaryOperation::kROUND,
        UnaryOp::Sign => UnaryOperation::kSIGN,
        UnaryOp::Sin => UnaryOperation::kSIN,
        UnaryOp::Sqrt => UnaryOperation::kSQRT,
    })
}

fn reduce(op: ReduceOp) -> ReduceOperation {
    match op {
        ReduceOp::Sum => ReduceOperation::kSUM,
        ReduceOp::Prod => ReduceOperation::kPROD,
        ReduceOp::Max => ReduceOperation::kMAX,
        ReduceOp::Min => ReduceOperation::kMIN,
        ReduceOp::Avg => ReduceOperation::kAVG,
    }
}
