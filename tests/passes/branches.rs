//! `If`: merged decoders, conditions that are constant, and what is refused.

use std::path::{Path, PathBuf};

use lapidary::graph::dump;
use lapidary::help::Help;
use lapidary::onnx::proto::{
    AttributeProto, DimensionProto, GraphProto, ModelProto, NodeProto, TensorProto, TensorShapeProto, TensorTypeProto,
    TypeProto, ValueInfoProto,
};
use lapidary::onnx::{self, Exporter};
use lapidary::passes::{CanonicalizeOptions, canonicalize};
use lapidary::{ConvertOptions, Spec, convert};
use prost::Message;

const BOOL: i32 = 9;
const I64: i32 = 7;

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

fn model(path: &str) -> ModelProto {
    let bytes = std::fs::read(fixture(path)).unwrap();
    ModelProto::decode(&bytes[..]).unwrap()
}

/// Reads a model from its own file.
fn read(model: &ModelProto) -> Result<lapidary::graph::Graph, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, model.encode_to_vec()).unwrap();
    onnx::read(&path).map_err(|error| error.kind.to_string())
}

/// The canonical graph as text, without the line that names the producer.
fn canonical(model: &ModelProto) -> Result<String, String> {
    let graph = read(model)?;
    let options = CanonicalizeOptions {
        max_positions: 32,
        ..CanonicalizeOptions::default()
    };
    let canonical = canonicalize(graph, &options).map_err(|error| error.to_string())?;
    let text = dump(&canonical.graph).to_string();
    Ok(text.lines().skip(1).collect::<Vec<_>>().join("\n"))
}

fn node(op: &str, name: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    let owned = |names: &[&str]| names.iter().map(|n| n.to_string()).collect();
    NodeProto {
        input: owned(inputs),
        output: owned(outputs),
        name: Some(name.to_string()),
        op_type: Some(op.to_string()),
        ..NodeProto::default()
    }
}

fn branch(name: &str, graph: GraphProto) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_string()),
        g: Some(Box::new(graph)),
        r#type: Some(5),
        ..AttributeProto::default()
    }
}

fn choose(condition: &str, outputs: &[&str], then: GraphProto, otherwise: GraphProto) -> NodeProto {
    let mut choose = node("If", "choose", &[condition], outputs);
    choose.attribute = vec![branch("else_branch", otherwise), branch("then_branch", then)];
    choose
}

fn ints(name: &str, code: i32, dims: &[i64], values: &[i64]) -> TensorProto {
    TensorProto {
        name: Some(name.to_string()),
        dims: dims.to_vec(),
        data_type: Some(code),
        int64_data: if code == I64 { values.to_vec() } else { Vec::new() },
        int32_data: match code {
            I64 => Vec::new(),
            _ => values.iter().map(|v| *v as i32).collect(),
        },
        ..TensorProto::default()
    }
}

fn info(name: &str, code: i32, dims: &[i64]) -> ValueInfoProto {
    let dim = |value: &i64| DimensionProto {
        dim_value: Some(*value),
        dim_param: None,
    };
    ValueInfoProto {
        name: Some(name.to_string()),
        r#type: Some(TypeProto {
            tensor_type: Some(TensorTypeProto {
                elem_type: Some(code),
                shape: Some(TensorShapeProto {
                    dim: dims.iter().map(dim).collect(),
                }),
            }),
        }),
    }
}

fn named(name: &str) -> ValueInfoProto {
    ValueInfoProto {
        name: Some(name.to_string()),
        r#type: None,
    }
}

/// Variants of a merge of two decoders.
#[derive(Clone, Copy)]
struct Merge {
    /// Rank of the switching input.
    rank: usize,
    /// The prompt's branch is the one for a true condition.
    swapped: bool,
    /// The condition is the opposite of the input.
    negated: bool,
    /// Names of the branch's nodes and values begin with `with_past/`.
    prefixed: bool,
    /// The prompt's branch has its own copies of the weights.
    copied: bool,
    /// Both branches call their values and nodes as the decoders did, so results have the names of the node's outputs.
    alike: bool,
}

/// The export as the branch with past keys and values, and the same with empty ones as the branch for the prompt.
fn merged(mut model: ModelProto, merge: Merge) -> ModelProto {
    let graph = model.graph.as_mut().unwrap();
    let outputs: Vec<String> = graph.output.iter().map(|o| o.name.clone().unwrap()).collect();
    let outputs: Vec<&str> = outputs.iter().map(String::as_str).collect();
    let around: Vec<String> = graph
        .input
        .iter()
        .map(|i| i.name.clone())
        .chain(graph.initializer.iter().map(|t| t.name.clone()))
        .flatten()
        .collect();
    let prefix = |graph: &mut GraphProto, prefix: &str, kept: &[String]| {
        let rename = |name: &mut String| {
            if !name.is_empty() && !kept.contains(name) {
                *name = format!("{prefix}{name}");
            }
        };
        for node in &mut graph.node {
            node.input.iter_mut().chain(&mut node.output).for_each(rename);
            node.name.iter_mut().for_each(rename);
        }
        graph.initializer.iter_mut().flat_map(|t| &mut t.name).for_each(rename);
        graph.output.iter_mut().flat_map(|o| &mut o.name).for_each(rename);
    };
    let inner = GraphProto {
        node: std::mem::take(&mut graph.node),
        output: graph.output.iter().map(|o| named(o.name.as_deref().unwrap())).collect(),
        ..GraphProto::default()
    };
    let names = inner.node.iter().flat_map(|n| n.output.iter().chain(&n.name));
    let alike: Vec<String> = names.filter(|_| merge.alike).cloned().collect();
    let (mut past, mut prompt) = (inner.clone(), inner);
    let kept = [&around[..], &alike].concat();
    prefix(&mut past, if merge.prefixed { "with_past/" } else { "p:" }, &kept);
    // The prompt's branch knows no cache: constants without a row are in its place.
    let caches: Vec<&ValueInfoProto> = graph
        .input
        .iter()
        .filter(|i| i.name.as_deref().is_some_and(|n| n.starts_with("past_key")))
        .collect();
    for cache in &caches {
        let shape = cache.r#type.as_ref().unwrap().tensor_type.as_ref().unwrap();
        let dims = shape.shape.as_ref().unwrap().dim.iter().enumerate();
        let dims = dims.map(|(axis, dim)| match axis {
            0 => 1,
            2 => 0,
            _ => dim.dim_value.unwrap(),
        });
        prompt.initializer.push(TensorProto {
            name: cache.name.clone(),
            dims: dims.collect(),
            data_type: shape.elem_type,
            ..TensorProto::default()
        });
    }
    let mut kept: Vec<String> = around.iter().filter(|n| !n.starts_with("past_key")).cloned().collect();
    if merge.copied {
        prompt.initializer.extend(graph.initializer.iter().cloned());
        kept.retain(|name| graph.initializer.iter().all(|t| t.name.as_ref() != Some(name)));
    }
    kept.extend(alike);
    prefix(&mut prompt, if merge.prefixed { "no_past/" } else { "n:" }, &kept);

    graph.input.push(info("use_cache_branch", BOOL, &vec![1; merge.rank]));
    let (mut condition, mut branches) = ("use_cache_branch", (past, prompt));
    if merge.negated {
        graph.node.push(node("Not", "not", &[condition], &["opposite"]));
        condition = "opposite";
    }
    if merge.swapped {
        branches = (branches.1, branches.0);
    }
    graph.node.push(choose(condition, &outputs, branches.0, branches.1));
    model
}

#[test]
fn a_merged_decoder_is_its_branch_with_past_keys_and_values() {
    let plain = Merge {
        rank: 1,
        swapped: false,
        negated: false,
        prefixed: true,
        copied: false,
        alike: false,
    };
    let merges = [
        plain,
        Merge {
            rank: 0,
            prefixed: false,
            ..plain
        },
        Merge { swapped: true, ..plain },
        Merge {
            negated: true,
            swapped: true,
            ..plain
        },
        Merge { copied: true, ..plain },
        Merge { alike: true, ..plain },
    ];
    for (name, merges) in [
        ("llama-optimum", &merges[..]),
        ("gpt2-optimum", &merges[..1]),
        ("mistral-dynamo-opset18", &merges[1..2]),
        ("qwen3-optimum-fp16", &merges[4..]),
    ] {
        let export = model(&format!("exports/{name}/model.onnx"));
        let expected = canonical(&export).unwrap();
        for merge in merges {
            let merged = merged(export.clone(), *merge);
            let graph = read(&merged).unwrap();
            let switch = graph.producer.switch.as_ref().unwrap();
            assert_eq!((switch.name.as_str(), switch.rank), ("use_cache_branch", merge.rank));
            assert_eq!(switch.value, merge.swapped == merge.negated);
            assert!(
                graph
                    .inputs
                    .iter()
                    .all(|id| graph.value(*id).name != "use_cache_branch")
            );
            let text = canonical(&merged).unwrap_or_else(|error| panic!("{name}: {error}"));
            // Names of values differ by what the merge put before them.
            let text = text.replace("p:", "");
            let differs = text.lines().zip(expected.lines()).find(|(ours, plain)| ours != plain);
            assert_eq!(differs, None, "{name}");
            assert_eq!(text.len(), expected.len(), "{name}");
        }
    }
    let mut by_optimum = merged(model("exports/llama-optimum/model.onnx"), plain);
    by_optimum.producer_name = Some("optimum-onnx".into());
    assert_eq!(onnx::exporter(&read(&by_optimum).unwrap()), Exporter::Optimum);
}

/// Converts a model from its own file.
fn converted(model: &ModelProto) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, model.encode_to_vec()).unwrap();
    let conversion = Spec::default().resolve().unwrap();
    let made = convert(
        &path,
        &folder.path().join("package"),
        conversion,
        &ConvertOptions::default(),
    );
    let files = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(files, if made.is_ok() { 2 } else { 1 }, "nothing is half written");
    made.map(drop)
        .map_err(|error| format!("{error}; {}", error.help().unwrap_or_default()))
}

#[test]
fn branches_of_a_merged_decoder_that_are_not_one_model_are_refused() {
    let plain = Merge {
        rank: 1,
        swapped: false,
        negated: false,
        prefixed: true,
        copied: false,
        alike: false,
    };
    let with = |edit: &dyn Fn(&mut GraphProto), merge: Merge, name: &str| {
        let mut model = merged(model(&format!("exports/{name}/model.onnx")), merge);
        let nodes = &mut model.graph.as_mut().unwrap().node;
        let choose = nodes.iter_mut().find(|n| n.op_type.as_deref() == Some("If")).unwrap();
        let prompt = if merge.swapped { "then_branch" } else { "else_branch" };
        let branch = choose
            .attribute
            .iter_mut()
            .find(|a| a.name.as_deref() == Some(prompt))
            .unwrap();
        edit(branch.g.as_mut().unwrap());
        converted(&model)
    };
    let nothing = |_: &mut GraphProto| {};
    for (name, merge) in [
        ("llama-optimum", plain),
        (
            "llama-optimum",
            Merge {
                swapped: true,
                copied: true,
                ..plain
            },
        ),
        ("qwen3-optimum-fp16", plain),
        ("mistral-dynamo-opset18", plain),
    ] {
        assert_eq!(with(&nothing, merge, name), Ok(()), "{name}");
    }
    let replaced = |from: &'static str, to: &'static str| {
        move |branch: &mut GraphProto| {
            let node = branch
                .node
                .iter_mut()
                .find(|n| n.op_type.as_deref() == Some(from))
                .unwrap();
            node.op_type = Some(to.to_string());
        }
    };
    // Another activation; a mask that lets tokens see what follows; another rotation.
    for (from, to) in [("Sigmoid", "Tanh"), ("LessOrEqual", "GreaterOrEqual"), ("Cos", "Sin")] {
        let (swapped, alike) = (from == "Cos", from == "Cos");
        let merge = Merge {
            swapped,
            alike,
            ..plain
        };
        let refusal = with(&replaced(from, to), merge, "llama-optimum").unwrap_err();
        for part in [
            "use_cache_branch",
            "not one model",
            "logits is",
            "apart",
            "decoder_with_past_model.onnx",
        ] {
            assert!(refusal.contains(part), "{part:?} is not in: {refusal}");
        }
    }
}

/// `good.onnx` with an `If` between its attention and its residual sum: `then` and `otherwise` are the operators of the
/// branches.
struct Case {
    model: ModelProto,
    then: GraphProto,
    otherwise: GraphProto,
    condition: &'static str,
    /// Before the `If`.
    nodes: Vec<NodeProto>,
    /// After everything else.
    late: Vec<NodeProto>,
}

fn case() -> Case {
    let of = |op: &str, name: &str| GraphProto {
        node: vec![node(op, &format!("{name}.node"), &["ao"], &[name])],
        output: vec![named(name)],
        ..GraphProto::default()
    };
    Case {
        model: model("bad/good.onnx"),
        then: of("Identity", "kept"),
        otherwise: of("Neg", "negated"),
        condition: "condition",
        nodes: Vec::new(),
        late: Vec::new(),
    }
}

impl Case {
    fn made(mut self) -> ModelProto {
        let graph = self.model.graph.as_mut().unwrap();
        let residual = graph
            .node
            .iter()
            .position(|n| n.name.as_deref() == Some("residual"))
            .unwrap();
        for input in &mut graph.node[residual].input {
            if input == "ao" {
                *input = "chosen".into();
            }
        }
        self.nodes
            .push(choose(self.condition, &["chosen"], self.then, self.otherwise));
        graph.node.splice(residual..residual, self.nodes);
        graph.node.extend(self.late);
        self.model
    }

    fn constant(mut self, name: &str, code: i32, dims: &[i64], values: &[i64]) -> Self {
        let graph = self.model.graph.as_mut().unwrap();
        graph.initializer.push(ints(name, code, dims, values));
        self
    }
}

#[test]
fn a_constant_condition_chooses_its_branch() {
    let plain = canonical(&model("bad/good.onnx")).unwrap();
    let negated = canonical(&case().constant("condition", BOOL, &[], &[0]).made()).unwrap();
    assert_ne!(plain, negated);
    let shape = |of: &str| node("Shape", "shape", &[of], &["shape"]);
    let by_shape = |of: &str, axis: i64, size: i64| {
        let mut made = case()
            .constant("axis", I64, &[1], &[axis])
            .constant("size", I64, &[1], &[size]);
        made.nodes = vec![
            shape(of),
            node("Gather", "dim", &["shape", "axis"], &["dim"]),
            node("Equal", "equal", &["dim", "size"], &["condition"]),
        ];
        made
    };
    let mut nested = case().constant("condition", BOOL, &[1], &[1]);
    let inner = std::mem::take(&mut nested.then);
    nested.then = GraphProto {
        node: vec![choose(
            "condition",
            &["inner"],
            inner,
            GraphProto {
                node: vec![node("Exp", "exp", &["ao"], &["exp"])],
                output: vec![named("exp")],
                ..GraphProto::default()
            },
        )],
        output: vec![named("inner")],
        ..GraphProto::default()
    };
    // Computed by later nodes in the list.
    let mut late = by_shape("q_proj", 0, 16);
    late.late = std::mem::take(&mut late.nodes);
    // A branch that returns an outer value, and one that returns its own constant.
    let mut passed = case().constant("condition", BOOL, &[], &[1]);
    passed.then = GraphProto {
        output: vec![named("ao")],
        ..GraphProto::default()
    };
    for (what, made, expected) in [
        ("true", case().constant("condition", BOOL, &[], &[1]), &plain),
        ("a dim of a weight", by_shape("q_proj", 0, 16), &plain),
        ("another dim of a weight", by_shape("q_proj", 0, 17), &negated),
        (
            "a fixed dim of an input",
            by_shape("past_key_values.0.key", 3, 8),
            &plain,
        ),
        ("a branch in a branch", nested, &plain),
        ("nodes in another order", late, &plain),
        ("a value from around it", passed, &plain),
    ] {
        let text = canonical(&made.made()).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(&text, expected, "{what}");
    }
}

#[test]
fn what_is_wrong_with_an_if_is_named() {
    let known = || case().constant("condition", BOOL, &[], &[1]);
    let edited = |edit: &dyn Fn(&mut Case)| {
        let mut made = known();
        edit(&mut made);
        made.made()
    };
    for (model, parts) in [
        (
            edited(&|c| c.otherwise.node[0].input[0] = "nothing".into()),
            &["subgraph of node \"choose\" (If)", "\"nothing\""][..],
        ),
        (
            edited(&|c| c.then.input.push(named("x"))),
            &["choose", "then_branch has inputs"],
        ),
        (
            edited(&|c| c.otherwise.output.clear()),
            &["choose", "else_branch has 0 outputs, but the node has 1"],
        ),
        (
            edited(&|c| c.then.output[0] = named("missing")),
            &["choose", "\"missing\""],
        ),
        (
            edited(&|c| {
                c.otherwise.node[0].output[0] = "q".into();
                c.otherwise.output[0] = named("q");
            }),
            &["choose", "else_branch defines \"q\" again"],
        ),
        (
            edited(&|c| c.then.initializer.push(ints("embed", I64, &[1], &[0]))),
            &["choose", "then_branch defines \"embed\" again"],
        ),
        (edited(&|c| c.condition = ""), &["choose", "no condition"]),
        (edited(&|c| c.condition = "nowhere"), &["choose", "nowhere"]),
        (
            edited(&|c| {
                let twice = c.then.node[0].clone();
                c.then.node.push(twice);
            }),
            &["\"kept\" is defined twice"],
        ),
    ] {
        let error = read(&model).map(|_| ()).unwrap_err();
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
    }
    let mut missing = known().made();
    let graph = missing.graph.as_mut().unwrap();
    let node = graph
        .node
        .iter_mut()
        .find(|n| n.op_type.as_deref() == Some("If"))
        .unwrap();
    node.attribute.pop();
    assert!(
        read(&missing)
            .map(|_| ())
            .unwrap_err()
            .contains("its then_branch is missing")
    );
}

/// If it cannot be proved, the operator stays, with the reason.
#[test]
fn conditions_that_are_not_constant_are_refused() {
    let open = |nodes: Vec<NodeProto>, parts: &[&str]| {
        let mut made = case().constant("four", I64, &[1], &[4]);
        made.nodes = nodes;
        let error = canonical(&made.made()).unwrap_err();
        for part in parts.iter().chain(&["choose", "If"]) {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
    };
    let shape = node("Shape", "shape", &["past_key_values.0.key"], &["shape"]);
    let by_length = |axis: &str| {
        vec![
            shape.clone(),
            node("Gather", "dim", &["shape", axis], &["dim"]),
            node("Greater", "many", &["dim", "four"], &["condition"]),
        ]
    };
    let mut two = by_length("two");
    let mut constant = node("Constant", "two", &[], &["two"]);
    constant.attribute.push(AttributeProto {
        name: Some("value_ints".into()),
        ints: vec![2],
        r#type: Some(7),
        ..AttributeProto::default()
    });
    two.insert(0, constant);
    open(two, &["depends on the lengths of past_key_values.0.key"]);
    open(
        vec![
            node("ReduceMax", "last", &["position_ids"], &["last"]),
            node("Greater", "far", &["last", "four"], &["condition"]),
        ],
        &["depends on the values of position_ids"],
    );
}

#[test]
fn branches_that_are_not_one_model_are_refused() {
    let plain = Merge {
        rank: 1,
        swapped: false,
        negated: false,
        prefixed: true,
        copied: true,
        alike: false,
    };
    let refused = |edit: &dyn Fn(&mut GraphProto, &mut GraphProto), parts: &[&str]| {
        let mut model = merged(model("exports/llama-optimum/model.onnx"), plain);
        let choose = &mut model.graph.as_mut().unwrap().node[0];
        let [prompt, past] = &mut choose.attribute[..] else {
            panic!()
        };
        edit(past.g.as_mut().unwrap(), prompt.g.as_mut().unwrap());
        let error = canonical(&model).unwrap_err();
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
    };
    let matrix = |graph: &mut GraphProto| -> usize {
        let wide = |t: &TensorProto| t.dims.len() == 2 && t.data_type == Some(1);
        graph.initializer.iter().position(wide).unwrap()
    };
    refused(
        &|_, prompt| {
            let at = matrix(prompt);
            let tensor = &mut prompt.initializer[at];
            let mut bytes = tensor.raw_data.clone().unwrap().to_vec();
            bytes[0] ^= 1;
            tensor.raw_data = Some(bytes.into());
        },
        &[
            "choose",
            "the one without past keys and values has weights that the other does not have",
        ],
    );
    // Neither reads the past.
    refused(
        &|past, prompt| *past = prompt.clone(),
        &["choose", "no branch reads past keys and values"],
    );
}
