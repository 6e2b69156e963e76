//! From a graph to a file: ONNX opset 24, IR version 11.
//!
//! Weights are written beside the model as external data, where the caller places them ([`write()`], [`encode`]) or in
//! one new file ([`write_with_data`]). A quantized weight is its codes, scales and zero points, and a
//! `DequantizeLinear` that has the weight's name. Symbolic dims become `dim_param` text. Files are written under a
//! temporary name and renamed when they are complete.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message;

use super::proto::{
    AttributeProto, DimensionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto,
    TensorProto, TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto, attribute_type,
};
use super::{expert_functions, functions};
use crate::graph::op::{Binary, Op};
use crate::graph::{Attribute, Constant, ConstantError, Definition, Graph, LAPIDARY, Node, ValueId};
use crate::help::Help;
use crate::tensor::quantized::Granularity;
use crate::tensor::{DType, Tensor};

/// What is written.
pub const OPSET: i64 = 24;
pub const IR_VERSION: i64 = 11;
/// The `producer_name` of what is written.
pub const PRODUCER: &str = "lapidary";
/// Constants of more bytes go to the data file in [`write_with_data`], and a [`Layout`] should place them.
pub const INLINE_LIMIT: usize = 1024;
/// Alignment of each tensor in a data file, so that readers can use its elements in place.
const ALIGNMENT: u64 = 64;
/// Protobuf's own limit on a message.
const MESSAGE_LIMIT: usize = i32::MAX as usize;

/// Where the bytes of a constant are: little-endian, row-major, of its dtype and shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Relative to the model's folder, with `/` between its parts.
    pub file: String,
    /// Offset of the first byte.
    pub offset: u64,
    /// In bytes.
    pub length: u64,
}

/// Constants whose bytes are elsewhere; one placement per stored tensor ([`Constant::stored_parts`]); a quantized
/// weight has several.
pub type Layout = HashMap<ValueId, Vec<Placement>>;

/// Why a graph cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the message says what the fields are")]
pub enum WriteError {
    #[error("node {node:?}: the operator {op} cannot be written")]
    UnknownOp { node: String, op: String },
    #[error("{value:?}, an input or output of the graph, has no type")]
    Untyped { value: String },
    #[error("the constant {name:?} has {expected} bytes, and its placement in {file:?} {found}")]
    Placement {
        name: String,
        file: String,
        expected: u64,
        found: u64,
    },
    /// A quantized weight with fewer placements than parts.
    #[error("{name:?}, a part of a quantized weight, has no placement")]
    Unplaced { name: String },
    #[error("the weight {name:?} has codes of a table {granularity}; only blocks of the last axis can be written")]
    Table { name: String, granularity: Granularity },
    #[error("a value is called {name:?}, as the part of a quantized weight would be; rename it")]
    NameTaken { name: String },
    #[error(transparent)]
    Constant(#[from] ConstantError),
    #[error("the model takes {bytes} bytes, and a single ONNX file holds at most 2 GiB")]
    TooLarge { bytes: usize },
    #[error("{} cannot be written: {source}", .path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

impl Help for WriteError {
    fn help(&self) -> Option<String> {
        match self {
            WriteError::Untyped { .. } => Some("run inference first".to_string()),
            WriteError::TooLarge { .. } => Some("write its weights as external data".to_string()),
            WriteError::Constant(error) => error.help(),
            _ => None,
        }
    }
}

/// Writes a model whose constants are where `external` places them; all others are in the model file itself.
pub fn write(graph: &Graph, path: impl AsRef<Path>, external: Option<&Layout>) -> Result<(), WriteError> {
    let bytes = encode(graph, external)?;
    write_atomically(path.as_ref(), |file| file.write_all(&bytes))
}

/// Writes `path` and, if there are constants larger than [`INLINE_LIMIT`], `path` + `.data` beside it.
pub fn write_with_data(graph: &Graph, path: impl AsRef<Path>) -> Result<(), WriteError> {
    let path = path.as_ref();
    let mut data = path.as_os_str().to_os_string();
    data.push(".data");
    let data = PathBuf::from(data);
    let name = data.file_name().unwrap_or_default().to_string_lossy().into_owned();

    let mut layout = Layout::new();
    let mut end = 0u64;
    let large: Vec<(ValueId, &Constant)> = constants(graph)
        .filter(|(_, constant)| constant.stored_byte_len() > INLINE_LIMIT)
        .collect();
    for (value, constant) in &large {
        let place = |(_, part): (String, &Constant)| {
            let offset = end.next_multiple_of(ALIGNMENT);
            let length = part.byte_len() as u64;
            end = offset + length;
            let file = name.clone();
            Placement { file, offset, length }
        };
        let placements = constant.stored_parts("").into_iter().map(place).collect();
        layout.insert(*value, placements);
    }
    let model = encode(graph, Some(&layout))?;
    if !large.is_empty() {
        // A weight may have to be computed, which can fail where nothing can be written through.
        let mut failed = None;
        write_atomically(&data, |file| {
            let mut at = 0u64;
            let parts = large
                .iter()
                .flat_map(|(value, constant)| constant.stored_parts("").into_iter().zip(&layout[value]));
            for ((_, part), placement) in parts {
                let tensor = match part.materialize() {
                    Ok(tensor) => tensor,
                    Err(error) => {
                        failed = Some(error);
                        return Err(std::io::Error::other("a weight is absent"));
                    }
                };
                file.write_all(&[0; ALIGNMENT as usize][..(placement.offset - at) as usize])?;
                file.write_all(tensor.data())?;
                at = placement.offset + placement.length;
            }
            Ok(())
        })
        .map_err(|error| failed.take().map_or(error, WriteError::Constant))?;
    }
    write_atomically(path, |file| file.write_all(&model))
}

fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>,
) -> Result<(), WriteError> {
    let mut temporary = path.as_os_str().to_os_string();
    temporary.push(format!(".{}.part", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let result = (|| {
        let mut file = BufWriter::new(File::create(&temporary)?);
        write(&mut file)?;
        file.flush()?;
        std::fs::rename(&temporary, path)
    })();
    result.map_err(|source| {
        // Do not leave half a file. If it cannot be removed, report the first error.
        let _ = std::fs::remove_file(&temporary);
        WriteError::Io {
            path: path.to_path_buf(),
            source,
        }
    })
}

/// The constants in use, in the order of the graph's values.
fn constants(graph: &Graph) -> impl Iterator<Item = (ValueId, &Constant)> {
    let mut read: HashSet<ValueId> = graph.outputs.iter().copied().chain(graph.embedding).collect();
    for id in graph.node_ids() {
        read.extend(graph.node(id).inputs.iter().flatten());
    }
    let ids = graph.value_ids().filter(move |v| read.contains(v));
    ids.filter_map(|v| graph.constant(v).map(|c| (v, c)))
}

/// The bytes of a model file. Constants in `external` are referred to, all others are in it.
pub fn encode(graph: &Graph, external: Option<&Layout>) -> Result<Vec<u8>, WriteError> {
    let mut initializer = Vec::new();
    let mut node = Vec::new();
    for (value, constant) in constants(graph) {
        let name = &graph.value(value).name;
        let placements = external.and_then(|e| e.get(&value));
        for (i, (name, part)) in constant.stored_parts(name).into_iter().enumerate() {
            let mut proto = match placements.map(|placements| placements.get(i)) {
                Some(Some(placement)) => placed(part, &name, placement)?,
                Some(None) => return Err(WriteError::Unplaced { name }),
                None => tensor(&part.materialize()?),
            };
            proto.name = Some(name);
            // ONNX accepts powers of two as scales directly, without their own scale of 1.
            if !proto.name.as_deref().is_some_and(|part| is_unit(constant, part)) {
                initializer.push(proto);
            }
        }
        dequantize(name, constant, &mut node)?;
    }
    // Parts of quantized weights are named here.
    let defined = graph.node_ids().flat_map(|id| graph.node(id).outputs.iter().flatten());
    let mut named: HashSet<&str> = graph
        .inputs
        .iter()
        .chain(defined)
        .map(|v| graph.value(*v).name.as_str())
        .collect();
    if let Some(taken) = initializer
        .iter()
        .filter_map(|i| i.name.as_deref())
        .find(|name| !named.insert(name))
    {
        return Err(WriteError::NameTaken {
            name: taken.to_string(),
        });
    }
    let mut domains = BTreeSet::from([""]);
    let mut own: BTreeSet<String> = BTreeSet::new();
    let mut overloads = BTreeMap::new();
    for id in graph.node_ids() {
        let source = graph.node(id);
        domains.insert(source.op.domain());
        if let (Some(key), Some(function)) = (expert_functions::overload(source), expert_functions::function(source)) {
            overloads.insert((source.op.name(), key), function);
        }
        node.push(node_proto(graph, source)?);
    }
    for written in &node {
        if written.domain.as_deref() == Some(LAPIDARY) {
            domains.insert(LAPIDARY);
            own.extend(written.op_type.clone());
        }
    }
    let interface = |values: &[ValueId]| {
        values
            .iter()
            .map(|v| value_info(graph, *v))
            .collect::<Result<Vec<_>, _>>()
    };
    let outputs: HashSet<ValueId> = graph.outputs.iter().copied().collect();
    let inner = graph.value_ids().filter(|v| {
        let value = graph.value(*v);
        let typed = value.dtype.is_some() && value.shape.is_some();
        matches!(value.definition, Definition::Node { .. }) && typed && !outputs.contains(v)
    });
    let model = ModelProto {
        ir_version: Some(IR_VERSION),
        producer_name: Some(PRODUCER.to_string()),
        producer_version: Some(env!("CARGO_PKG_VERSION").to_string()),
        opset_import: domains
            .iter()
            .map(|domain| OperatorSetIdProto {
                domain: Some((*domain).to_string()),
                version: Some(if domain.is_empty() { OPSET } else { 1 }),
            })
            .collect(),
        functions: own
            .iter()
            .filter_map(|name| functions::function(name))
            .chain(overloads.into_values())
            .collect(),
        graph: Some(GraphProto {
            name: Some(if graph.name.is_empty() { "graph" } else { &graph.name }.to_string()),
            node,
            initializer,
            input: interface(&graph.inputs)?,
            output: interface(&graph.outputs)?,
            value_info: inner.map(|v| value_info(graph, v)).collect::<Result<_, _>>()?,
            sparse_initializer: Vec::new(),
        }),
    };
    let bytes = model.encoded_len();
    if bytes > MESSAGE_LIMIT {
        return Err(WriteError::TooLarge { bytes });
    }
    Ok(model.encode_to_vec())
}

/// Whether a part of a quantized weight, by its name, is the scale 1 of powers of two.
fn is_unit(constant: &Constant, part: &str) -> bool {
    let of_scales = constant.as_quantized().and_then(|parts| parts.scales.as_microscales());
    of_scales.is_some() && part.ends_with(".scales.scales")
}

/// The nodes that compute a quantized weight from its parts: a `DequantizeLinear`, and before it those of its scales.
fn dequantize(name: &str, constant: &Constant, nodes: &mut Vec<NodeProto>) -> Result<(), WriteError> {
    let Some(parts) = constant.as_quantized() else {
        return Ok(());
    };
    let mut input = Vec::new();
    for (part, constant) in parts.each() {
        let part = format!("{name}.{part}");
        if constant.as_microscales().is_some() {
            input.push(format!("{part}.codes"));
            continue;
        }
        dequantize(&part, constant, nodes)?;
        input.push(part);
    }
    let int = |name, value: usize| attribute_proto((name, Attribute::Int(value as i64)));
    let mut attribute = match parts.granularity {
        Granularity::Tensor => Vec::new(),
        Granularity::Channel { axis } => vec![int("axis", axis)],
        Granularity::Block { axis, size } => vec![int("axis", axis), int("block_size", size)],
    };
    if parts.scales.as_microscales().is_some() {
        let dtype = constant.dtype().onnx_code().expect("ONNX has every type of arithmetic");
        attribute.push(int("output_dtype", dtype as usize));
    }
    let last = constant.shape().len().saturating_sub(1);
    let (operator, attribute) = match (functions::table_operator(parts.codes.dtype()), parts.granularity) {
        (None, _) => ("DequantizeLinear", attribute),
        (Some(operator), Granularity::Block { axis, size }) if axis == last => {
            (operator, vec![int("block_size", size)])
        }
        (Some(_), granularity) => {
            return Err(WriteError::Table {
                name: name.to_string(),
                granularity,
            });
        }
    };
    nodes.push(NodeProto {
        input,
        output: vec![name.to_string()],
        name: Some(format!("{name}.dequantize")),
        op_type: Some(operator.to_string()),
        domain: (operator != "DequantizeLinear").then(|| LAPIDARY.to_string()),
        attribute,
        overload: None,
    });
    Ok(())
}

/// `TensorProto.DataType` of stored elements. Codes of a table are integers to ONNX.
fn stored_code(dtype: DType) -> i32 {
    let integer = || DType::U4.onnx_code().expect("ONNX has uint4");
    dtype.onnx_code().unwrap_or_else(integer)
}

fn dims(shape: &[usize]) -> Vec<i64> {
    shape.iter().map(|d| *d as i64).collect()
}

fn tensor(tensor: &Tensor) -> TensorProto {
    TensorProto {
        dims: dims(tensor.shape()),
        data_type: Some(stored_code(tensor.dtype())),
        raw_data: Some(tensor.data().clone()),
        ..TensorProto::default()
    }
}

fn placed(constant: &Constant, name: &str, placement: &Placement) -> Result<TensorProto, WriteError> {
    let expected = constant.byte_len() as u64;
    if placement.length != expected {
        return Err(WriteError::Placement {
            name: name.to_string(),
            file: placement.file.clone(),
            expected,
            found: placement.length,
        });
    }
    let entry = |key: &str, value: String| StringStringEntryProto {
        key: Some(key.to_string()),
        value: Some(value),
    };
    Ok(TensorProto {
        dims: dims(constant.shape()),
        data_type: Some(stored_code(constant.dtype())),
        data_location: Some(1),
        external_data: vec![
            entry("location", placement.file.clone()),
            entry("offset", placement.offset.to_string()),
            entry("length", placement.length.to_string()),
        ],
        ..TensorProto::default()
    })
}

fn value_info(graph: &Graph, id: ValueId) -> Result<ValueInfoProto, WriteError> {
    let value = graph.value(id);
    let (Some(dtype), Some(shape)) = (value.dtype, &value.shape) else {
        return Err(WriteError::Untyped {
            value: value.name.clone(),
        });
    };
    let dim = shape.iter().map(|dim| match dim.as_const() {
        Some(size) => DimensionProto {
            dim_value: Some(size),
            dim_param: None,
        },
        None => DimensionProto {
            dim_value: None,
            dim_param: Some(dim.to_string()),
        },
    });
    Ok(ValueInfoProto {
        name: Some(value.name.clone()),
        r#type: Some(TypeProto {
            tensor_type: Some(TensorTypeProto {
                elem_type: Some(stored_code(dtype)),
                shape: Some(TensorShapeProto { dim: dim.collect() }),
            }),
        }),
    })
}

fn node_proto(graph: &Graph, node: &Node) -> Result<NodeProto, WriteError> {
    if let Op::Unknown { .. } = node.op {
        return Err(WriteError::UnknownOp {
            node: node.name.clone(),
            op: node.op.name(),
        });
    }
    let names = |values: &[Option<ValueId>]| {
        let name = |v: &Option<ValueId>| v.map(|v| graph.value(v).name.clone()).unwrap_or_default();
        values.iter().map(name).collect()
    };
    let mut attribute: Vec<AttributeProto> = node.op.attributes().into_iter().map(attribute_proto).collect();
    // ONNX's Mod takes floats only with fmod.
    let float = |v: ValueId| graph.value(v).dtype.is_some_and(DType::is_float);
    if node.op == Op::Binary(Binary::Mod) && node.input(0).is_some_and(float) {
        attribute.push(attribute_proto(("fmod", Attribute::Int(1))));
    }
    // Since opset 18 a split into equal parts needs their number.
    if matches!(node.op, Op::Split { .. }) && node.input(1).is_none() {
        attribute.push(attribute_proto((
            "num_outputs",
            Attribute::Int(node.outputs.len() as i64),
        )));
    }
    Ok(NodeProto {
        input: names(&node.inputs),
        output: names(&node.outputs),
        name: Some(node.name.clone()),
        op_type: Some(node.op.op_type().to_string()),
        domain: Some(node.op.domain().to_string()).filter(|d| !d.is_empty()),
        attribute,
        overload: expert_functions::overload(node),
    })
}

pub(super) fn attribute_proto((name, value): (&'static str, Attribute)) -> AttributeProto {
    let mut proto = AttributeProto {
        name: Some(name.to_string()),
        ..AttributeProto::default()
    };
    let kind = match value {
        Attribute::Int(value) => {
            proto.i = Some(value);
            attribute_type::INT
        }
        Attribute::DType(dtype) => {
            proto.i = Some(i64::from(stored_code(dtype)));
            attribute_type::INT
        }
        Attribute::Float(value) => {
            proto.f = Some(value);
            attribute_type::FLOAT
        }
        Attribute::Ints(values) => {
            proto.ints = values;
            attribute_type::INTS
        }
        Attribute::Text(text) => {
            proto.s = Some(Bytes::from_static(text.as_bytes()));
            attribute_type::STRING
        }
        Attribute::Tensor(value) => {
            proto.t = Some(tensor(&value));
            attribute_type::TENSOR
        }
    };
    proto.r#type = Some(kind);
    proto
}
