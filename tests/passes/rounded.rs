//! Activations that an export rounds inside attention: the canonical graph rounds them too, at any position, or the
//! export is refused by name.

use std::collections::{BTreeSet, HashMap, HashSet};

use lapidary::graph::eval::Evaluator;
use lapidary::graph::op::Op;
use lapidary::graph::{Graph, ValueId, infer};
use lapidary::passes::{CanonicalizeOptions, PassError, canonicalize};
use lapidary::tensor::{DType, Tensor};

use crate::decoder::{Decoder, distance};
use crate::refusals::{export, mask_additions, nodes, rewire, says};

const PROMPT: [i64; 7] = [3, 17, 60, 9, 41, 5, 77];
const NEXT: [i64; 3] = [12, 80, 33];

/// Codes of a type, a scale and a zero point.
#[derive(Clone, Copy, Debug)]
pub struct Codes(pub DType, pub f32, pub i64);

/// Rounds a value to codes, for everything that reads it, as ONNX writes it.
pub fn round(graph: &mut Graph, value: ValueId, Codes(to, scale, zero): Codes) {
    let name = graph.value(value).name.clone();
    let scale = graph.add_constant(&format!("{name}.scale"), Tensor::from_f32(vec![], &[scale]));
    let zero = match to.is_float_format() {
        true => Tensor::from_f64_as(to, vec![], &[0.0]),
        false => Tensor::from_i64_as(to, vec![], &[zero]),
    };
    let zero = graph.add_constant(&format!("{name}.zero"), zero);
    let (axis, block_size) = (1, 0);
    let quantize = Op::QuantizeLinear { axis, block_size, to };
    let codes = graph.add_node(&format!("{name}.codes"), quantize, &[value, scale, zero]);
    let dequantize = Op::DequantizeLinear { axis, block_size };
    let rounded = graph.add_node(&format!("{name}.rounded"), dequantize, &[codes, scale, zero]);
    graph.replace_uses(value, rounded);
    let (id, _) = graph.def(codes).unwrap();
    graph.node_mut(id).inputs[0] = Some(value);
    if let Some(place) = graph.outputs.iter().position(|output| *output == rounded) {
        graph.rename(value, &format!("{name}.raw"));
        graph.rename(rounded, &name);
        graph.outputs[place] = rounded;
    }
    graph.sort().unwrap();
    infer(graph).unwrap();
}

/// The export as ONNX runs it: a cache that grows. Gives the last logits of each call.
struct Run<'g> {
    graph: &'g Graph,
    caches: HashMap<String, Tensor>,
    past: usize,
}

impl<'g> Run<'g> {
    fn new(graph: &'g Graph) -> Self {
        let mut caches = HashMap::new();
        for id in &graph.inputs {
            let value = graph.value(*id);
            if value.name.starts_with("past_key_values") {
                let fixed = |i: usize| value.shape.as_ref().unwrap()[i].as_const().unwrap() as usize;
                let none = Tensor::from_f32(vec![1, fixed(1), 0, fixed(3)], &[]);
                caches.insert(value.name.clone(), none);
            }
        }
        let past = 0;
        Run { graph, caches, past }
    }

    fn bindings(&self, tokens: &[i64]) -> HashMap<ValueId, Tensor> {
        let total = self.past + tokens.len();
        let row = |values: Vec<i64>| Tensor::from_i64(vec![1, values.len()], &values);
        let inputs = self.graph.inputs.iter().map(|id| {
            let name = &self.graph.value(*id).name;
            let tensor = match name.as_str() {
                "input_ids" => row(tokens.to_vec()),
                "attention_mask" => row(vec![1; total]),
                "position_ids" => row((self.past as i64..total as i64).collect()),
                _ => self.caches[name].clone(),
            };
            (*id, tensor)
        });
        inputs.collect()
    }

    fn step(&mut self, tokens: &[i64]) -> Vec<f64> {
        let mut evaluator = Evaluator::new(self.graph, self.bindings(tokens));
        let mut logits = Vec::new();
        for output in &self.graph.outputs {
            let value = evaluator.value(*output).expect("it can be computed");
            let name = &self.graph.value(*output).name;
            match name.strip_prefix("present") {
                Some(rest) => drop(self.caches.insert(format!("past_key_values{rest}"), value)),
                None => logits = value.to_f64(),
            }
        }
        self.past += tokens.len();
        let vocabulary = logits.len() / tokens.len();
        logits.split_off(logits.len() - vocabulary)
    }
}

pub fn canonical(graph: Graph) -> Result<Graph, PassError> {
    let options = CanonicalizeOptions {
        max_positions: 32,
        ..CanonicalizeOptions::default()
    };
    let canonical = canonicalize(graph, &options)?;
    assert!(canonical.activations.left_out.is_empty());
    Ok(canonical.graph)
}

/// The largest difference of logits between an export and its canonical graph, over a prompt and single tokens.
pub fn difference(export: &Graph, canonical: &Graph) -> f64 {
    let (mut run, mut decoder) = (Run::new(export), Decoder::new(canonical, 1, 16));
    let calls = std::iter::once(PROMPT.to_vec()).chain(NEXT.map(|token| vec![token]));
    let worst = calls.map(|tokens| distance(&run.step(&tokens), &decoder.step(&[tokens])[0]));
    worst.fold(0.0, f64::max)
}

/// Floats inside attention: all inputs of products of two computed tensors, back to linear layers, and the results of
/// softmax. Each with its largest number in a prompt.
pub fn inside_attention(graph: &Graph) -> Vec<(ValueId, f64)> {
    let constant = |id: Option<ValueId>| id.is_some_and(|id| graph.constant(id).is_some());
    let is_linear = |id: ValueId| {
        let (_, node) = graph.def(id)?;
        Some(matches!(node.op, Op::MatMul | Op::Gemm { .. }) && constant(node.input(1)))
    };
    let products = nodes(graph, |op| matches!(op, Op::MatMul | Op::Attention(_)));
    let products = products.into_iter().filter(|id| !constant(graph.node(*id).input(1)));
    let mut stack: Vec<ValueId> = products
        .flat_map(|id| graph.node(id).inputs[..2].to_vec())
        .flatten()
        .collect();
    let mut seen: BTreeSet<ValueId> = stack.iter().copied().collect();
    while let Some(id) = stack.pop() {
        let Some((_, node)) = graph.def(id) else { continue };
        if is_linear(id) != Some(true) && !matches!(node.op, Op::Shape { .. }) {
            stack.extend(node.inputs.iter().flatten().filter(|input| seen.insert(**input)));
        }
    }
    let run = Run::new(graph);
    let mut evaluator = Evaluator::new(graph, run.bindings(&PROMPT));
    let computed = seen
        .into_iter()
        .filter(|id| graph.def(*id).is_some() && graph.value(*id).dtype == Some(DType::F32));
    let sized = computed.filter_map(|id| {
        let values = evaluator.value(id).ok()?.to_f64();
        let largest = values.into_iter().fold(0.0, |most: f64, v| most.max(v.abs()));
        (0.01..1e4).contains(&largest).then_some((id, largest))
    });
    sized.collect()
}

pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as usize % n
    }
}

/// Some codes that hold these numbers, most of the time all of them.
pub fn codes(random: &mut Random, largest: f64) -> Codes {
    let most = largest as f32 * [0.8, 1.0, 1.0, 1.3][random.below(4)];
    match random.below(4) {
        0 => Codes(DType::I8, most / 127.0, 0),
        1 => Codes(DType::I8, most / 100.0, random.below(50) as i64 - 25),
        2 => Codes(DType::U8, most / 110.0, 110 + random.below(30) as i64),
        _ => Codes(DType::F8E4M3Fn, most / 448.0, 0),
    }
}

/// Roundings at random places: what is accepted computes what the export does.
fn at_random_places(name: &str, graph: Graph, seed: u64, trials: usize) -> usize {
    let mut random = Random(seed);
    let places = inside_attention(&graph);
    assert!(places.len() > 10, "{name}: {places:?}");
    let (mut accepted, mut changed) = (0, 0);
    for trial in 0..trials {
        let mut edited = graph.clone();
        let count = 1 + random.below(4);
        let mut chosen = HashSet::new();
        let mut what = Vec::new();
        for _ in 0..count {
            let (value, largest) = places[random.below(places.len())];
            if chosen.insert(value) {
                let codes = codes(&mut random, largest);
                what.push(format!("{} {codes:?}", graph.value(value).name));
                round(&mut edited, value, codes);
            }
        }
        match canonical(edited.clone()) {
            Ok(canonical) => {
                accepted += 1;
                changed += usize::from(difference(&graph, &canonical) > 1e-3);
                let worst = difference(&edited, &canonical);
                assert!(
                    worst < 1e-3,
                    "{name}, trial {trial}: differs by {worst}, rounding {what:#?}"
                );
            }
            Err(PassError::RoundedAttention { values }) => assert!(!values.is_empty()),
            // Rounded tables of positions may be unrecognizable.
            Err(PassError::Obstacles { obstacles }) => assert!(!obstacles.is_empty()),
            Err(other) => panic!("{name}, trial {trial}: {other}, rounding {what:#?}"),
        }
    }
    // Dropped roundings would be detected.
    assert!(2 * changed > accepted, "{name}: {changed} of {accepted}");
    accepted
}

fn family(name: &str) -> Graph {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/families");
    let mut graph = lapidary::onnx::read(path.join(name).join("model.onnx")).unwrap();
    graph.sort().unwrap();
    infer(&mut graph).unwrap();
    graph
}

pub fn of_exporter(name: &str) -> Graph {
    let mut graph = export(name);
    graph.sort().unwrap();
    infer(&mut graph).unwrap();
    graph
}

#[test]
fn at_random_places_of_a_llama() {
    for (name, seed) in [
        ("llama-optimum", 5),
        ("llama-dynamo-opset18", 6),
        ("llama-dynamo-opset23", 7),
    ] {
        let accepted = at_random_places(name, of_exporter(name), seed, 24);
        assert_eq!(accepted, 24, "{name}");
    }
}

#[test]
fn at_random_places_of_other_models() {
    for (name, seed) in [("gpt2-optimum", 8), ("qwen3-optimum", 9)] {
        let accepted = at_random_places(name, of_exporter(name), seed, 12);
        assert_eq!(accepted, 12, "{name}");
    }
    for (name, seed, least) in [
        ("optimum-gptneox", 10, 12),
        ("optimum-phi3", 11, 12),
        ("optimum-gptj2048", 12, 4),
    ] {
        let accepted = at_random_places(name, family(name), seed, 12);
        assert!(accepted >= least, "{name}: {accepted}");
    }
}

/// The softmax of the first layer.
fn softmax(graph: &Graph) -> ValueId {
    let first = nodes(graph, |op| matches!(op, Op::Softmax { .. }))[0];
    graph.node(first).output(0).unwrap()
}

/// The product of queries and keys of the first layer.
fn scores(graph: &Graph) -> ValueId {
    let add = mask_additions(graph)[0];
    let inputs = graph.node(add).inputs.iter().flatten().copied();
    let mut products = inputs.filter(|id| graph.def(*id).is_some_and(|(_, node)| node.op == Op::MatMul));
    products.next().expect("scores are a product")
}

fn named(graph: &Graph, name: &str) -> ValueId {
    graph.find(name).unwrap_or_else(|| panic!("{name} is there"))
}

/// A cache whose past, new rows and result are rounded, each by its own node: to the same codes, or to others, so that
/// a row differs from the second call on.
#[test]
fn caches_that_are_stored_rounded() {
    for (past, changes) in [
        (Codes(DType::U8, 0.05, 120), false),
        (Codes(DType::U8, 0.07, 120), true),
        (Codes(DType::I8, 0.004, 2), true),
        (Codes(DType::F8E4M3Fn, 0.01, 0), true),
    ] {
        let mut graph = of_exporter("llama-optimum");
        for part in ["key", "value"] {
            let present = named(&graph, &format!("present.0.{part}"));
            round(&mut graph, present, Codes(DType::U8, 0.05, 120));
            let input = named(&graph, &format!("past_key_values.0.{part}"));
            round(&mut graph, input, past);
        }
        let canonical = canonical(graph.clone()).unwrap();
        assert!(difference(&graph, &canonical) < 1e-4, "{past:?}");
        assert!(difference(&of_exporter("llama-optimum"), &canonical) > 1e-3, "{past:?}");
        let selects = nodes(&canonical, |op| matches!(op, Op::Where)).len();
        assert_eq!(selects, if changes { 2 } else { 0 }, "{past:?}");
    }
}

#[test]
fn scores_and_probabilities_in_every_type() {
    for codes in [
        Codes(DType::U8, 0.02, 100),
        Codes(DType::I8, 0.02, 0),
        Codes(DType::F8E4M3Fn, 0.01, 0),
        Codes(DType::F8E5M2, 0.01, 0),
    ] {
        let mut graph = of_exporter("llama-optimum");
        let (scores, shares) = (scores(&graph), softmax(&graph));
        round(&mut graph, scores, codes);
        round(&mut graph, shares, codes);
        let canonical = canonical(graph.clone()).unwrap();
        let rounded = nodes(&canonical, |op| matches!(op, Op::RoundedAttention(_)));
        let plain = nodes(&canonical, |op| matches!(op, Op::Attention(_)));
        assert_eq!((rounded.len(), plain.len()), (1, 1), "one layer rounds");
        assert!(difference(&graph, &canonical) < 1e-4, "{codes:?}");
        assert!(
            difference(&of_exporter("llama-optimum"), &canonical) > 1e-3,
            "{codes:?}"
        );
    }
}

#[test]
fn what_has_no_place_is_named() {
    let plain = Codes(DType::U8, 0.05, 120);
    let llama = || of_exporter("llama-optimum");
    let masked = |graph: &Graph| graph.node(mask_additions(graph)[0]).output(0).unwrap();
    let refused = |mut graph: Graph, value: ValueId, codes: Codes, parts: &[&str]| {
        round(&mut graph, value, codes);
        let name = graph.value(value).name.clone();
        let error = canonical(graph).unwrap_err();
        assert!(matches!(
            error,
            PassError::RoundedAttention { .. } | PassError::RoundingScale { .. }
        ));
        says(&error.to_string(), parts);
        says(&error.to_string(), &[name.trim_end_matches(".rounded")]);
    };
    let graph = llama();
    refused(graph.clone(), masked(&graph), plain, &["after the mask"]);
    // If the range keeps hidden positions hidden, it equals a rounding before the mask.
    let mut wide = graph.clone();
    round(&mut wide, masked(&graph), Codes(DType::I8, 100.0, 0));
    let accepted = canonical(wide.clone()).unwrap();
    assert!(difference(&wide, &accepted) < 1e-4);

    let mut twice = llama();
    let first = scores(&twice);
    round(&mut twice, first, plain);
    let (_, rounded) = twice
        .def(named(&twice, &format!("{}.rounded", twice.value(first).name)))
        .unwrap();
    let again = rounded.output(0).unwrap();
    round(&mut twice, again, Codes(DType::I8, 0.06, 0));
    let accepted = canonical(twice.clone()).unwrap();
    assert!(difference(&twice, &accepted) < 1e-4);
    refused(twice, again, Codes(DType::U8, 0.07, 120), &["rounded once more"]);

    for scale in [f32::INFINITY, 0.0, -1.0] {
        refused(
            graph.clone(),
            scores(&graph),
            Codes(DType::U8, scale, 120),
            &["no positive number"],
        );
    }

    // Codes over the range of all tokens and slots.
    let mut dynamic = llama();
    let (user, input) = dynamic.uses()[&scores(&dynamic)][0];
    rewire(&mut dynamic, user, input, |graph, x| {
        let made = ["codes", "scale", "zero"].map(|part| graph.add_value(part));
        let outputs = made.map(Some).to_vec();
        graph.add_node_with_outputs("quantize", Op::DynamicQuantizeLinear, vec![Some(x)], outputs);
        let (axis, block_size) = (1, 0);
        graph.add_node("near", Op::DequantizeLinear { axis, block_size }, &made)
    });
    dynamic.sort().unwrap();
    let error = canonical(dynamic).unwrap_err();
    says(
        &error.to_string(),
        &["the range of its codes is that of the whole tensor"],
    );

    // Stored rounded, but read unrounded.
    let mut stored = llama();
    let present = named(&stored, "present.0.value");
    let uses: Vec<_> = stored.uses()[&present].clone();
    round(&mut stored, present, plain);
    for (node, input) in uses {
        stored.node_mut(node).inputs[input] = Some(present);
    }
    let error = canonical(stored).unwrap_err();
    says(
        &error.to_string(),
        &["no output is the update of the cache past_key_values.0.value"],
    );
}
