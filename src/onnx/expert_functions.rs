//! Routing and experts as functions of standard operators. Their operators and inputs vary, which the attributes of a function
//! cannot express, so each form is its own overload.

use super::functions::{function_of, int, ints, node, scalar, tensor};
use super::proto::{FunctionProto, NodeProto};
use super::write::attribute_proto;
use crate::graph::op::{ChosenWeights, ExpertActivation, Experts, Op, RouterScores, Routing};
use crate::graph::{Attribute, Node};
use crate::tensor::Tensor;

const INPUTS: [&str; 9] = [
    "x",
    "weights",
    "experts",
    "gate",
    "up",
    "down",
    "gate_bias",
    "up_bias",
    "down_bias",
];

/// The overload of a node's operator; `None` for an operator whose function has no overloads.
pub(super) fn overload(node: &Node) -> Option<String> {
    let present = || -> String {
        let each = node.inputs.iter().map(|input| if input.is_some() { '1' } else { '0' });
        each.collect()
    };
    let attributes = match node.op {
        Op::Routing(_) | Op::Experts(_) => node.op.attributes(),
        _ => return None,
    };
    let mut text = format!("inputs_{}", present());
    for (name, value) in attributes {
        text += &match value {
            Attribute::Int(value) => format!("_{name}_{value}"),
            Attribute::Float(value) => format!("_{name}_{value}"),
            Attribute::Text(value) => format!("_{name}_{value}"),
            _ => String::new(),
        };
    }
    Some(text)
}

/// The function of a node with an overload.
pub(super) fn function(of: &Node) -> Option<FunctionProto> {
    let (inputs, outputs, nodes): (&[&str], &[&str], Vec<NodeProto>) = match &of.op {
        Op::Routing(how) => {
            let corrected = of.input(1).is_some();
            let inputs = if corrected {
                &["logits", "correction"][..]
            } else {
                &["logits"]
            };
            (inputs, &["y", "experts"], routing(how, corrected))
        }
        Op::Experts(how) => (&INPUTS[..of.inputs.len().min(9)], &["y"], experts(how, of)),
        _ => return None,
    };
    // Their values are in the function's nodes, but a caller's attributes must still be declared.
    let attributes = of.op.attributes().into_iter().map(|(name, _)| name.to_string());
    Some(FunctionProto {
        overload: overload(of),
        attribute: attributes.collect(),
        ..function_of(of.op.op_type(), inputs, outputs, nodes)
    })
}

/// A top-k over the last axis: its values and indices.
fn top_k(x: &str, k: &str, values: &str, indices: &str) -> NodeProto {
    let mut made = node("TopK", &[x, k], values, vec![int("axis", -1)]);
    made.output.push(indices.to_string());
    made
}

fn reduce_sum(x: &str, axes: &str, y: &str, keepdims: bool) -> NodeProto {
    node("ReduceSum", &[x, axes], y, vec![int("keepdims", i64::from(keepdims))])
}

fn routing(how: &Routing, corrected: bool) -> Vec<NodeProto> {
    let wide = |from: &str, to: &str| node("Cast", &[from], to, vec![int("to", 1)]);
    let mut nodes = vec![
        ints("k", &[how.top_k as i64]),
        ints("last", &[-1]),
        wide("logits", "wide"),
        match how.scores {
            RouterScores::Softmax => node("Softmax", &["wide"], "scores", vec![int("axis", -1)]),
            RouterScores::Sigmoid => node("Sigmoid", &["wide"], "scores", vec![]),
            RouterScores::Logits => node("Identity", &["wide"], "scores", vec![]),
        },
    ];
    match corrected {
        true => {
            nodes.push(wide("correction", "wide_correction"));
            nodes.push(node("Add", &["scores", "wide_correction"], "choice", vec![]));
        }
        false => nodes.push(node("Identity", &["scores"], "choice", vec![])),
    }
    if how.groups > 0 {
        let flags = tensor("flags", &Tensor::from_f32(vec![2], &[0.0, 1.0]));
        nodes.extend([
            ints("groups", &[how.groups as i64]),
            ints("group_best", &[how.group_best as i64]),
            ints("top_groups", &[how.top_groups as i64]),
            ints("within", &[-2]),
            flags,
            node("Shape", &["choice"], "whole", vec![]),
            node("Shape", &["choice"], "leading", vec![int("start", 0), int("end", -1)]),
            node(
                "Concat",
                &["leading", "groups", "last"],
                "in_groups",
                vec![int("axis", 0)],
            ),
            node("Reshape", &["choice", "in_groups"], "grouped", vec![]),
            top_k("grouped", "group_best", "best", "best_places"),
            reduce_sum("best", "last", "goodness", false),
            top_k("goodness", "top_groups", "good", "good_groups"),
            node(
                "OneHot",
                &["good_groups", "groups", "flags"],
                "hot",
                vec![int("axis", -1)],
            ),
            reduce_sum("hot", "within", "inside", false),
            node("Unsqueeze", &["inside", "last"], "factors", vec![]),
            node("Mul", &["grouped", "factors"], "kept", vec![]),
            node("Reshape", &["kept", "whole"], "open", vec![]),
        ]);
    } else {
        nodes.push(node("Identity", &["choice"], "open", vec![]));
    }
    nodes.push(top_k("open", "k", "greatest", "experts"));
    nodes.push(node(
        "GatherElements",
        &["scores", "experts"],
        "chosen",
        vec![int("axis", -1)],
    ));
    match how.weights {
        ChosenWeights::Scores => nodes.push(node("Identity", &["chosen"], "shares", vec![])),
        ChosenWeights::Softmax => nodes.push(node("Softmax", &["chosen"], "shares", vec![int("axis", -1)])),
        ChosenWeights::Normalized => nodes.extend([
            reduce_sum("chosen", "last", "total", true),
            node("Div", &["chosen", "total"], "shares", vec![]),
        ]),
        ChosenWeights::Sigmoid => nodes.push(node("Sigmoid", &["chosen"], "shares", vec![])),
        ChosenWeights::SparseMixer => nodes.extend([
            scalar("margin", how.margin),
            scalar("none", 0.0),
            tensor("mixer_flags", &Tensor::from_f32(vec![2], &[0.0, 1.0])),
            tensor("places", &Tensor::from_i64(vec![], &[-2])),
            ints("across", &[-2]),
            node("Unsqueeze", &["chosen", "last"], "own", vec![]),
            node("Unsqueeze", &["scores", "across"], "others", vec![]),
            node("Sub", &["own", "others"], "gap", vec![]),
            node("Abs", &["others"], "magnitude", vec![]),
            node("Max", &["magnitude", "own"], "size", vec![]),
            node("Mul", &["size", "margin"], "bound", vec![]),
            node("Greater", &["gap", "bound"], "far", vec![]),
            node("Shape", &["logits"], "count", vec![int("start", -1)]),
            node(
                "OneHot",
                &["experts", "count", "mixer_flags"],
                "hot",
                vec![int("axis", -1)],
            ),
            // One for those that were chosen before.
            node("CumSum", &["hot", "places"], "before", vec![int("exclusive", 1)]),
            node("Greater", &["before", "none"], "gone", vec![]),
            node("Or", &["far", "gone"], "out", vec![]),
            node("Neg", &["gap"], "below", vec![]),
            node("Exp", &["below"], "exponential", vec![]),
            node("Where", &["out", "none", "exponential"], "competing", vec![]),
            reduce_sum("competing", "last", "competition", false),
            node("Reciprocal", &["competition"], "shares", vec![]),
        ]),
    }
    nodes.extend([
        scalar("scale", how.scale),
        node("Mul", &["shares", "scale"], "scaled", vec![]),
        node("CastLike", &["scaled", "logits"], "y", vec![]),
    ]);
    nodes
}

/// All tokens through all experts, times weights that are 0 for those not chosen.
fn experts(how: &Experts, of: &Node) -> Vec<NodeProto> {
    let count = how.experts as i64;
    let has = |input: usize| of.input(input).is_some();
    let mut nodes = vec![
        ints("count", &[count]),
        ints("first", &[0]),
        ints("second", &[1]),
        ints("last", &[-1]),
        tensor("flags", &Tensor::from_f32(vec![2], &[0.0, 1.0])),
        ints("as_bias", &[count, 1, -1]),
        node("Shape", &["x"], "leading", vec![int("start", 0), int("end", -1)]),
        node("Shape", &["x"], "width", vec![int("start", -1)]),
        node("Concat", &["last", "width"], "as_rows", vec![int("axis", 0)]),
        node("Reshape", &["x", "as_rows"], "flat", vec![]),
        node("Unsqueeze", &["flat", "first"], "rows", vec![]),
    ];
    // `to = from · matrixᵀ + bias` of every expert.
    let product = |nodes: &mut Vec<NodeProto>, from: &str, matrix: usize, bias: usize, to: &str| {
        let part = |part: &str| format!("{to}_{part}");
        let name = INPUTS[matrix];
        let perm = attribute_proto(("perm", Attribute::Ints(vec![0, 2, 1])));
        nodes.extend([
            node("Shape", &[name], &part("depth"), vec![int("start", -1)]),
            node(
                "Concat",
                &["count", "last", &part("depth")],
                &part("shape"),
                vec![int("axis", 0)],
            ),
            node("Reshape", &[name, &part("shape")], &part("matrices"), vec![]),
            node("Transpose", &[&part("matrices")], &part("turned"), vec![perm]),
        ]);
        let sum = if has(bias) { part("product") } else { to.to_string() };
        nodes.push(node("MatMul", &[from, &part("turned")], &sum, vec![]));
        if has(bias) {
            nodes.push(node("Reshape", &[INPUTS[bias], "as_bias"], &part("bias"), vec![]));
            nodes.push(node("Add", &[&sum, &part("bias")], to, vec![]));
        }
    };
    product(&mut nodes, "rows", 3, 6, "gates");
    if has(4) {
        product(&mut nodes, "rows", 4, 7, "ups");
    }
    nodes.extend(gated(how, has(4)));
    product(&mut nodes, "hidden", 5, 8, "results");
    nodes.extend([
        node("Shape", &["experts"], "choices", vec![int("start", -1)]),
        node("Concat", &["last", "choices"], "as_choices", vec![int("axis", 0)]),
        node("Reshape", &["experts", "as_choices"], "flat_experts", vec![]),
        node("Reshape", &["weights", "as_choices"], "flat_weights", vec![]),
        node("Cast", &["flat_weights"], "wide_weights", vec![int("to", 1)]),
        node(
            "OneHot",
            &["flat_experts", "count", "flags"],
            "hot",
            vec![int("axis", -1)],
        ),
        node("Unsqueeze", &["wide_weights", "last"], "columns", vec![]),
        node("Mul", &["hot", "columns"], "spread", vec![]),
        reduce_sum("spread", "second", "of_all", false),
        node("Transpose", &["of_all"], "by_expert", vec![]),
        node("Unsqueeze", &["by_expert", "last"], "factors", vec![]),
        node("Cast", &["results"], "wide_results", vec![int("to", 1)]),
        node("Mul", &["wide_results", "factors"], "terms", vec![]),
        reduce_sum("terms", "first", "sum", false),
        node("CastLike", &["sum", "x"], "typed", vec![]),
        node("Concat", &["leading", "last"], "shape", vec![int("axis", 0)]),
        node("Reshape", &["typed", "shape"], "y", vec![]),
    ]);
    nodes
}

/// `hidden` from `gates` and `ups`.
fn gated(how: &Experts, has_up: bool) -> Vec<NodeProto> {
    let number = |name: &str, value: f32| {
        let typed = format!("{name}_typed");
        [
            scalar(&typed, value),
            node("CastLike", &[&typed, "gates"], name, vec![]),
        ]
    };
    let mut nodes = Vec::new();
    let bounded = how.limit > 0.0;
    let mut x = "gates";
    if bounded {
        nodes.extend(number("most", how.limit));
        nodes.extend(number("least", -how.limit));
        nodes.push(node("Min", &["gates", "most"], "bounded", vec![]));
        x = "bounded";
    }
    match how.activation {
        ExpertActivation::Swish => {
            nodes.extend(number("alpha", how.alpha));
            nodes.extend([
                node("Mul", &[x, "alpha"], "inner", vec![]),
                node("Sigmoid", &["inner"], "share", vec![]),
                node("Mul", &[x, "share"], "active", vec![]),
            ]);
        }
        ExpertActivation::Gelu => nodes.push(node("Gelu", &[x], "active", vec![])),
        ExpertActivation::GeluTanh => {
            let tanh = attribute_proto(("approximate", Attribute::Text("tanh")));
            nodes.push(node("Gelu", &[x], "active", vec![tanh]));
        }
        ExpertActivation::Relu => nodes.push(node("Relu", &[x], "active", vec![])),
        ExpertActivation::ReluSquared => nodes.extend([
            node("Relu", &[x], "positive", vec![]),
            node("Mul", &["positive", "positive"], "active", vec![]),
        ]),
    }
    if !has_up {
        nodes.push(node("Identity", &["active"], "hidden", vec![]));
        return nodes;
    }
    let mut up = "ups";
    if bounded {
        nodes.push(node("Clip", &["ups", "least", "most"], "bounded_ups", vec![]));
        up = "bounded_ups";
    }
    nodes.extend(number("beta", how.beta));
    nodes.push(node("Add", &[up, "beta"], "shifted", vec![]));
    nodes.push(node("Mul", &["active", "shifted"], "hidden", vec![]));
    nodes
}
