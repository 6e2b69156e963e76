//! Operators of our own ([`LAPIDARY`]) as functions of standard operators, which a written model brings along, so that every
//! runtime can execute it. Our reader knows the operators and passes over the functions.

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

/// The function of an operator of our own; `None` if there is no such operator.
pub(super) fn function(operator: &str) -> Option<FunctionProto> {
    let (inputs, attributes, nodes): (&[&str], &[&str], Vec<NodeProto>) = match operator {
        "RoundToCodes" => (&["x"], &["to"], round_to_codes()),
        "DynamicRoundToCodes" => (&["x"], &[], dynamic_round_to_codes()),
        _ => (
            &["codes", "scales"],
            &["block_size"],
            dequantize_table(table_of(operator)?),
        ),
    };
    // What the writer leaves out where it is the operator's default.
    let defaults = match operator {
        "RoundToCodes" => vec![attribute_proto(("scale", Attribute::Float(1.0))), int("zero_point", 0)],
        _ => Vec::new(),
    };
    let owned = |names: &[&str]| names.iter().map(|n| n.to_string()).collect();
    Some(FunctionProto {
        name: Some(operator.to_string()),
        input: owned(inputs),
        output: vec!["y".to_string()],
        attribute: owned(attributes),
        attribute_proto: defaults,
        node: nodes,
        opset_import: vec![OperatorSetIdProto {
            domain: Some(String::new()),
            version: Some(OPSET),
        }],
        domain: Some(LAPIDARY.to_string()),
        ..FunctionProto::default()
    })
}

/// Numbers by their codes, block by block times their scale.
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

fn node(op_type: &str, inputs: &[&str], output: &str, attribute: Vec<AttributeProto>) -> NodeProto {
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

fn tensor(name: &str, value: &Tensor) -> NodeProto {
    let attribute = attribute_proto(("value", Attribute::Tensor(value.clone())));
    node("Constant", &[], name, vec![attribute])
}

fn int(name: &'static str, value: i64) -> AttributeProto {
    attribute_proto((name, Attribute::Int(value)))
}

/// An attribute that has the value of one of the caller's.
fn reference(name: &str, caller: &str, kind: i32) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_string()),
        r#type: Some(kind),
        ref_attr_name: Some(caller.to_string()),
        ..AttributeProto::default()
    }
}
