//! Lapidary's operators ([`LAPIDARY`]) as functions of standard operators. A written model contains these functions, so that every
//! runtime can execute it. Lapidary's reader knows the operators and skips the functions.

use super::proto::{AttributeProto, FunctionProto, NodeProto, OperatorSetIdProto, attribute_type};
use super::write::{OPSET, attribute_proto};
use crate::graph::{Attribute, LAPIDARY};
use crate::tensor::{DType, Tensor};

/// The name of the operator that dequantizes codes of a table, in blocks of the last axis: inputs are codes (uint4) and
/// scales, its attribute is `block_size`. `None`: the codes have no table.
pub(super) fn table_operator(codes: DType) -> Option<&'static str> {
    match codes {
        DType::Nf4 => Some("DequantizeNf4"),
        DType::Fp4 => Some("DequantizeFp4"),
        _ => None,
    }
}

/// The table's element type by the operator's name.
pub(super) fn table_of(operator: &str) -> Option<DType> {
    [DType::Nf4, DType::Fp4]
        .into_iter()
        .find(|dtype| table_operator(*dtype) == Some(operator))
}

/// The function of one of Lapidary's operators; `None` if there is no such operator.
pub(super) fn function(operator: &str) -> Option<FunctionProto> {
    let (inputs, attributes, nodes): (&[&str], &[&str], Vec<NodeProto>) = match operator {
        "RoundToCodes" => (&["x"], &["to"], round_to_codes()),
        "DynamicRoundToCodes" => (&["x"], &[], dynamic_round_to_codes()),
        "RoundedAttention" => (&["q", "k", "v", "mask"], &["scale"], rounded_attention()),
        "BiasedAttention" => (
            &["q", "k", "v", "mask", "slopes", "sinks"],
            &["scale"],
            biased_attention(),
        ),
        _ => (
            &["codes", "scales"],
            &["block_size"],
            dequantize_table(table_of(operator)?),
        ),
    };
    // The writer omits an attribute that has the operator's default.
    let real = |name| attribute_proto((name, Attribute::Float(0.0)));
    let defaults = match operator {
        "RoundToCodes" => vec![attribute_proto(("scale", Attribute::Float(1.0))), int("zero_point", 0)],
        // A scale of 0 means no rounding.
        "RoundedAttention" => {
            let rounding = |[to, scale, zero]: [&'static str; 3]| [int(to, INT8), real(scale), int(zero, 0)];
            let mut all = vec![real("softcap")];
            all.extend(ROUNDED.into_iter().flat_map(|(_, attributes)| rounding(attributes)));
            all
        }
        "BiasedAttention" => vec![real("softcap")],
        _ => Vec::new(),
    };
    Some(FunctionProto {
        attribute: owned(attributes),
        attribute_proto: defaults,
        ..function_of(operator, inputs, &["y"], nodes)
    })
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| n.to_string()).collect()
}

/// A function of Lapidary's domain without attributes; its nodes have the opset that is written.
pub(super) fn function_of(name: &str, inputs: &[&str], outputs: &[&str], nodes: Vec<NodeProto>) -> FunctionProto {
    FunctionProto {
        name: Some(name.to_string()),
        input: owned(inputs),
        output: owned(outputs),
        node: nodes,
        opset_import: vec![OperatorSetIdProto {
            domain: Some(String::new()),
            version: Some(OPSET),
        }],
        domain: Some(LAPIDARY.to_string()),
        ..FunctionProto::default()
    }
}

/// The numbers of the codes, times the scale of their block.
fn dequantize_table(table: DType) -> Vec<NodeProto> {
    let codes: Vec<i64> = (0..16).collect();
    let codes = Tensor::from_i64_as(DType::U4, vec![16], &codes);
    let numbers = Tensor::new(table, vec![16], codes.data().clone()).expect("16 codes of 4 bits");
    let numbers = Tensor::from_f32(vec![16], &numbers.to_f32());
    vec![
        tensor("numbers", &numbers),
        node("Cast", &["codes"], "index", vec![int("to", 7)]),
        node("Gather", &["numbers", "index"], "values", vec![]),
        node("CastLike", &["values", "scales"], "typed", vec![]),
        tensor("any", &Tensor::from_i64(vec![1], &[-1])),
        tensor("one", &Tensor::from_i64(vec![1], &[1])),
        node(
            "Constant",
            &[],
            "size",
            vec![reference("value_int", "block_size", attribute_type::INT)],
        ),
        node("Reshape", &["size", "one"], "width", vec![]),
        node("Concat", &["any", "width"], "rows", vec![int("axis", 0)]),
        node("Concat", &["any", "one"], "column", vec![int("axis", 0)]),
        node("Reshape", &["typed", "rows"], "blocks", vec![]),
        node("Reshape", &["scales", "column"], "factors", vec![]),
        node("Mul", &["blocks", "factors"], "products", vec![]),
        node("Shape", &["codes"], "shape", vec![]),
        node("Reshape", &["products", "shape"], "y", vec![]),
    ]
}

fn round_to_codes() -> Vec<NodeProto> {
    vec![
        node("Cast", &["x"], "wide", vec![int("to", 1)]),
        node(
            "Constant",
            &[],
            "factor",
            vec![reference("value_float", "scale", attribute_type::FLOAT)],
        ),
        node(
            "Constant",
            &[],
            "whole",
            vec![reference("value_int", "zero_point", attribute_type::INT)],
        ),
        node(
            "Cast",
            &["whole"],
            "zero",
            vec![reference("to", "to", attribute_type::INT)],
        ),
        node("QuantizeLinear", &["wide", "factor", "zero"], "codes", vec![]),
        node("DequantizeLinear", &["codes", "factor", "zero"], "rounded", vec![]),
        node("CastLike", &["rounded", "x"], "y", vec![]),
    ]
}

/// ONNX's number of int8.
const INT8: i64 = 3;

/// The values that a `RoundedAttention` rounds, with their attributes.
const ROUNDED: [(&str, [&str; 3]); 3] = [
    ("scores", ["scores_to", "scores_scale", "scores_zero_point"]),
    ("bounded", ["capped_to", "capped_scale", "capped_zero_point"]),
    (
        "probabilities",
        ["probabilities_to", "probabilities_scale", "probabilities_zero_point"],
    ),
];

pub(super) fn scalar(name: &str, value: f32) -> NodeProto {
    tensor(name, &Tensor::from_f32(vec![], &[value]))
}

pub(super) fn ints(name: &str, values: &[i64]) -> NodeProto {
    tensor(name, &Tensor::from_i64(vec![values.len()], values))
}

fn joined(inputs: &[&str], output: &str, axis: i64) -> NodeProto {
    node("Concat", inputs, output, vec![int("axis", axis)])
}

/// The caller's attribute as a scalar.
fn real_of(name: &str, caller: &str) -> NodeProto {
    let value = reference("value_float", caller, attribute_type::FLOAT);
    node("Constant", &[], name, vec![value])
}

/// `scores`: the scaled products of queries and keys `[batch, heads, tokens, slots]` in fp32. The heads of a group are rows
/// of one product with their KV head.
fn scores_of_heads() -> Vec<NodeProto> {
    let sizes = |of: &str, name: &str, start: i64, end: i64| {
        node("Shape", &[of], name, vec![int("start", start), int("end", end)])
    };
    vec![
        ints("rest", &[-1]),
        scalar("none", 0.0),
        scalar("never", -1e30),
        sizes("k", "of_groups", 0, 2),
        sizes("q", "of_heads", 0, 3),
        sizes("q", "width", 3, 4),
        sizes("k", "slots", 2, 3),
        sizes("v", "value_width", 3, 4),
        joined(&["of_groups", "rest", "width"], "rows", 0),
        joined(&["of_groups", "rest", "slots"], "by_group", 0),
        joined(&["of_heads", "slots"], "by_head", 0),
        joined(&["of_heads", "value_width"], "of_result", 0),
        node("Cast", &["q"], "q_wide", vec![int("to", 1)]),
        node("Cast", &["k"], "k_wide", vec![int("to", 1)]),
        node("Cast", &["v"], "v_wide", vec![int("to", 1)]),
        real_of("factor", "scale"),
        node("Mul", &["q_wide", "factor"], "q_scaled", vec![]),
        node("Reshape", &["q_scaled", "rows"], "q_rows", vec![]),
        node(
            "Transpose",
            &["k_wide"],
            "k_columns",
            vec![attribute_proto(("perm", Attribute::Ints(vec![0, 1, 3, 2])))],
        ),
        node("MatMul", &["q_rows", "k_columns"], "products", vec![]),
        node("Reshape", &["products", "by_head"], "scores", vec![]),
    ]
}

/// `bounded` from the scores of that name: after the soft cap, if there is one.
fn capped(scores: &str) -> [NodeProto; 6] {
    [
        real_of("cap", "softcap"),
        node("Div", &[scores, "cap"], "uncapped", vec![]),
        node("Tanh", &["uncapped"], "bent", vec![]),
        node("Mul", &["bent", "cap"], "capped", vec![]),
        node("Equal", &["cap", "none"], "has_no_cap", vec![]),
        node("Where", &["has_no_cap", scores, "capped"], "bounded", vec![]),
    ]
}

/// `y` from the probabilities of that name.
fn products_with_values(probabilities: &str) -> [NodeProto; 4] {
    [
        node("Reshape", &[probabilities, "by_group"], "shares", vec![]),
        node("MatMul", &["shares", "v_wide"], "attended", vec![]),
        node("Reshape", &["attended", "of_result"], "result", vec![]),
        node("CastLike", &["result", "q"], "y", vec![]),
    ]
}

fn rounded_attention() -> Vec<NodeProto> {
    let mut nodes = scores_of_heads();
    nodes.extend(rounded_or_not(ROUNDED[0]));
    nodes.extend(capped("scores_near"));
    nodes.extend(rounded_or_not(ROUNDED[1]));
    nodes.extend([
        node("Where", &["mask", "bounded_near", "never"], "masked", vec![]),
        node("Softmax", &["masked"], "probabilities", vec![int("axis", -1)]),
    ]);
    nodes.extend(rounded_or_not(ROUNDED[2]));
    nodes.extend(products_with_values("probabilities_near"));
    nodes
}

/// The sink of a head is the score of an additional slot after the others.
fn biased_attention() -> Vec<NodeProto> {
    let whole = |name: &str, value: i64| tensor(name, &Tensor::from_i64(vec![], &[value]));
    let mut nodes = scores_of_heads();
    nodes.extend(capped("scores"));
    nodes.extend([
        whole("first", 0),
        whole("step", 1),
        ints("start", &[0]),
        ints("one", &[1]),
        ints("last_axis", &[3]),
        ints("column", &[-1, 1, 1]),
        ints("of_sinks", &[1, -1, 1, 1]),
        node("Squeeze", &["slots"], "slot_count", vec![]),
        node("Range", &["first", "slot_count", "step"], "slot_numbers", vec![]),
        node("Cast", &["slot_numbers"], "slot_reals", vec![int("to", 1)]),
        node("Cast", &["slopes"], "slopes_wide", vec![int("to", 1)]),
        node("Reshape", &["slopes_wide", "column"], "slope_column", vec![]),
        node("Mul", &["slope_column", "slot_reals"], "bias", vec![]),
        node("Add", &["bounded", "bias"], "biased", vec![]),
        node("Where", &["mask", "biased", "never"], "masked", vec![]),
        node("Cast", &["sinks"], "sinks_wide", vec![int("to", 1)]),
        node("Reshape", &["sinks_wide", "of_sinks"], "sink_column", vec![]),
        joined(&["of_heads", "one"], "of_one_slot", 0),
        node("Expand", &["sink_column", "of_one_slot"], "sink_scores", vec![]),
        joined(&["masked", "sink_scores"], "with_sink", -1),
        node("Softmax", &["with_sink"], "all_shares", vec![int("axis", -1)]),
        node(
            "Slice",
            &["all_shares", "start", "slots", "last_axis"],
            "probabilities",
            vec![],
        ),
    ]);
    nodes.extend(products_with_values("probabilities"));
    nodes
}

/// `NAME_near` from `NAME`: rounded, or unchanged if the scale is 0.
fn rounded_or_not((name, [to, scale, zero_point]): (&str, [&str; 3])) -> Vec<NodeProto> {
    let part = |part: &str| format!("{name}_{part}");
    let (step, whole, zero) = (part("step"), part("whole"), part("zero"));
    let (codes, rounded, kept) = (part("codes"), part("rounded"), part("kept"));
    let value = |name: &str, caller: &str, kind: i32| vec![reference(name, caller, kind)];
    vec![
        node(
            "Constant",
            &[],
            &step,
            value("value_float", scale, attribute_type::FLOAT),
        ),
        node(
            "Constant",
            &[],
            &whole,
            value("value_int", zero_point, attribute_type::INT),
        ),
        node("Cast", &[&whole], &zero, value("to", to, attribute_type::INT)),
        node("QuantizeLinear", &[name, &step, &zero], &codes, vec![]),
        node("DequantizeLinear", &[&codes, &step, &zero], &rounded, vec![]),
        node("Equal", &[&step, "none"], &kept, vec![]),
        node("Where", &[&kept, name, &rounded], &part("near"), vec![]),
    ]
}

fn dynamic_round_to_codes() -> Vec<NodeProto> {
    let mut quantize = node("DynamicQuantizeLinear", &["wide"], "codes", vec![]);
    quantize.output.extend(["factor", "zero"].map(str::to_string));
    vec![
        node("Cast", &["x"], "wide", vec![int("to", 1)]),
        quantize,
        node("DequantizeLinear", &["codes", "factor", "zero"], "rounded", vec![]),
        node("CastLike", &["rounded", "x"], "y", vec![]),
    ]
}

pub(super) fn node(op_type: &str, inputs: &[&str], output: &str, attribute: Vec<AttributeProto>) -> NodeProto {
    NodeProto {
        input: inputs.iter().map(|n| n.to_string()).collect(),
        output: vec![output.to_string()],
        name: Some(output.to_string()),
        op_type: Some(op_type.to_string()),
        domain: None,
        attribute,
        overload: None,
    }
}

pub(super) fn tensor(name: &str, value: &Tensor) -> NodeProto {
    let attribute = attribute_proto(("value", Attribute::Tensor(value.clone())));
    node("Constant", &[], name, vec![attribute])
}

pub(super) fn int(name: &'static str, value: i64) -> AttributeProto {
    attribute_proto((name, Attribute::Int(value)))
}

/// An attribute with the value of one of the caller's attributes.
fn reference(name: &str, caller: &str, kind: i32) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_string()),
        r#type: Some(kind),
        ref_attr_name: Some(caller.to_string()),
        ..AttributeProto::default()
    }
}
