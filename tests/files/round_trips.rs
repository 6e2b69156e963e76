//! Dumps are read back: graphs and networks of any operators, names and dims, and those of every fixture.

use std::fs;
use std::path::{Path, PathBuf};

use lapidary::dim::{Dim, Sym};
use lapidary::graph::op::{Attention, ExpertActivation, Gating, GroupQueryAttention, ScatterMode};
use lapidary::graph::{Graph, Op, ValueId, dump, identity_text, infer, parse};
use lapidary::lower::{LowerOptions, lower};
use lapidary::network::{
    self, Activation, CodeLayout, DecodeAttention, Elementwise, Greatest, Layer, LayerKind, Logits, MatrixOp, Network,
    ProductPart, Profile, ReduceOp, Rotation, RowActivation, RowProduct, Tensor, TensorId, Tokens, UnaryOp, Weight,
    WeightId, WeightMode,
};
use lapidary::passes::{CanonicalizeOptions, canonicalize};
use lapidary::tensor::{self, DType};
use proptest::prelude::*;
use proptest::sample::select;

/// The parts of two graphs that must be equal, with names for values. Constants only by type: a dump omits large ones.
fn structure(graph: &Graph) -> Vec<String> {
    let name = |id: &Option<ValueId>| id.map(|id| graph.value(id).name.clone());
    let typed = |id: ValueId| {
        let value = graph.value(id);
        format!("{:?} {:?} {:?}", value.name, value.dtype, value.shape)
    };
    let mut lines = vec![format!("{:?} {:?}", graph.name, graph.producer.opsets)];
    lines.extend(graph.inputs.iter().chain(&graph.outputs).map(|id| typed(*id)));
    for id in graph.node_ids() {
        let node = graph.node(id);
        let inputs: Vec<_> = node.inputs.iter().map(name).collect();
        let outputs: Vec<_> = node.outputs.iter().map(|id| id.map(typed)).collect();
        lines.push(format!("{outputs:?} = {:?} {inputs:?}", node.op));
        for id in node.inputs.iter().flatten() {
            if let Some(constant) = graph.constant(*id) {
                let shown = constant.materialize().ok().filter(|t| t.len() <= 8);
                // NaN is not equal to itself, so the text is compared.
                lines.push(format!(
                    "{} {:?}",
                    typed(*id),
                    shown.map(|t| format!("{:?}", t.to_f64()))
                ));
            }
        }
    }
    lines
}

fn check_graph(graph: &Graph) -> Result<(), String> {
    let text = dump(graph).to_string();
    let parsed = parse(&text).map_err(|e| format!("{e}\n{text}"))?;
    let again = dump(&parsed).to_string();
    if again != text {
        return Err(format!("{text}became\n{again}"));
    }
    match structure(graph) == structure(&parsed) {
        true => Ok(()),
        false => Err(format!("{:#?}\nbecame\n{:#?}", structure(graph), structure(&parsed))),
    }
}

/// The parts of two networks that must be equal. The parser chooses the positions of weight layers, and names identify
/// tensors.
fn network_structure(network: &Network) -> Vec<String> {
    let name = |id: &TensorId| network.tensor(*id).name.clone();
    let mut lines: Vec<String> = Vec::new();
    for layer in network
        .layers
        .iter()
        .filter(|l| !matches!(l.kind, LayerKind::Weight(_)))
    {
        let kind = match &layer.kind {
            LayerKind::Constant(tensor) if tensor.len() > 8 => "a large constant".to_string(),
            LayerKind::Constant(tensor) => format!("{tensor:?} {:?}", tensor.to_f64()),
            // One transpose is the same before and after no reshape.
            LayerKind::Shuffle {
                first: None,
                reshape: None,
                second,
            } => format!(
                "{:?}",
                LayerKind::Shuffle {
                    first: second.clone(),
                    reshape: None,
                    second: None
                }
            ),
            kind => format!("{kind:?}"),
        };
        let inputs: Vec<String> = layer.inputs.iter().map(name).collect();
        let output = network.tensor(layer.outputs[0]);
        lines.push(format!("{:?} {output:?} = {kind} {inputs:?}", layer.name));
    }
    for ids in [&network.inputs, &network.outputs] {
        lines.push(format!("{:?}", ids.iter().map(name).collect::<Vec<_>>()));
    }
    for Weight { name, constant, mode } in &network.weights {
        lines.push(format!("{name:?} {constant:?} {mode:?}"));
    }
    lines
}

fn check_network(network: &Network) -> Result<Network, String> {
    let text = network.to_string();
    let parsed = network::parse(&text).map_err(|e| format!("{e}\n{text}"))?;
    let again = parsed.to_string();
    if again != text {
        return Err(format!("{text}became\n{again}"));
    }
    match network_structure(network) == network_structure(&parsed) {
        true => Ok(parsed),
        false => Err(format!(
            "{:#?}\nbecame\n{:#?}",
            network_structure(network),
            network_structure(&parsed)
        )),
    }
}

fn exports() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/exports");
    let folders = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path());
    let mut models: Vec<PathBuf> = folders.map(|f| f.join("model.onnx")).filter(|m| m.is_file()).collect();
    models.sort();
    models
}

#[test]
fn every_fixture_is_read_back() {
    let mut failed = Vec::new();
    let mut canonical_graphs = 0;
    for path in exports() {
        let mut check = |what: &str, result: Result<(), String>| {
            if let Err(error) = result {
                failed.push(format!("{} {what}: {error}", path.display()));
            }
        };
        let mut graph = lapidary::onnx::read(&path).unwrap();
        check("as read", check_graph(&graph));
        infer(&mut graph).unwrap();
        check("typed", check_graph(&graph));
        let Ok(canonical) = canonicalize(graph, &CanonicalizeOptions::default()) else {
            continue;
        };
        canonical_graphs += 1;
        let graph = canonical.graph;
        check("canonical", check_graph(&graph));
        let (identity, text) = (identity_text(&graph).to_string(), dump(&graph).to_string());
        // No operator or number of a fixture has two spellings: only quotes differ.
        let other = identity
            .lines()
            .zip(text.lines())
            .find(|(a, b)| *a != b.replace('"', ""));
        check(
            "identity",
            other.map_or(Ok(()), |(a, b)| Err(format!("{a}\n    but in the dump\n{b}"))),
        );
        let dynamic = Profile {
            tokens: Tokens::Dynamic { min: 1, opt: 4, max: 8 },
            logits: Logits::All,
            ..Profile::decode(16)
        };
        // Lowering dominates the time, so there is one profile for each form; together they have every kind of layer.
        for (profile, options) in [
            (Profile::decode(16), LowerOptions::for_engines()),
            (dynamic, LowerOptions::default()),
        ] {
            let network = lower(&graph, &profile, &options).unwrap();
            let checked =
                check_network(&network).and_then(|parsed| network::verify(&parsed).map_err(|e| e.to_string()));
            check(&profile.to_string(), checked);
        }
    }
    assert!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
    assert!(canonical_graphs >= 30, "only {canonical_graphs} canonical graphs");
}

/// Packages are compared by the hash of this text, so these hashes must not change between versions.
#[test]
fn the_text_that_packages_are_identified_by_stays() {
    for (export, hash) in HASHES {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/exports/{export}/model.onnx"));
        let graph = lapidary::onnx::read(path).unwrap();
        let canonical = canonicalize(graph, &CanonicalizeOptions::default()).unwrap();
        let text = identity_text(&canonical.graph).to_string();
        assert_eq!(blake3::hash(text.as_bytes()).to_hex().to_string(), *hash, "{export}");
    }
}

const HASHES: &[(&str, &str)] = &[
    (
        "llama-optimum",
        "95bfc0801bca70a8c1fcc59d9d9b3f07e89fdcb248d3fecd1b8230f8bc1ddd02",
    ),
    (
        "gpt2-dynamo-opset23",
        "65ce83ea271a641fbae4915d8278d58d47f37bcc97eec7998692341239c756e2",
    ),
    (
        "qwen3-ort-genai",
        "b544af495ed99edb258b40e368aa86604ec93ff87d837dbf8642f2167384c0ae",
    ),
    (
        "mistral-mobius-static",
        "b09583e6bc9c6c65e7fb03ba8e47fab57fb6443964ff0a3a13c098d722b05957",
    ),
    (
        "llama-dynamo-static",
        "bd82220288aa8010fb7c65d338f6806f04c58b46f92eeed702337963f712648f",
    ),
    (
        "qwen2-torchscript-static",
        "4ed0f2660ce780bf6dc7091c39aebcb8f078b77c7558f3e8635887f53b67ef54",
    ),
];

fn any_name() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z][a-z0-9_./:]{0,6}[a-z0-9]",
        "[ -~]{1,8}",
        select(vec!["_", "#", "a, b", "x^T", "é\n\"", "=", "b:", "@c", "\\", "\u{7f}"]).prop_map(str::to_string),
    ]
}

fn any_dtype() -> impl Strategy<Value = DType> {
    use DType::*;
    select(vec![Bool, U8, I8, I32, I64, F16, Bf16, F32, F64])
}

fn any_dim() -> impl Strategy<Value = Dim> {
    let symbol = prop_oneof![
        "[a-z]{1,4}",
        select(vec!["floor(s0/2)", "a-b", "2x", "x, y", "?", "/m/x.1", ""]).prop_map(str::to_string)
    ];
    let term = (-4i64..5, prop::collection::vec(symbol, 0..3));
    prop::collection::vec(term, 0..3).prop_map(|terms| {
        terms.into_iter().fold(Dim::default(), |sum, (factor, symbols)| {
            let term = symbols
                .into_iter()
                .fold(Dim::constant(factor), |p, s| &p * &Dim::sym(Sym::new(s)));
            &sum + &term
        })
    })
}

fn any_tensor() -> impl Strategy<Value = tensor::Tensor> {
    let numbers = prop_oneof![any::<f32>().prop_map(f64::from), (-300i32..300).prop_map(f64::from)];
    let shapes = select(vec![vec![], vec![1], vec![0], vec![3], vec![2, 2], vec![2, 5]]);
    (any_dtype(), shapes, prop::collection::vec(numbers, 10)).prop_map(|(dtype, shape, numbers)| {
        let count = shape.iter().product::<usize>();
        let values = &numbers[..count];
        if dtype.is_float() {
            return tensor::Tensor::from_f64_as(dtype, shape, values);
        }
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|v| match dtype {
                DType::Bool => vec![u8::from(*v > 0.0)],
                _ => (*v as i64).to_le_bytes()[..dtype_bytes(dtype)].to_vec(),
            })
            .collect();
        tensor::Tensor::new(dtype, shape, bytes.into()).unwrap()
    })
}

fn dtype_bytes(dtype: DType) -> usize {
    match dtype {
        DType::I64 => 8,
        DType::I32 => 4,
        _ => 1,
    }
}

/// Every operator of the table with its defaults, and those with attributes with any.
fn any_op() -> impl Strategy<Value = Op> {
    // NaN is not equal to itself, and -0.0 is omitted if 0.0 is the default.
    let float = any::<f32>().prop_filter("a plain number", |v| !v.is_nan() && *v != 0.0);
    let positive = 1usize..9;
    let heads = prop::option::of(positive.clone());
    let scale = prop::option::of(float.clone());
    let attention = (
        any::<bool>(),
        scale.clone(),
        float.clone(),
        heads.clone(),
        heads.clone(),
        any_dtype(),
    );
    let grouped = (
        positive.clone(),
        positive,
        -1i64..9,
        float.clone(),
        any::<bool>(),
        any::<bool>(),
    );
    prop_oneof![
        8 => select(Op::all()),
        1 => (float.clone(), float.clone(), any::<bool>(), any::<bool>())
            .prop_map(|(alpha, beta, trans_a, trans_b)| Op::Gemm { alpha, beta, trans_a, trans_b }),
        1 => any::<bool>().prop_map(|tanh| Op::Gelu { tanh }),
        1 => any_dtype().prop_map(|to| Op::Cast { to }),
        1 => any::<i64>().prop_map(|axis| Op::Concat { axis }),
        1 => (any::<i64>(), prop::option::of(any::<i64>())).prop_map(|(start, end)| Op::Shape { start, end }),
        1 => Just(vec![0usize, 1, 2]).prop_shuffle().prop_map(|perm| Op::Transpose { perm: Some(perm) }),
        1 => any_tensor().prop_filter("one element in a vector or a scalar", |t| t.len() == 1)
            .prop_map(|value| Op::ConstantOfShape { value }),
        1 => (any::<i64>(), select(vec![ScatterMode::Add, ScatterMode::Mul, ScatterMode::Max, ScatterMode::Min]))
            .prop_map(|(axis, mode)| Op::ScatterElements { axis, mode }),
        1 => (any::<i64>(), any::<bool>()).prop_map(|(axis, circular)| Op::TensorScatter { axis, circular }),
        1 => (any::<bool>(), heads, 0usize..9).prop_map(|(interleaved, num_heads, rotary_dim)| {
            Op::ContribRotaryEmbedding { interleaved, num_heads, rotary_dim }
        }),
        1 => attention.prop_map(|(is_causal, scale, softcap, q_num_heads, kv_num_heads, precision)| {
            let softmax_precision = Some(precision).filter(|d| d.is_float());
            Op::Attention(Attention { is_causal, scale, softcap, q_num_heads, kv_num_heads, softmax_precision })
        }),
        1 => grouped.prop_map(|(num_heads, kv_num_heads, local_window_size, softcap, do_rotary, rotary_interleaved)| {
            Op::GroupQueryAttention(GroupQueryAttention {
                num_heads, kv_num_heads, scale: None, softcap, local_window_size, do_rotary, rotary_interleaved,
                smooth_softmax: 1,
                qk_norm_epsilon: softcap,
            })
        }),
        1 => (any_name(), any_name()).prop_filter("a known operator", |(domain, op_type)| !Op::is_known(domain, op_type))
            .prop_map(|(domain, op_type)| Op::Unknown { domain, op_type }),
        1 => any_name().prop_filter("a known operator", |op_type| !Op::is_known("", op_type))
            .prop_map(|op_type| Op::Unknown { domain: String::new(), op_type }),
    ]
}

/// Name, dtype and shape, `None` where they are not known.
type AnyOutput = (String, Option<DType>, Option<Vec<Dim>>);

#[derive(Clone, Debug)]
struct AnyNode {
    op: Op,
    /// The value of each input, counted backwards; `None`: omitted.
    inputs: Vec<Option<usize>>,
    /// Name and type of each output; `None`: omitted.
    outputs: Vec<Option<AnyOutput>>,
    name: Option<String>,
}

fn any_node() -> impl Strategy<Value = AnyNode> {
    let shape = prop::option::of(prop::collection::vec(any_dim(), 0..4));
    let output = prop::option::weighted(0.8, (any_name(), prop::option::of(any_dtype()), shape));
    let inputs = prop::collection::vec(prop::option::weighted(0.9, 0usize..20), 0..4);
    (
        any_op(),
        inputs,
        prop::collection::vec(output, 1..3),
        prop::option::of(any_name()),
    )
        .prop_map(|(op, inputs, outputs, name)| AnyNode {
            op,
            inputs,
            outputs,
            name,
        })
}

fn any_graph() -> impl Strategy<Value = Graph> {
    let inputs = prop::collection::vec((any_name(), any_dtype(), prop::collection::vec(any_dim(), 0..4)), 1..4);
    let constants = prop::collection::vec((any_name(), any_tensor()), 0..4);
    let opsets = prop::collection::vec((any_name(), 1i64..25), 0..3);
    let header = (any_name(), any_name(), any_name(), opsets);
    let nodes = prop::collection::vec(any_node(), 0..8);
    (header, inputs, constants, nodes).prop_map(|(header, inputs, constants, nodes)| {
        let mut graph = Graph::new(header.0);
        (graph.producer.name, graph.producer.version) = (header.1, header.2);
        graph.producer.opsets = vec![(String::new(), 24)];
        graph.producer.opsets.extend(header.3);
        let mut values: Vec<ValueId> = Vec::new();
        for (name, dtype, shape) in inputs {
            values.push(graph.add_input(&name, dtype, shape));
        }
        let constants: Vec<ValueId> = constants.into_iter().map(|(n, t)| graph.add_constant(&n, t)).collect();
        values.extend(&constants);
        for node in nodes {
            let inputs = node
                .inputs
                .iter()
                .map(|i| i.map(|i| values[values.len() - 1 - i % values.len()]))
                .collect();
            let outputs: Vec<Option<ValueId>> = node
                .outputs
                .into_iter()
                .map(|output| {
                    let (name, dtype, shape) = output?;
                    let id = graph.add_value(&name);
                    (graph.value_mut(id).dtype, graph.value_mut(id).shape) = (dtype, shape);
                    Some(id)
                })
                .collect();
            let first = outputs.iter().flatten().next().map(|id| graph.value(*id).name.clone());
            let name = node.name.or(first).unwrap_or("nameless".to_string());
            graph.add_node_with_outputs(&name, node.op, inputs, outputs.clone());
            values.extend(outputs.into_iter().flatten());
        }
        graph.outputs = vec![*values.last().unwrap()];
        // Unused constants are not in a dump.
        graph.outputs.extend(constants);
        graph
    })
}

fn any_kind() -> impl Strategy<Value = LayerKind> {
    let axes = || prop::collection::vec(0usize..4, 1..3);
    let order = || prop::option::of(Just(vec![0usize, 1, 2]).prop_shuffle());
    let op = || select(vec![MatrixOp::None, MatrixOp::Transpose]);
    let finite = || any::<f32>().prop_filter("a number", |v| v.is_finite());
    let shape = || prop::collection::vec(any_dim(), 1..4);
    prop_oneof![
        any_tensor()
            .prop_filter("no dump of nothing", |t| !t.is_empty())
            .prop_map(LayerKind::Constant),
        (op(), op()).prop_map(|(op_a, op_b)| LayerKind::MatrixMultiply { op_a, op_b }),
        select(vec![
            Elementwise::Sum,
            Elementwise::FloorDiv,
            Elementwise::Less,
            Elementwise::Max
        ])
        .prop_map(LayerKind::Elementwise),
        select(vec![UnaryOp::Exp, UnaryOp::IsNan, UnaryOp::Round]).prop_map(LayerKind::Unary),
        select(vec![Activation::GeluErf, Activation::Tanh]).prop_map(LayerKind::Activation),
        (
            select(vec![ReduceOp::Sum, ReduceOp::Max, ReduceOp::Avg]),
            axes(),
            any::<bool>()
        )
            .prop_map(|(op, axes, keep_dims)| LayerKind::Reduce { op, axes, keep_dims }),
        (0usize..4).prop_map(|axis| LayerKind::Softmax { axis }),
        (0usize..4).prop_map(|axis| LayerKind::Concatenation { axis }),
        (0usize..4).prop_map(|axis| LayerKind::Gather { axis }),
        (order(), prop::option::of(shape()), order())
            .prop_filter(
                "the text of a transpose alone does not say whether it is the first or the second",
                |(first, reshape, _)| { first.is_some() || reshape.is_some() }
            )
            .prop_map(|(first, reshape, second)| LayerKind::Shuffle { first, reshape, second }),
        (
            prop::collection::vec(any::<i64>(), 2),
            shape(),
            prop::collection::vec(-1i64..3, 2)
        )
            .prop_map(|(start, size, stride)| LayerKind::Slice { start, size, stride }),
        Just(LayerKind::Select),
        any_dtype().prop_map(|to| LayerKind::Cast { to }),
        (any_dim(), any::<i32>(), finite()).prop_map(|(length, start, step)| LayerKind::Fill {
            length,
            start: f64::from(start),
            step: f64::from(step),
        }),
        (axes(), finite()).prop_map(|(axes, epsilon)| LayerKind::Normalization { axes, epsilon }),
        (any::<bool>(), 0usize..9).prop_map(|(interleaved, rotary_dim)| LayerKind::RotaryEmbedding {
            interleaved,
            rotary_dim
        }),
        (1usize..9, any::<bool>()).prop_map(|(k, values)| LayerKind::TopK {
            k,
            part: if values { Greatest::Values } else { Greatest::Indices },
        }),
        (
            1usize..99,
            select(vec![ExpertActivation::Swish, ExpertActivation::GeluTanh]),
            finite(),
            finite(),
            finite()
        )
            .prop_map(|(experts, activation, alpha, beta, limit)| LayerKind::Experts {
                experts,
                gating: Gating {
                    activation,
                    alpha,
                    beta,
                    limit,
                },
            }),
        Just(LayerKind::Attention),
        Just(LayerKind::KvCacheUpdate),
        any_row_product().prop_map(LayerKind::RowProduct),
        any_decode_attention().prop_map(LayerKind::DecodeAttention),
    ]
}

fn any_row_product() -> impl Strategy<Value = RowProduct> {
    let finite = || any::<f32>().prop_filter("a number", |v| v.is_finite());
    let codes = (prop::option::of(1usize..999), any::<bool>()).prop_map(|(group, zero_points)| CodeLayout {
        group,
        // Rows have none.
        zero_points: zero_points && group.is_some(),
    });
    let part = (prop::option::of(codes), any::<bool>()).prop_map(|(codes, bias)| ProductPart { codes, bias });
    let parts = prop::collection::vec(part, 1..4);
    let activations = select(vec![
        RowActivation::None,
        RowActivation::Silu,
        RowActivation::GeluTanh,
        RowActivation::ReluSquared,
    ]);
    let flags = any::<[bool; 3]>();
    (parts, prop::option::of(finite()), activations, flags).prop_map(
        |(parts, norm, activation, [gated, residual, to_f32])| RowProduct {
            parts,
            norm,
            activation,
            gated,
            residual,
            to_f32,
        },
    )
}

fn any_decode_attention() -> impl Strategy<Value = DecodeAttention> {
    let finite = || any::<f32>().prop_filter("a number", |v| v.is_finite());
    let rotation = (any::<usize>(), any::<bool>()).prop_map(|(rotary_dim, interleaved)| Rotation {
        rotary_dim,
        interleaved,
    });
    let sizes = (any::<usize>(), any::<usize>(), prop::option::of(any::<usize>()));
    let numbers = (finite(), finite(), prop::option::of(finite()));
    (sizes, prop::option::of(rotation), numbers, any::<[bool; 4]>()).prop_map(
        |((heads, kv_heads, window), rotation, (epsilon, scale, soft_cap), [packed, query_norm, key_norm, sinks])| {
            DecodeAttention {
                heads,
                kv_heads,
                packed,
                rotation,
                query_norm,
                key_norm,
                // Of no norm there is none.
                epsilon: if query_norm || key_norm { epsilon } else { 0.0 },
                window,
                scale,
                soft_cap,
                sinks,
            }
        },
    )
}

fn any_network() -> impl Strategy<Value = Network> {
    let shape = || prop::collection::vec(any_dim(), 0..4);
    let modes = select(vec![WeightMode::Bind, WeightMode::Embed, WeightMode::Strip]);
    let sizes = prop::collection::vec(0usize..9, 0..3);
    let weights = prop::collection::vec((any_name(), any_dtype(), sizes, modes, any_name()), 0..3);
    let inputs = prop::collection::vec((any_name(), any_dtype(), shape()), 1..3);
    let layer = (
        any_kind(),
        any_name(),
        any_name(),
        any_dtype(),
        shape(),
        prop::collection::vec(0usize..20, 3),
    );
    let tokens = prop_oneof![
        (1usize..9).prop_map(Tokens::Static),
        Just(Tokens::Dynamic { min: 1, opt: 4, max: 8 })
    ];
    let logits = select(vec![Logits::All, Logits::Rows]);
    let profile = (1usize..4, tokens, 8usize..99, logits).prop_map(|(batch, tokens, capacity, logits)| Profile {
        batch,
        tokens,
        capacity,
        logits,
    });
    (any_name(), profile, weights, inputs, prop::collection::vec(layer, 0..8)).prop_map(
        |(name, profile, weights, inputs, layers)| {
            let mut network = Network::new(name, profile);
            let mut taken: std::collections::HashSet<String> = std::collections::HashSet::new();
            let mut unique = |name: String| {
                // The last word of a rotary embedding cannot also be an input's name.
                let mut name = if name == "interleaved" {
                    "other".to_string()
                } else {
                    name
                };
                while !taken.insert(name.clone()) {
                    name.push('\'');
                }
                name
            };
            let push = |network: &mut Network, name: String, dtype, shape| {
                network.tensors.push(Tensor { name, dtype, shape });
                TensorId(network.tensors.len() as u32 - 1)
            };
            let mut readable = Vec::new();
            for (name, dtype, sizes, mode, origin) in weights {
                let name = unique(name);
                let shape = sizes.iter().map(|n| Dim::from(*n)).collect();
                let output = push(&mut network, name.clone(), dtype, shape);
                network.layers.push(Layer {
                    name: name.clone(),
                    kind: LayerKind::Weight(WeightId(network.weights.len() as u32)),
                    inputs: Vec::new(),
                    outputs: vec![output],
                });
                let constant = lapidary::graph::Constant::absent(dtype, sizes).with_origin(&origin);
                network.weights.push(Weight { name, constant, mode });
                readable.push(output);
            }
            for (name, dtype, shape) in inputs {
                let id = push(&mut network, unique(name), dtype, shape);
                network.inputs.push(id);
                readable.push(id);
            }
            for (mut kind, name, layer, dtype, mut shape, picks) in layers {
                let (mut dtype, name) = (dtype, unique(name));
                let count = match &mut kind {
                    LayerKind::Constant(tensor) => {
                        dtype = tensor.dtype();
                        shape = tensor.shape().iter().map(|n| Dim::from(*n)).collect();
                        0
                    }
                    LayerKind::Fill { length, .. } => {
                        shape = vec![length.clone()];
                        0
                    }
                    LayerKind::Cast { .. } | LayerKind::Slice { .. } | LayerKind::Shuffle { .. } => 1,
                    LayerKind::MatrixMultiply { .. } => 2,
                    _ => 3,
                };
                let inputs = picks[..count].iter().map(|i| readable[i % readable.len()]).collect();
                let output = push(&mut network, name, dtype, shape);
                network.layers.push(Layer {
                    name: layer,
                    kind,
                    inputs,
                    outputs: vec![output],
                });
                readable.push(output);
            }
            network.outputs = vec![*readable.last().unwrap()];
            network
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_graph_is_read_back(graph in any_graph()) {
        if let Err(error) = check_graph(&graph) {
            return Err(TestCaseError::fail(error));
        }
    }

    #[test]
    fn any_network_is_read_back(network in any_network()) {
        if let Err(error) = check_network(&network) {
            return Err(TestCaseError::fail(error));
        }
    }

    /// Any text is read, or refused with a location.
    #[test]
    fn no_text_is_too_odd(text in "(graph|network|inputs|nodes|outputs|  |x: f32|\\[|\\]|=|,|\"|\\\\|\n| |[ -~]){0,40}") {
        for error in [parse(&text).err(), network::parse(&text).err()].into_iter().flatten() {
            prop_assert!(error.line >= 1 && error.line <= text.lines().count() + 1);
            prop_assert!(error.column >= 1);
        }
    }
}
