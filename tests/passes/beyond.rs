//! Behavior that appears only at lengths beyond a small trial: windows in tables, blocks and chunks, rotary tables and
//! scales that switch, caches that drop tokens. Each is recognized, or refused by name. Also dims fixed by an export.

use lapidary::dim::Dim;
use lapidary::graph::eval::Evaluator;
use lapidary::graph::op::{Binary, Op, Unary};
use lapidary::graph::{Graph, NodeId, ValueId};
use lapidary::passes::{Architecture, CanonicalizeOptions, canonicalize};
use lapidary::tensor::{DType, Tensor};

use crate::canonical::{exports, for_each};
use crate::decoder::{Decoder, distance};
use crate::refusals::{export, mask_additions, nodes, refusal_at, rewire, says};

const POSITIONS: usize = 512;

fn architecture(graph: Graph, max_positions: usize) -> Architecture {
    let options = CanonicalizeOptions {
        max_positions,
        ..CanonicalizeOptions::default()
    };
    canonicalize(graph, &options)
        .unwrap_or_else(|e| panic!("{e}"))
        .architecture
}

/// Past length and total length as tensors of one number, of an export with a growing cache.
struct Counts {
    past: ValueId,
    total: ValueId,
}

fn i64s(graph: &mut Graph, name: &str, values: &[i64]) -> ValueId {
    graph.add_constant(name, Tensor::from_i64(vec![values.len()], values))
}

fn scalar(graph: &mut Graph, name: &str, value: i64) -> ValueId {
    graph.add_constant(name, Tensor::from_i64(vec![], &[value]))
}

fn counts(graph: &mut Graph) -> Counts {
    let (ids, cache) = (
        graph.find("input_ids").unwrap(),
        graph.find("past_key_values.0.key").unwrap(),
    );
    let past = graph.add_node("count.past", Op::Shape { start: 2, end: Some(3) }, &[cache]);
    let tokens = graph.add_node("count.tokens", Op::Shape { start: 1, end: Some(2) }, &[ids]);
    let total = graph.add_node("count.total", Op::Binary(Binary::Add), &[past, tokens]);
    Counts { past, total }
}

/// `[tokens, 1]` positions of queries and `[total]` of keys.
fn grid(graph: &mut Graph, counts: &Counts) -> (ValueId, ValueId) {
    let axis = i64s(graph, "grid.axis", &[0]);
    let one = i64s(graph, "grid.last", &[1]);
    let (zero, step) = (scalar(graph, "grid.zero", 0), scalar(graph, "grid.step", 1));
    let past = graph.add_node("grid.past", Op::Squeeze, &[counts.past, axis]);
    let total = graph.add_node("grid.total", Op::Squeeze, &[counts.total, axis]);
    let query = graph.add_node("grid.query", Op::Range, &[past, total, step]);
    let query = graph.add_node("grid.rows", Op::Unsqueeze, &[query, one]);
    let key = graph.add_node("grid.key", Op::Range, &[zero, total, step]);
    (query, key)
}

/// Hides, in these layers, the positions that do not satisfy `condition`.
fn hide(graph: &mut Graph, layers: &[usize], condition: ValueId) {
    let zero = graph.add_constant("hide.zero", Tensor::from_f32(vec![], &[0.0]));
    let fill = graph.add_constant("hide.fill", Tensor::from_f32(vec![], &[f32::MIN]));
    let extra = graph.add_node("hide.extra", Op::Where, &[condition, zero, fill]);
    let additions = mask_additions(graph);
    for layer in layers {
        rewire(graph, additions[*layer], 1, |graph, mask| {
            graph.add_node(&format!("hide.{layer}"), Op::Binary(Binary::Add), &[mask, extra])
        });
    }
}

/// Rows `past..total` and columns `0..total` of a table of booleans, as GPT-Neo reads its masks.
fn sliced_table(graph: &mut Graph, rows: usize, keep: impl Fn(usize, usize) -> bool) -> ValueId {
    let bits: Vec<bool> = (0..rows * rows).map(|i| keep(i / rows, i % rows)).collect();
    let table = graph.add_constant("table", Tensor::from_bool(vec![1, 1, rows, rows], &bits));
    let counts = counts(graph);
    let zero = i64s(graph, "table.zero", &[0]);
    let (two, three) = (i64s(graph, "table.two", &[2]), i64s(graph, "table.three", &[3]));
    let part = graph.add_node("table.rows", Op::Slice, &[table, counts.past, counts.total, two]);
    graph.add_node("table.part", Op::Slice, &[part, zero, counts.total, three])
}

#[test]
fn a_window_in_a_table_is_recognized_and_the_table_bounds_positions() {
    for (window, max_positions) in [
        (20, POSITIONS),
        (20, 64),
        (99, POSITIONS),
        (119, POSITIONS),
        (2, POSITIONS),
    ] {
        let mut graph = export("llama-dynamo-opset18");
        let table = sliced_table(&mut graph, 120, |p, s| s <= p && s + window > p);
        hide(&mut graph, &[1], table);
        let found = architecture(graph, max_positions);
        assert_eq!(found.windows, [None, Some(window)], "{max_positions}");
        assert_eq!(found.max_positions, Some(max_positions.min(120)));
    }
}

/// Logits of the last token, from the export itself and all tokens at once.
fn export_logits(graph: &Graph, tokens: &[i64]) -> Vec<f64> {
    let n = tokens.len();
    let positions: Vec<i64> = (0..n as i64).collect();
    let bindings = graph.inputs.iter().map(|id| {
        let value = graph.value(*id);
        let tensor = match value.name.as_str() {
            "input_ids" => Tensor::from_i64(vec![1, n], tokens),
            "attention_mask" => Tensor::from_i64(vec![1, n], &vec![1; n]),
            "position_ids" => Tensor::from_i64(vec![1, n], &positions),
            _ => Tensor::from_f32(vec![1, 2, 0, 16], &[]),
        };
        (*id, tensor)
    });
    let logits = Evaluator::new(graph, bindings.collect())
        .value(graph.outputs[0])
        .unwrap();
    let vocabulary = *logits.shape().last().unwrap();
    logits.to_f64()[(n - 1) * vocabulary..].to_vec()
}

#[test]
fn a_window_in_a_table_computes_what_the_export_does() {
    let mut graph = export("llama-dynamo-opset18");
    let table = sliced_table(&mut graph, 120, |p, s| s <= p && s + 50 > p);
    hide(&mut graph, &[0, 1], table);
    graph.sort().unwrap();
    let options = CanonicalizeOptions {
        max_positions: POSITIONS,
        ..CanonicalizeOptions::default()
    };
    let canonical = canonicalize(graph.clone(), &options).unwrap();
    let tokens: Vec<i64> = (0..110).map(|i| (i * i * 31 + 7 * i) % 97).collect();
    let mut decoder = Decoder::new(&canonical.graph, 1, 120);
    for (start, end) in [(0, 60), (60, 109), (109, 110)] {
        let logits = decoder.step(&[tokens[start..end].to_vec()]).remove(0);
        let worst = distance(&logits, &export_logits(&graph, &tokens[..end]));
        assert!(worst < 1e-4, "{worst:e}");
    }
}

#[test]
fn a_table_that_is_no_window_is_refused_wherever_it_is_not() {
    // One slot of one late row, a row that sees nothing of the past, blocks with a stripe.
    let kinds: [&dyn Fn(usize, usize) -> bool; 3] = [
        &|p, s| s <= p && !(p == 97 && s == 3),
        &|p, s| s <= p && (p < 110 || s == p),
        &|p, s| s <= p && (p / 8 - s / 8 < 4 || (s / 8) % 4 == 3),
    ];
    for keep in kinds {
        let mut graph = export("llama-dynamo-opset18");
        let table = sliced_table(&mut graph, 120, keep);
        hide(&mut graph, &[0], table);
        says(
            &refusal_at(graph, POSITIONS),
            &["layer 0", "its mask is not", "attend to slot"],
        );
    }
}

#[test]
fn a_table_of_each_head_is_refused() {
    let mut graph = export("llama-dynamo-opset18");
    let rows = 120;
    let keep = |h: usize, p: usize, s: usize| s <= p && (p < 100 || s % 4 != h);
    let bits: Vec<bool> = (0..4 * rows * rows)
        .map(|i| keep(i / (rows * rows), i / rows % rows, i % rows))
        .collect();
    let table = graph.add_constant("table", Tensor::from_bool(vec![1, 4, rows, rows], &bits));
    let counts = counts(&mut graph);
    let zero = i64s(&mut graph, "zero", &[0]);
    let (two, three) = (i64s(&mut graph, "two", &[2]), i64s(&mut graph, "three", &[3]));
    let part = graph.add_node("rows", Op::Slice, &[table, counts.past, counts.total, two]);
    let part = graph.add_node("part", Op::Slice, &[part, zero, counts.total, three]);
    hide(&mut graph, &[1], part);
    says(
        &refusal_at(graph, POSITIONS),
        &["layer 1", "the mask differs between heads"],
    );
}

/// Chunks and windows of blocks have two parameters, and neither is the length from which they have an effect.
#[test]
fn chunks_and_blocks_are_refused() {
    for (block, blocks) in [(100, 1), (16, 8)] {
        let mut graph = export("llama-dynamo-opset18");
        let counts = counts(&mut graph);
        let (query, key) = grid(&mut graph, &counts);
        let size = scalar(&mut graph, "block", block);
        let query = graph.add_node("block.query", Op::Binary(Binary::Div), &[query, size]);
        let key = graph.add_node("block.key", Op::Binary(Binary::Div), &[key, size]);
        let count = scalar(&mut graph, "blocks", blocks);
        let before = graph.add_node("block.before", Op::Binary(Binary::Sub), &[query, count]);
        let keep = graph.add_node("block.keep", Op::Binary(Binary::Greater), &[key, before]);
        hide(&mut graph, &[0, 1], keep);
        says(&refusal_at(graph, POSITIONS), &["layer 0", "its mask is not", "window"]);
    }
}

#[test]
fn a_window_of_arithmetic_is_found_whatever_it_is_made_of() {
    let mut graph = export("llama-dynamo-opset18");
    let counts = counts(&mut graph);
    let (query, key) = grid(&mut graph, &counts);
    // 3 * position - 3 * slot < 3 * 16 * 8, of which only the factors are in the graph.
    let three = scalar(&mut graph, "three", 3);
    let sixteen = scalar(&mut graph, "sixteen", 16);
    let limit = scalar(&mut graph, "limit", 8);
    let gap = graph.add_node("gap", Op::Binary(Binary::Sub), &[query, key]);
    let gap = graph.add_node("gap.3", Op::Binary(Binary::Mul), &[gap, three]);
    let gap = graph.add_node("gap.48", Op::Binary(Binary::Div), &[gap, three]);
    let gap = graph.add_node("gap.16", Op::Binary(Binary::Div), &[gap, sixteen]);
    let keep = graph.add_node("keep", Op::Binary(Binary::Less), &[gap, limit]);
    hide(&mut graph, &[1], keep);
    assert_eq!(architecture(graph, POSITIONS).windows, [None, Some(128)]);
}

/// Replaces the angles by `angle * factor`, where `factor` is one number that depends on the total length.
fn switch_rotation(graph: &mut Graph, above: i64) {
    let counts = counts(graph);
    let limit = i64s(graph, "limit", &[above]);
    let long = graph.add_node("long", Op::Binary(Binary::Greater), &[counts.total, limit]);
    let one = graph.add_constant("factor.short", Tensor::from_f32(vec![], &[1.0]));
    let half = graph.add_constant("factor.long", Tensor::from_f32(vec![], &[0.5]));
    let factor = graph.add_node("factor", Op::Where, &[long, half, one]);
    for id in nodes(graph, |op| matches!(op, Op::Unary(Unary::Cos | Unary::Sin))) {
        rewire(graph, id, 0, |graph, angle| {
            graph.add_node("angle", Op::Binary(Binary::Mul), &[angle, factor])
        });
    }
}

#[test]
fn a_rotation_that_switches_with_the_length_has_two_tables() {
    let switched = |above: i64| {
        let mut graph = export("llama-dynamo-opset18");
        switch_rotation(&mut graph, above);
        graph
    };
    let longest_short_run = |above: i64, positions: usize| {
        let found = architecture(switched(above), positions);
        assert_eq!(found.max_positions, Some(positions));
        found.rotary.unwrap().longest_short_run
    };
    for above in [60, 128, 500] {
        assert_eq!(longest_short_run(above, POSITIONS), Some(above as usize));
    }
    // Within the requested capacity, the export has one table.
    assert_eq!(longest_short_run(128, 128), None);
}

/// On both sides of the switch, prompts as a whole and in parts, and one token after another across it.
#[test]
fn a_rotation_that_switches_computes_what_the_export_does() {
    let mut graph = export("llama-dynamo-opset18");
    switch_rotation(&mut graph, 20);
    graph.sort().unwrap();
    let options = CanonicalizeOptions {
        max_positions: 64,
        ..CanonicalizeOptions::default()
    };
    let canonical = canonicalize(graph.clone(), &options).unwrap();
    let tokens: Vec<i64> = (0..40).map(|i| (i * i * 31 + 7 * i) % 97).collect();
    for count in [5, 20, 21, 40] {
        let expected = export_logits(&graph, &tokens[..count]);
        for first in [count, 3, count / 2] {
            let mut decoder = Decoder::new(&canonical.graph, 1, 64);
            let mut logits = decoder.part_of_run(&[tokens[..first].to_vec()], count);
            if first < count {
                logits = decoder.part_of_run(&[tokens[first..count].to_vec()], count);
            }
            let worst = distance(&logits.remove(0), &expected);
            assert!(worst < 1e-4, "{count} tokens, the first {first} alone: {worst:e}");
        }
    }
    // In short runs, the same tokens give other results.
    let mut decoder = Decoder::new(&canonical.graph, 1, 64);
    decoder.part_of_run(&[tokens[..20].to_vec()], 20);
    let logits = decoder.part_of_run(&[tokens[20..40].to_vec()], 40).remove(0);
    assert!(distance(&logits, &export_logits(&graph, &tokens)) > 1e-3);
}

/// Multiplies every query after position `limit` by 1.25.
fn scale_late_queries(graph: &mut Graph, limit: i64) {
    let counts = counts(graph);
    let (query, _) = grid(graph, &counts);
    let limit = scalar(graph, "limit", limit);
    let late = graph.add_node("late", Op::Binary(Binary::Greater), &[query, limit]);
    let one = graph.add_constant("scale.early", Tensor::from_f32(vec![], &[1.0]));
    let more = graph.add_constant("scale.late", Tensor::from_f32(vec![], &[1.25]));
    let scale = graph.add_node("scale", Op::Where, &[late, more, one]);
    for addition in mask_additions(graph) {
        let scores = graph.node(addition).input(0).unwrap();
        let product = graph.producer_of(scores).unwrap().0;
        rewire(graph, product, 0, |graph, query| {
            graph.add_node("query.scaled", Op::Binary(Binary::Mul), &[query, scale])
        });
    }
}

#[test]
fn a_scale_of_late_positions_is_not_lost() {
    let mut graph = export("llama-dynamo-opset18");
    scale_late_queries(&mut graph, 300);
    // Queries with their own table are a table like any other: the scale is in it, and nothing is lost.
    let options = CanonicalizeOptions {
        max_positions: POSITIONS,
        ..CanonicalizeOptions::default()
    };
    match canonicalize(graph, &options) {
        Ok(canonical) => assert_eq!(canonical.architecture.rotary.unwrap().tables, 2),
        Err(error) => says(&error.to_string(), &["layer 0", "its queries"]),
    }
}

/// Learned positions have no rotation that could hold a scale.
#[test]
fn a_scale_of_late_positions_is_refused_without_a_rotation() {
    let mut graph = export("gpt2-dynamo-opset18");
    scale_late_queries(&mut graph, 40);
    says(
        &refusal_at(graph, 64),
        &["layer 0", "its queries", "was not understood"],
    );
}

#[test]
fn a_cache_that_keeps_its_last_slots_is_refused() {
    let mut graph = export("llama-dynamo-opset18");
    let concats: Vec<NodeId> = graph
        .outputs
        .iter()
        .filter_map(|output| Some(graph.producer_of(*output)?.0))
        .filter(|id| matches!(graph.node(*id).op, Op::Concat { .. }))
        .collect();
    assert!(concats.len() >= 4, "{concats:?}");
    let (start, end, axis) = (
        i64s(&mut graph, "last.start", &[-96]),
        i64s(&mut graph, "last.end", &[i64::MAX]),
        i64s(&mut graph, "last.axis", &[2]),
    );
    for id in concats {
        let whole = graph.node(id).output(0).unwrap();
        let last = graph.add_node("last", Op::Slice, &[whole, start, end, axis]);
        for output in &mut graph.outputs {
            if *output == whole {
                *output = last;
            }
        }
    }
    says(&refusal_at(graph, POSITIONS), &["layer 0", "past_key_values.0.key"]);
}

#[test]
fn masks_that_the_caller_fills_are_taken_for_causal_only_if_there_is_one() {
    // As `transformers` exports Gemma 3 with a mask for each kind of layer.
    let with_masks = |names: [&str; 2]| {
        let mut graph = export("llama-dynamo-opset18");
        let batch = graph.shape(graph.find("input_ids").unwrap()).unwrap()[0].clone();
        let shape = vec![batch, Dim::from(1usize), Dim::named("s"), Dim::named("total")];
        let masks: Vec<ValueId> = names
            .iter()
            .map(|name| match graph.find(name) {
                Some(known) => known,
                None => graph.add_input(name, DType::F32, shape.clone()),
            })
            .collect();
        for (addition, mask) in mask_additions(&graph).into_iter().zip(masks) {
            rewire(&mut graph, addition, 1, |_, _| mask);
        }
        let uses = graph.uses();
        let unused = graph.find("attention_mask").filter(|id| !uses.contains_key(id));
        graph.inputs.retain(|id| Some(*id) != unused);
        graph
    };
    says(
        &refusal_at(with_masks(["full_attention_mask", "sliding_attention_mask"]), 64),
        &[
            "the caller fills the masks full_attention_mask",
            " and sliding_attention_mask",
            "one attention_mask of",
        ],
    );
    says(
        &refusal_at(with_masks(["sliding_attention_mask", "sliding_attention_mask"]), 64),
        &["the caller fills the masks sliding_attention_mask"],
    );
    assert_eq!(
        architecture(with_masks(["given_mask", "given_mask"]), 64).windows,
        [None, None]
    );
    // One layer reads it; the other has the graph's mask.
    let mut mixed = export("llama-dynamo-opset18");
    let batch = mixed.shape(mixed.find("input_ids").unwrap()).unwrap()[0].clone();
    let shape = vec![batch, Dim::from(1usize), Dim::named("s"), Dim::named("total")];
    let mask = mixed.add_input("given_mask", DType::F32, shape);
    let addition = mask_additions(&mixed)[0];
    rewire(&mut mixed, addition, 1, |_, _| mask);
    says(
        &refusal_at(mixed, 64),
        &["layer 1", "does not read the mask that is an input"],
    );
}

/// Gives every input dim of this name a number.
fn fix(graph: &mut Graph, name: &str, number: usize) -> usize {
    let mut count = 0;
    for id in graph.inputs.clone().into_iter().chain(graph.outputs.clone()) {
        let Some(mut shape) = graph.shape(id).cloned() else {
            continue;
        };
        for dim in &mut shape {
            if dim.to_string() == name {
                *dim = Dim::from(number);
                count += 1;
            }
        }
        graph.value_mut(id).shape = Some(shape);
    }
    count
}

#[test]
fn dims_that_the_export_fixes_are_refused_with_what_they_count() {
    for (dim, number, expected) in [
        (
            "batch_size",
            99,
            "input_ids [99, sequence_length]: batch is 99 (axis 0)",
        ),
        ("sequence_length", 1, "the number of new tokens is 1 (axis 1)"),
        ("sequence_length", 7, "the number of new tokens is 7 (axis 1)"),
        ("past_sequence_length", 5, "past_key_values.0.key"),
        (
            "past_sequence_length + sequence_length",
            9,
            "attention_mask [batch_size, 9]: the length of past and new tokens is 9",
        ),
    ] {
        let mut graph = export("llama-optimum");
        assert!(fix(&mut graph, dim, number) > 0, "{dim}");
        says(&refusal_at(graph, 64), &[expected]);
    }
    let mut graph = export("llama-optimum");
    fix(&mut graph, "batch_size", 99);
    fix(&mut graph, "sequence_length", 7);
    says(
        &refusal_at(graph, 64),
        &[
            "batch is 99",
            "new tokens is 7",
            "as of 3 other caches",
            "export with dynamic axes",
        ],
    );
    // A batch of 1 may have any effect, wherever it is set.
    for only in ["", "past_key_values.0.key"] {
        let mut graph = export("llama-optimum");
        for id in graph.inputs.clone() {
            if graph.value(id).name.contains(only) {
                let mut shape = graph.shape(id).cloned().unwrap();
                shape[0] = Dim::from(1usize);
                graph.value_mut(id).shape = Some(shape);
            }
        }
        assert_eq!(architecture(graph, 64).batch, Some(1), "{only:?}");
    }
}

/// Exporters' labels of input dims can be wrong: optimum 1.23 labels the mask `past_sequence_length + 1`, others give
/// all dims one name.
#[test]
fn names_of_dims_are_not_taken_at_their_word() {
    let mut graph = export("llama-optimum");
    let mask = graph.find("attention_mask").unwrap();
    let label = &Dim::named("past_sequence_length") + &Dim::from(1usize);
    graph.value_mut(mask).shape = Some(vec![Dim::named("batch_size"), label]);
    let labeled = architecture(graph, 64);
    let mut graph = export("llama-optimum");
    for id in graph.inputs.clone() {
        let shape = graph.shape(id).cloned().unwrap().into_iter();
        let named = |dim: Dim| if dim.as_const().is_some() { dim } else { Dim::named("N") };
        graph.value_mut(id).shape = Some(shape.map(named).collect());
    }
    assert_eq!(architecture(graph, 64), labeled);
    assert_eq!((labeled.batch, labeled.windows), (None, vec![None, None]));
}

/// For the decoder of an encoder-decoder model there is one message, not one per layer.
#[test]
fn the_decoder_of_an_encoder_is_refused_in_one_line() {
    let mut graph = export("llama-dynamo-opset18");
    let cache = graph.find("past_key_values.0.key").unwrap();
    graph.rename(cache, "past_key_values.0.encoder.key");
    let nothing = graph.add_constant("nothing", Tensor::from_bool(vec![1], &[false]));
    hide(&mut graph, &[0], nothing);
    let text = refusal_at(graph, 64);
    says(&text, &["past_key_values.0.encoder.key", "come from an encoder"]);
    assert!(!text.contains("reasons"), "{text}");
}

/// Tables that exporters read by other operators than Gather bound positions as well.
#[test]
fn a_table_behind_any_operator_bounds_positions() {
    for elements in [true, false] {
        let mut graph = export("llama-dynamo-opset18");
        let counts = counts(&mut graph);
        let (query, _) = grid(&mut graph, &counts);
        // A factor of 1 for each of 200 positions, multiplied into the cosines.
        let width = i64s(&mut graph, "ones.width", &[1]);
        let factor = match elements {
            true => {
                let table = graph.add_constant("ones", Tensor::from_f32(vec![200, 1], &[1.0; 200]));
                graph.add_node("ones.rows", Op::GatherElements { axis: 0 }, &[table, query])
            }
            false => {
                let table = graph.add_constant("ones", Tensor::from_f32(vec![200], &[1.0; 200]));
                let rows = graph.add_node("ones.rows", Op::GatherNd { batch_dims: 0 }, &[table, query]);
                graph.add_node("ones.column", Op::Unsqueeze, &[rows, width])
            }
        };
        for id in nodes(&graph, |op| matches!(op, Op::Unary(Unary::Cos | Unary::Sin))) {
            rewire(&mut graph, id, 0, |graph, angle| {
                graph.add_node("angle", Op::Binary(Binary::Mul), &[angle, factor])
            });
        }
        assert_eq!(architecture(graph, POSITIONS).max_positions, Some(200), "{elements}");
    }
}

/// The longer proof does not change correct results.
#[test]
fn every_fixture_is_proven_to_its_end() {
    assert!(exports().len() > 40 || std::env::var_os("LAPIDARY_EXPORT").is_some());
    for_each(|export| {
        let options = CanonicalizeOptions {
            max_positions: 300,
            ..CanonicalizeOptions::default()
        };
        let found = canonicalize(export.read(), &options)
            .map_err(|e| e.to_string())?
            .architecture;
        match found.windows.contains(&export.window()) {
            true => Ok(()),
            false => Err(format!("{:?}", found.windows)),
        }
    });
}
