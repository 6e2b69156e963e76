//! The computation of the experts, proved by executing everything except the products.
//!
//! Random tensors stand in for the tokens, the logits and the results of all products. Then every input row of a
//! product must be a token's row, the inputs of the second products must be a known function of the first products'
//! results, row by row, and the block's result must be the sum of the second products' results, each times the routing
//! weight of its expert and token. Together with the products' constants, which the graph contains, this defines a
//! mixture of experts.

use std::collections::{HashMap, HashSet};

use super::gating::{self, Layout};
use super::products::{Product, product};
use super::region::Flow;
use super::routing::{self, Draw, Found};
use super::sums::{Sums, by_shares, order, shares};
use super::trial::{Random, Trial, agree, tolerance};
use super::weights::collect;
use crate::graph::op::{Gating, Op};
use crate::graph::{Constant, NodeId, ValueId};
use crate::passes::roles::Roles;
use crate::tensor::{DType, Tensor};

/// A recognized mixture of experts.
#[derive(Clone, Debug)]
pub struct Block {
    pub found: Found,
    /// Its input per token, `[.., in]`.
    pub x: ValueId,
    /// Its result.
    pub y: ValueId,
    pub gating: Gating,
    /// Matrices `[experts * hidden, in]`, `[experts * out, hidden]`.
    pub gate: Constant,
    pub up: Option<Constant>,
    pub down: Constant,
    /// The bias of each.
    pub biases: [Option<Constant>; 3],
}

/// One or two products of the first layer, and the product after them.
pub(super) struct Instance {
    pub first: Vec<Product>,
    pub down: Product,
}

/// The token of a row of products, and its expert if the row determines it.
pub(super) type Rows = Vec<(usize, Option<usize>)>;

/// Recognizes the computation between `x` and `y`; the reason if it is not a known form of a mixture of experts.
pub fn recognize(flow: &Flow<'_>, roles: &Roles, candidates: &[Found], [x, y]: [ValueId; 2]) -> Result<Block, String> {
    let graph = flow.graph;
    let logits = candidates[0].logits;
    let (experts, top_k) = (candidates[0].experts, candidates[0].routing.top_k);
    let nodes = flow.cone(y, &[x, logits]);
    let instances = instances(flow, &nodes)?;
    match instances.len() {
        1 => {}
        n if n == experts => {}
        n => return Err(format!("it has {n} feed-forward layers for {experts} experts")),
    }
    check_counts(&instances, experts)?;
    let tokens = experts.div_ceil(top_k) + 2;
    let width = instances[0].first[0].depth();
    let mut gatings: Option<(Gating, Layout)> = None;
    let mut expert_of: Option<Vec<usize>> = None;
    let mut factors: Vec<Option<f64>> = vec![None; candidates.len()];
    let mut open: Vec<bool> = vec![true; candidates.len()];
    let mut draws = vec![(Draw::Covering, 3u64), (Draw::Any, 4)];
    let mut margins: Vec<f32> = candidates.iter().map(|found| found.routing.margin).collect();
    margins.retain(|margin| *margin > 0.0);
    margins.sort_by(f32::total_cmp);
    margins.dedup();
    draws.extend(
        margins
            .into_iter()
            .zip(5..)
            .map(|(margin, seed)| (Draw::Close(margin), seed)),
    );
    for (draw, seed) in draws {
        let mut random = Random::new(seed);
        let mut trial = Trial::new(graph, roles, tokens);
        let dtype = graph.value(x).dtype.unwrap_or(DType::F32);
        let rows_of_x = bind_random(&mut trial, &mut random, x, dtype, 1.0)?.to_f64();
        let rows_of_x: Vec<&[f64]> = rows_of_x.chunks_exact(width.max(1)).collect();
        let of_logits = graph.value(logits).dtype.unwrap_or(DType::F32);
        let shape = trial.dims(logits).ok_or("the sizes of its logits are not known")?;
        let given = routing::logits(of_logits, shape, top_k, draw, seed);
        trial.bind(logits, given.clone());
        let routed: Vec<[Tensor; 2]> = candidates
            .iter()
            .map(|found| found.route(graph, &given).ok_or("its routing cannot be computed"))
            .collect::<Result<_, _>>()?;
        let chosen = routed[0][1].to_i64();
        let count = rows_of_x.len();
        if chosen.len() != count * top_k {
            return Err("its tokens and its choices are not equally many".to_string());
        }
        // The substitutes, without values computed from them.
        let mut bound = trial.clone();
        // The inputs of the first products, and substitutes for their results.
        let mut rows_of: Vec<Rows> = Vec::new();
        let mut stands: Vec<Vec<f64>> = Vec::new();
        let tolerance = tolerance(dtype);
        for instance in &instances {
            let mut rows: Option<Rows> = None;
            for product in &instance.first {
                let found = rows_into(&mut trial, product, &rows_of_x)?;
                if rows.as_ref().is_some_and(|rows| *rows != found) {
                    return Err("gate and up of its experts take rows in different orders".to_string());
                }
                bind_result([&mut trial, &mut bound], &mut random, product, found.len(), 6.0)?;
                rows = Some(found);
            }
            let rows = rows.expect("an instance has a first product");
            // From results to the second product.
            let ends = instance.first.iter().map(|product| {
                let end = trial
                    .value(product.end)
                    .ok_or("the bias of a product cannot be computed")?;
                check_bias(&mut trial, product, &rows, tolerance)?;
                Ok::<_, String>(end.to_f64())
            });
            let ends = ends.collect::<Result<Vec<_>, _>>()?;
            let hidden = trial
                .value(instance.down.x)
                .ok_or("what its experts compute depends on more than their rows")?;
            let known = gatings.as_ref();
            let cone = activation_cone(flow, instance);
            let scalars = gating::scalars(graph, &cone);
            let found = gating::recognize(known, &ends, &hidden.to_f64(), &scalars, tolerance, rows.len())
                .ok_or("the function between the matrices of its experts is not known")?;
            if gatings.get_or_insert(found.clone()) != &found {
                return Err("its experts have different functions between their matrices".to_string());
            }
            bind_result([&mut trial, &mut bound], &mut random, &instance.down, rows.len(), 1.0)?;
            let end = trial.value(instance.down.end);
            let end = end.ok_or("the bias of a product cannot be computed")?;
            check_bias(&mut trial, &instance.down, &rows, tolerance)?;
            rows_of.push(rows);
            stands.push(end.to_f64());
        }
        let result = trial
            .value(y)
            .ok_or("its result depends on more than tokens and logits")?
            .to_f64();
        let columns = instances[0].down.columns();
        if result.len() != count * columns {
            return Err("its result has another size than its tokens".to_string());
        }
        let sums = Sums {
            rows_of: &rows_of,
            stands: &stands,
            top_k,
            columns,
            tokens: count,
        };
        if expert_of.is_none() {
            let in_place = order(&rows_of, &chosen, top_k, experts);
            let fits = |order: &[usize]| {
                let sums = routed.iter().filter_map(|routed| sums.weighted(order, routed));
                sums.into_iter()
                    .any(|sum| routing::factor(&result, &sum, tolerance).is_some())
            };
            let found = match instances.len() > 1 && !fits(&in_place) {
                // Not the graph's order, but the order in which results meet their weights.
                true => {
                    let measured = shares(&bound, &instances, y, &sums);
                    let mut orders = routed
                        .iter()
                        .filter_map(|routed| by_shares(&measured, routed, top_k, experts));
                    orders.find(|order| fits(order)).unwrap_or(in_place)
                }
                false => in_place,
            };
            expert_of = Some(found);
        }
        let of = expert_of.as_ref().expect("just set");
        for (i, routed) in routed.iter().enumerate() {
            if !open[i] {
                continue;
            }
            let sum = sums.weighted(of, routed);
            let found = sum.and_then(|sum| routing::factor(&result, &sum, tolerance));
            let same = |a: f64, b: f64| (a - b).abs() <= tolerance * (1.0 + a.abs());
            match (found, factors[i]) {
                (Some(found), None) => factors[i] = Some(found),
                (Some(found), Some(before)) if same(found, before) => {}
                _ => open[i] = false,
            }
        }
    }
    let Some(at) = (0..candidates.len()).find(|i| open[*i]) else {
        return Err("its result is not the sum of its experts' results times weights of a known kind".to_string());
    };
    let mut found = candidates[at].clone();
    let factor = factors[at].expect("found with it");
    // Constants of an export have few digits.
    let rounded = (factor * 1e5).round() / 1e5;
    let is_round = (factor - rounded).abs() <= 1e-5 * factor.abs();
    found.routing.scale = if is_round { rounded as f32 } else { factor as f32 };
    let (gating, layout) = gatings.expect("every instance has one");
    let order = expert_of.expect("every trial sets it");
    let weights = collect(&instances, &order, &layout)?;
    let [gate, up, down] = weights.0;
    Ok(Block {
        found,
        x,
        y,
        gating,
        gate: gate.expect("every expert has a first matrix"),
        up,
        down: down.expect("every expert has a second matrix"),
        biases: weights.1,
    })
}

fn bind_random(
    trial: &mut Trial<'_>,
    random: &mut Random,
    value: ValueId,
    dtype: DType,
    scale: f64,
) -> Result<Tensor, String> {
    let shape = trial.dims(value).ok_or("the sizes of its tokens are not known")?;
    let tensor = random.tensor(dtype, shape, scale);
    trial.bind(value, tensor.clone());
    Ok(tensor)
}

/// The pairs of layers, from the products among these nodes.
fn instances(flow: &Flow<'_>, nodes: &[NodeId]) -> Result<Vec<Instance>, String> {
    let graph = flow.graph;
    let mut products: Vec<Product> = Vec::new();
    // Which products a value is computed from, without another product in between.
    let mut behind: HashMap<ValueId, Vec<usize>> = HashMap::new();
    let mut before: Vec<Vec<usize>> = Vec::new();
    for id in nodes {
        let node = graph.node(*id);
        let mut from: Vec<usize> = Vec::new();
        for input in super::region::data_inputs(graph, *id) {
            for at in behind.get(&input).into_iter().flatten() {
                if !from.contains(at) {
                    from.push(*at);
                }
            }
        }
        let is_product = matches!(node.op, Op::MatMul | Op::Gemm { .. } | Op::FusedMatMul { .. });
        if is_product {
            let Some(product) = product(flow, *id) else {
                return Err(format!("{:?} is a product of an unknown kind", node.name));
            };
            behind.insert(product.result, vec![products.len()]);
            products.push(product);
            before.push(from);
            continue;
        }
        for output in node.outputs.iter().flatten() {
            behind.insert(*output, from.clone());
        }
    }
    let mut instances = Vec::new();
    let mut used = HashSet::new();
    for (at, from) in before.iter().enumerate().filter(|(_, from)| !from.is_empty()) {
        let two_layers = from.iter().all(|i| before[*i].is_empty());
        if !two_layers || from.len() > 2 || !from.iter().all(|i| used.insert(*i)) {
            return Err(format!(
                "{:?} multiplies with more than what one or two other products give",
                graph.node(products[at].node).name
            ));
        }
        used.insert(at);
        instances.push(Instance {
            first: from.iter().map(|i| products[*i].clone()).collect(),
            down: products[at].clone(),
        });
    }
    match instances.is_empty() || used.len() != products.len() {
        true => Err("its products are not those of two layers".to_string()),
        false => Ok(instances),
    }
}

/// The matrices of all experts if there is one instance, or of one expert each if there are several equal instances.
fn check_counts(instances: &[Instance], experts: usize) -> Result<(), String> {
    let of = |instance: &Instance| -> Vec<Product> {
        let all = instance.first.iter().chain([&instance.down]);
        all.cloned().collect()
    };
    let wanted = of(&instances[0]);
    for instance in instances {
        let all = of(instance);
        for (product, like) in all.iter().zip(&wanted) {
            let count = product.stacked().unwrap_or(1);
            let expected = if instances.len() == 1 { experts } else { 1 };
            if count != expected {
                return Err(format!(
                    "its weights are of {count} experts, and it chooses from {experts}"
                ));
            }
            let alike = product.weight.constant.shape() == like.weight.constant.shape()
                && product.weight.constant.dtype() == like.weight.constant.dtype()
                && product.bias.is_some() == like.bias.is_some();
            if !alike || all.len() != wanted.len() {
                return Err("its experts have different sizes".to_string());
            }
        }
    }
    Ok(())
}

/// The tokens and experts of the input rows of a product.
fn rows_into(trial: &mut Trial<'_>, product: &Product, tokens: &[&[f64]]) -> Result<Rows, String> {
    let x = trial
        .value(product.x)
        .ok_or("what enters its experts depends on more than tokens and logits")?;
    let depth = product.depth();
    let shape = x.shape();
    let along = if product.from_right {
        shape.len().checked_sub(2)
    } else {
        shape.len().checked_sub(1)
    };
    let fits = along.is_some_and(|axis| shape[axis] == depth && shape[axis + 1..].iter().all(|d| *d == 1));
    if !fits || depth == 0 {
        return Err(format!("what enters its experts has the shape {shape:?}"));
    }
    let values = x.to_f64();
    let mut known: HashMap<Vec<u64>, usize> = HashMap::new();
    let bits = |row: &[f64]| -> Vec<u64> { row.iter().map(|v| v.to_bits()).collect() };
    for (token, row) in tokens.iter().enumerate() {
        known.insert(bits(row), token);
    }
    let of_token = |row: &[f64]| known.get(&bits(row)).copied();
    let rows = values.chunks_exact(depth).map(of_token).collect::<Option<Vec<usize>>>();
    let rows = rows.ok_or("what enters its experts is not the rows of its tokens")?;
    let Some(experts) = product.stacked() else {
        return Ok(rows.into_iter().map(|token| (token, None)).collect());
    };
    match product.weight.index {
        Some(index) => {
            let index = trial
                .value(index)
                .ok_or("the choice of its matrices depends on more than logits")?
                .to_i64();
            let in_range = index.iter().all(|i| (0..experts as i64).contains(i));
            if index.len() != rows.len() || !in_range {
                return Err("it does not take one matrix for each row".to_string());
            }
            let pairs = rows.into_iter().zip(index);
            Ok(pairs.map(|(token, expert)| (token, Some(expert as usize))).collect())
        }
        None => {
            // The rows of all experts in order, or the same rows for all.
            let each = match rows.len() {
                n if shape.len() == 3 && shape[0] == experts => n / experts,
                n => n,
            };
            let all = (0..experts).flat_map(|expert| (0..each).map(move |row| (expert, row)));
            let of = |(expert, row): (usize, usize)| {
                let at = if rows.len() == each { row } else { expert * each + row };
                (rows[at], Some(expert))
            };
            Ok(all.map(of).collect())
        }
    }
}

/// A substitute for the result of a product of this many rows.
fn bind_result(
    [trial, bound]: [&mut Trial<'_>; 2],
    random: &mut Random,
    product: &Product,
    rows: usize,
    scale: f64,
) -> Result<(), String> {
    let x = trial
        .value(product.x)
        .ok_or("what enters its experts cannot be computed")?;
    let (columns, mut shape) = (product.columns(), x.shape().to_vec());
    let rank = shape.len();
    let along = if product.from_right { rank - 2 } else { rank - 1 };
    shape[along] = columns;
    if let (Some(experts), None) = (product.stacked(), product.weight.index) {
        // Leading axes broadcast with the experts' axis.
        match rank {
            2 => shape.insert(0, experts),
            _ => shape[rank - 3] = experts,
        }
    }
    if let Some(index) = product.weight.index {
        let index = trial
            .value(index)
            .ok_or("the choice of its matrices cannot be computed")?;
        if rank < 3 || shape[..rank - 2].iter().product::<usize>() != index.len() {
            return Err("it does not take one matrix for each row".to_string());
        }
    }
    if shape.iter().product::<usize>() != rows * columns {
        return Err("the rows of its products are not those of its tokens".to_string());
    }
    let tensor = random.tensor(x.dtype(), shape, scale);
    bound.bind(product.result, tensor.clone());
    trial.bind(product.result, tensor);
    Ok(())
}

/// Checks that the addend of a product's result is the bias of each row's expert.
fn check_bias(trial: &mut Trial<'_>, product: &Product, rows: &Rows, tolerance: f64) -> Result<(), String> {
    let Some(bias) = product.bias.as_ref().filter(|_| product.end != product.result) else {
        return Ok(());
    };
    let unknown = || "the bias of a product cannot be computed".to_string();
    let before = trial.value(product.result).ok_or_else(unknown)?.to_f64();
    let after = trial.value(product.end).ok_or_else(unknown)?.to_f64();
    let columns = product.columns();
    let numbers = bias.constant.materialize().map_err(|error| error.to_string())?.to_f64();
    let each = product.stacked().unwrap_or(1) * columns;
    if numbers.len() != each || after.len() != before.len() || before.len() != rows.len() * columns {
        return Err("what is added to a product is not one number for each output of an expert".to_string());
    }
    for (row, (_, expert)) in rows.iter().enumerate() {
        let of = &numbers[expert.unwrap_or(0) * columns..][..columns];
        let wanted: Vec<f64> = (0..columns).map(|c| before[row * columns + c] + of[c]).collect();
        if !agree(&after[row * columns..][..columns], &wanted, tolerance) {
            return Err("what is added to a product is not the bias of the row's expert".to_string());
        }
    }
    Ok(())
}

/// The nodes between the first products of an instance and the second.
fn activation_cone(flow: &Flow<'_>, instance: &Instance) -> Vec<NodeId> {
    let ends: Vec<ValueId> = instance.first.iter().map(|product| product.end).collect();
    flow.cone(instance.down.x, &ends)
}
