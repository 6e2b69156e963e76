//! GPTQ and AWQ, whose layers have `qweight`, `qzeros`, `scales` and optionally `g_idx`.
//!
//! Formats: AutoGPTQ's `QuantLinear`, GPTQModel's `convert_gptq_v1_to_v2_format`, AutoAWQ's `WQLinear_GEMM` and
//! `reverse_awq_order`.
//!
//! | | GPTQ | AWQ (`gemm`) |
//! |---|---|---|
//! | `qweight` | i32 `[in·b/32, out]`, the first input in the lowest bits | i32 `[in, out/8]`, outputs interleaved |
//! | `qzeros` | i32 `[groups, out·b/32]`, minus 1 in `gptq`, unchanged in `gptq_v2` | i32 `[groups, out/8]`, interleaved |
//! | `scales` | `[groups, out]` | `[groups, out]` |
//! | `g_idx` | i32 `[in]`, the group of each input | |
//!
//! With inputs in an order other than that of their groups (`desc_act`), the weight's columns are in the order of
//! groups. Such a weight fits only a package whose layer reorders its inputs in the same way.

use serde_json::{Map, Value};

use super::words::{Order, code_type, unpacked};
use super::{Assembled, Tensors, integer, layers, only_known, put, shaped, taken};
use crate::graph::Constant;
use crate::tensor::quantized::Granularity;
use crate::tensor::{DType, Tensor};

/// Fields of AutoGPTQ, GPTQModel, optimum and transformers: fields that are checked, and fields for creating the model
/// or for running it in one of these.
const GPTQ_FIELDS: [&str; 47] = [
    "quant_method",
    "method",
    "bits",
    "group_size",
    "desc_act",
    "sym",
    "checkpoint_format",
    "format",
    "is_marlin_format",
    "lm_head",
    "pack_dtype",
    "damp_percent",
    "damp_auto_increment",
    "static_groups",
    "true_sequential",
    "mse",
    "act_group_aware",
    "model_name_or_path",
    "model_file_base_name",
    "model_seqlen",
    "batch_size",
    "block_name_to_quantize",
    "module_name_preceding_first_block",
    "modules_in_block_to_quantize",
    "modules_to_not_convert",
    "cache_block_outputs",
    "dataset",
    "tokenizer",
    "pad_token_id",
    "max_input_length",
    "use_cuda_fp16",
    "use_exllama",
    "disable_exllama",
    "exllama_config",
    "backend",
    "quantizer",
    "meta",
    "version",
    "parallel_packing",
    "offload_to_disk",
    "offload_to_disk_path",
    "v2",
    "v2_alpha",
    "rotation",
    "hyb_act",
    "mock_quantization",
    "quant_mode",
];

const AWQ_FIELDS: [&str; 22] = [
    "quant_method",
    "bits",
    "w_bit",
    "group_size",
    "q_group_size",
    "zero_point",
    "version",
    "format",
    "backend",
    "modules_to_not_convert",
    "do_fuse",
    "fuse_max_seq_len",
    "modules_to_fuse",
    "exllama_config",
    "desc_act",
    "sym",
    "lm_head",
    "meta",
    "pack_dtype",
    "model_name_or_path",
    "checkpoint_format",
    "method",
];

/// Formats whose zero points are stored minus 1.
const V1: &str = "gptq";
const V2: &str = "gptq_v2";

/// Reads a GPTQ checkpoint.
pub fn gptq(config: &Map<String, Value>, tensors: &mut Tensors) -> Result<Assembled, String> {
    // Rules for some modules: `-:NAME` excludes them, which their tensors show.
    let dynamic = config.get("dynamic").and_then(Value::as_object);
    if let Some((rule, _)) = dynamic.into_iter().flatten().find(|(rule, _)| !rule.starts_with("-:")) {
        return Err(format!(
            "quantization_config: dynamic has {rule:?}, modules quantized in another way"
        ));
    }
    only_known(config, &[&GPTQ_FIELDS[..], &["dynamic"]].concat())?;
    pack_type(config)?;
    let text = |name: &str| config.get(name).and_then(Value::as_str);
    if text("rotation").is_some() {
        return Err("quantization_config: rotation: weights of a rotated model need rotated activations".into());
    }
    let format = text("checkpoint_format").or(text("format")).unwrap_or(V1);
    if ![V1, V2].contains(&format) || config.get("is_marlin_format") == Some(&Value::Bool(true)) {
        let format = if [V1, V2].contains(&format) { "marlin" } else { format };
        return Err(format!("quantization_config: checkpoint_format {format:?} is not read"));
    }
    let bits = integer(config, "bits")?;
    let dtype = code_type(bits).ok_or_else(|| format!("quantization_config: bits is {bits}; 2, 4 and 8 are read"))?;
    let group = integer(config, "group_size")?;
    let mut assembled = Assembled {
        method: "GPTQ".to_string(),
        ..Assembled::default()
    };
    for layer in layers(tensors, ".qweight") {
        let [qweight, qzeros, scales] = parts(tensors, &layer)?;
        let groups = tensors.remove(&format!("{layer}.g_idx"));
        let [words, out] = matrix(&qweight, &layer)?;
        let depth = match &groups {
            // Words may be padded.
            Some(groups) => groups.len(),
            None => words * (32 / dtype.bits()),
        };
        let size = group_size(&layer, group, depth, &scales, out)?;
        let count = depth / size;
        let fails = |part: &str| {
            let (layer, part) = (layer.clone(), part.to_string());
            move |why: String| format!("{layer}: {part} {why}")
        };
        let codes = unpacked(&qweight, dtype, 0, Order::Rising, [depth, out]).map_err(fails("qweight"))?;
        let zeros = unpacked(&qzeros, dtype, 1, Order::Rising, [count, out]).map_err(fails("qzeros"))?;
        let zeros = match format {
            V1 => plus_one(&zeros).map_err(fails("qzeros"))?,
            _ => zeros,
        };
        let mut codes = codes.transposed(&[1, 0]);
        let order = match groups {
            Some(groups) => group_order(&groups, size, &layer)?,
            None => None,
        };
        if let Some(order) = &order {
            let order = Constant::tensor(Tensor::from_i64(vec![order.len()], order));
            codes = codes.taken(1, &order);
        }
        let name = put_grouped(tensors, &layer, codes, &scales, zeros, size)?;
        assembled.orders.extend(order.map(|order| (name, order)));
    }
    Ok(assembled)
}

/// Reads an AWQ checkpoint.
pub fn awq(config: &Map<String, Value>, tensors: &mut Tensors) -> Result<Assembled, String> {
    only_known(config, &AWQ_FIELDS)?;
    pack_type(config)?;
    let either = |names: [&str; 2]| match config.contains_key(names[0]) {
        true => integer(config, names[0]),
        false => integer(config, names[1]),
    };
    let bits = either(["bits", "w_bit"])?;
    if bits != 4 {
        return Err(format!("quantization_config: bits is {bits}; AWQ's 4 are read"));
    }
    for name in ["version", "format", "checkpoint_format"] {
        let version = config.get(name).and_then(Value::as_str).unwrap_or("gemm");
        if !version.eq_ignore_ascii_case("gemm") {
            return Err(format!(
                "quantization_config: {name} {version:?} is not read; AWQ's gemm is"
            ));
        }
    }
    let group = either(["group_size", "q_group_size"])?;
    for layer in layers(tensors, ".qweight") {
        let [qweight, qzeros, scales] = parts(tensors, &layer)?;
        let [depth, words] = matrix(&qweight, &layer)?;
        let out = words * 8;
        let size = group_size(&layer, group, depth, &scales, out)?;
        let read = |words: &Constant, part: &str, rows: usize| {
            let codes = unpacked(words, DType::U4, 1, Order::Interleaved, [rows, out]);
            codes.map_err(|why| format!("{layer}: {part} {why}"))
        };
        let codes = read(&qweight, "qweight", depth)?.transposed(&[1, 0]);
        let zeros = read(&qzeros, "qzeros", depth / size)?;
        put_grouped(tensors, &layer, codes, &scales, zeros, size)?;
    }
    Ok(Assembled {
        method: "AWQ".to_string(),
        ..Assembled::default()
    })
}

fn pack_type(config: &Map<String, Value>) -> Result<(), String> {
    match config.get("pack_dtype").and_then(Value::as_str).unwrap_or("int32") {
        "int32" | "torch.int32" => Ok(()),
        other => Err(format!(
            "quantization_config: pack_dtype {other:?} is not read; int32 is"
        )),
    }
}

fn parts(tensors: &mut Tensors, layer: &str) -> Result<[Constant; 3], String> {
    let mut part = |part: &str| taken(tensors, layer, part);
    Ok([part(".qweight")?, part(".qzeros")?, part(".scales")?])
}

fn matrix(constant: &Constant, layer: &str) -> Result<[usize; 2], String> {
    match constant.shape() {
        [rows, columns] => Ok([*rows, *columns]),
        other => Err(format!(
            "{layer}: qweight has the shape {other:?}, which is not a matrix"
        )),
    }
}

/// Inputs per group, where -1 in the configuration means all; the number of scales must agree.
fn group_size(layer: &str, group: i64, depth: usize, scales: &Constant, out: usize) -> Result<usize, String> {
    let size = match group {
        -1 => depth,
        size => usize::try_from(size).unwrap_or(0),
    };
    if size == 0 || depth == 0 || !depth.is_multiple_of(size) {
        return Err(format!("{layer}: groups of {group} do not divide its {depth} inputs"));
    }
    shaped(scales, layer, "scales", &[depth / size, out])?;
    Ok(size)
}

/// The weight of codes `[out, in]` with scales and zero points `[groups, out]`.
fn put_grouped(
    tensors: &mut Tensors,
    layer: &str,
    codes: Constant,
    scales: &Constant,
    zeros: Constant,
    size: usize,
) -> Result<String, String> {
    let (scales, zeros) = (scales.transposed(&[1, 0]), zeros.transposed(&[1, 0]));
    let granularity = Granularity::Block { axis: 1, size };
    put(
        tensors,
        layer,
        Constant::quantized(codes, scales, Some(zeros), granularity),
    )
}

/// Zero points that were stored minus 1. One that becomes too large is refused: libraries disagree on its meaning.
fn plus_one(zeros: &Constant) -> Result<Constant, String> {
    let (dtype, tensor) = (zeros.dtype(), zeros.materialize().map_err(|e| e.to_string())?);
    let values: Vec<i64> = tensor.to_i64().iter().map(|v| v + 1).collect();
    let (_, most) = dtype.int_range();
    match values.iter().position(|v| *v > most) {
        Some(at) => Err(format!(
            "has the zero point {} at {at}, stored as {most}, which does not fit {} bits",
            values[at],
            dtype.bits()
        )),
        None => Ok(Constant::tensor(Tensor::from_i64_as(
            dtype,
            tensor.shape().to_vec(),
            &values,
        ))),
    }
}

/// The order of inputs that makes each group contiguous; `None` if groups already are.
fn group_order(groups: &Constant, size: usize, layer: &str) -> Result<Option<Vec<i64>>, String> {
    let tensor = groups.materialize().map_err(|e| format!("{layer}: g_idx: {e}"))?;
    if groups.dtype().is_float() || groups.shape().len() != 1 {
        return Err(format!("{layer}: g_idx is {groups:?}, not a vector of whole numbers"));
    }
    let found = tensor.to_i64();
    let mut counts = vec![0usize; found.len() / size];
    for (k, group) in found.iter().enumerate() {
        let count = usize::try_from(*group).ok().and_then(|group| counts.get_mut(group));
        let all = found.len() / size;
        *count.ok_or_else(|| format!("{layer}: g_idx has the group {group} at {k}, and there are {all}"))? += 1;
    }
    if let Some(group) = counts.iter().position(|count| *count != size) {
        return Err(format!(
            "{layer}: g_idx has {} inputs in group {group}, not {size}",
            counts[group]
        ));
    }
    if found.windows(2).all(|pair| pair[0] <= pair[1]) {
        return Ok(None);
    }
    let mut order: Vec<i64> = (0..found.len() as i64).collect();
    order.sort_by_key(|input| found[*input as usize]);
    Ok(Some(order))
}
