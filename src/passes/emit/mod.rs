//! Writes the recognized attention as canonical operators, and sets the graph's canonical [`Interface`].
//!
//! Input: an [`Analysis`] without obstacles. Each attention becomes `TensorScatter` on two caches and `Attention`,
//! after the picks and rotations of its projections; masks are written once per window. Nothing reads the export's own
//! masks, caches and positions afterwards, and they are removed. [`rows`] writes picks and rotations.

mod rows;

use std::collections::HashMap;

use super::attention::rounding::{CacheRounding, RowRounding};
use super::attention::{Analysis, AttentionLayer, Obstacle};
use super::contract;
use super::reshapes::reshape_to;
use super::roles::{InputRole, Roles};
use crate::dim::{Dim, Sym};
use crate::graph::op::{BiasedAttention, Binary, Op, RoundedAttention};
use crate::graph::{Constant, EMBEDDING_TABLE, Graph, Shape, ValueId};
use crate::interface::{CacheId, CachePart, Interface, Port, Role};
use crate::tensor::{DType, Tensor};

struct Emitter<'g> {
    graph: &'g mut Graph,
    token_input: ValueId,
    position_ids: ValueId,
    write_indices: ValueId,
    /// Set if tables depend on the length of the run.
    total_lengths: Option<ValueId>,
    /// Rows of such tables: all switch at one length.
    table_rows: Option<ValueId>,
    batch: Dim,
    tokens: Dim,
    /// Masks by window.
    masks: HashMap<Option<usize>, ValueId>,
    /// `[capacity]`: the slot numbers, and `[batch, 1, tokens, 1]`: the positions.
    counters: Option<(ValueId, ValueId)>,
    /// Cosine and sine by table and dtype.
    tables: HashMap<(usize, DType), (ValueId, ValueId)>,
    /// Constant tables, by the cosines with the same shape and dtype and by the number's name.
    filled: HashMap<(ValueId, &'static str), ValueId>,
    /// Slopes and sinks by value.
    of_heads: HashMap<(&'static str, String), ValueId>,
    /// See [`Emitter::is_older`].
    older: Option<ValueId>,
    /// New caches by the export's: input, and output once written.
    caches: HashMap<ValueId, (ValueId, Option<ValueId>)>,
    /// The first of the new caches, for the capacity.
    first_cache: Option<ValueId>,
}

/// Rewrites the graph and sets its [`Graph::interface`]. Fails if rows or an output have a shape that no reshape can
/// produce.
pub fn run(graph: &mut Graph, roles: &Roles, analysis: &Analysis) -> Result<(), Vec<Obstacle>> {
    let logits = analysis.logits.expect("an analysis without obstacles has found them");
    // The canonical order: pairs in the order of the attention layers.
    let mut pairs: Vec<[ValueId; 2]> = Vec::new();
    for layer in &analysis.layers {
        if !pairs.contains(&[layer.key_cache, layer.value_cache]) {
            pairs.push([layer.key_cache, layer.value_cache]);
        }
    }
    let ids = (0..pairs.len()).flat_map(|layer| CachePart::ALL.map(|part| CacheId { layer, part }));
    let old_caches: Vec<(CacheId, ValueId)> = ids.zip(pairs.into_iter().flatten()).collect();
    let token_role = match roles.of.get(&roles.token_input) {
        Some(InputRole::Embeddings) => Role::Embeddings,
        _ => Role::TokenIds,
    };
    free_names(graph, &old_caches, (token_role, roles.token_input), logits);

    let batch = roles.batch.map_or_else(|| Dim::sym(Sym::batch()), Dim::from);
    let tokens = Dim::sym(Sym::tokens());
    let old_inputs = std::mem::take(&mut graph.inputs);
    debug_assert!(old_inputs.contains(&roles.token_input));
    let row = vec![batch.clone(), tokens.clone()];
    let token_input = token_input(graph, roles.token_input, token_role, row.clone());
    let position_ids = graph.add_input(&Role::PositionIds.name(), DType::I64, row);
    let write_indices = graph.add_input(&Role::WriteIndices.name(), DType::I64, vec![batch.clone()]);
    let mut inputs = vec![
        (token_role, token_input),
        (Role::PositionIds, position_ids),
        (Role::WriteIndices, write_indices),
    ];
    let total_lengths = analysis
        .tables
        .longest_short_run()
        .map(|_| graph.add_input(&Role::TotalLengths.name(), DType::I64, vec![batch.clone()]));
    inputs.extend(total_lengths.map(|id| (Role::TotalLengths, id)));
    let first_cache = inputs.len();
    let mut caches = HashMap::new();
    for (id, old) in &old_caches {
        let cache = &analysis.caches[old];
        let shape = vec![
            batch.clone(),
            Dim::from(cache.heads),
            Dim::sym(Sym::capacity()),
            Dim::from(cache.dim),
        ];
        let dtype = graph.value(*old).dtype.unwrap_or(DType::F32);
        let new = graph.add_input(&Role::Cache(*id).name(), dtype, shape);
        caches.insert(*old, (new, None));
        inputs.push((Role::Cache(*id), new));
    }
    let mut emitter = Emitter {
        graph,
        token_input,
        position_ids,
        write_indices,
        batch,
        tokens,
        masks: HashMap::new(),
        counters: None,
        tables: HashMap::new(),
        filled: HashMap::new(),
        of_heads: HashMap::new(),
        older: None,
        total_lengths,
        table_rows: None,
        first_cache: inputs.get(first_cache).map(|(_, id)| *id),
        caches,
    };
    let mut obstacles = Vec::new();
    for (index, (value, projection)) in analysis.rotated.iter().enumerate() {
        // Unchanged if no rows can be written.
        let (name, dtype) = (format!("rotated.{index}"), emitter.graph.value(*value).dtype);
        let dtype = dtype.unwrap_or(DType::F32);
        if let Ok(rows) = emitter.rows(projection, &RowRounding::default(), &name, dtype, analysis) {
            emitter.graph.replace_uses(*value, rows);
        }
    }
    for (index, layer) in analysis.layers.iter().enumerate() {
        if let Err(reason) = emitter.layer(index, layer, analysis) {
            obstacles.push(Obstacle {
                layer: Some(index),
                at: layer.found.name.clone(),
                reason,
            });
        }
    }
    if !obstacles.is_empty() {
        return Err(obstacles);
    }
    let caches = emitter.caches;
    let mut outputs = vec![(Role::Logits, logits)];
    for (id, old) in &old_caches {
        let (_, updated) = caches[old];
        let updated = updated.expect("every cache in a layer was written");
        let role = Role::UpdatedCache(*id);
        graph.rename(updated, &role.name());
        outputs.push((role, updated));
    }
    if graph.value(logits).name != Role::Logits.name() {
        graph.rename(logits, &Role::Logits.name());
    }
    graph.outputs = outputs.iter().map(|(_, id)| *id).collect();
    let ports = |ports: Vec<(Role, ValueId)>| ports.into_iter().map(|(role, id)| Port { role, id }).collect();
    let interface = Interface::new(ports(inputs), ports(outputs), |cache, id| graph.cache_shape(cache, id));
    graph.interface = Some(interface.map_err(contract::interface_obstacles)?);
    Ok(())
}

/// Renames values of the export that have canonical names.
fn free_names(graph: &mut Graph, caches: &[(CacheId, ValueId)], tokens: (Role, ValueId), logits: ValueId) {
    let mut roles = vec![
        Role::TokenIds,
        Role::Embeddings,
        Role::PositionIds,
        Role::WriteIndices,
        Role::TotalLengths,
        Role::Logits,
    ];
    roles.extend(
        caches
            .iter()
            .flat_map(|(id, _)| [Role::Cache(*id), Role::UpdatedCache(*id)]),
    );
    if let Some(id) = graph.find(EMBEDDING_TABLE) {
        let free = graph.fresh_name(&format!("export.{EMBEDDING_TABLE}"));
        graph.rename(id, &free);
    }
    let mut names: Vec<(String, Role)> = roles.into_iter().map(|role| (role.name(), role)).collect();
    names.sort_unstable();
    for (name, role) in names {
        let Some(id) = graph.find(&name) else { continue };
        if (role, id) == tokens || (id == logits && role == Role::Logits) {
            continue;
        }
        let free = graph.fresh_name(&format!("export.{name}"));
        graph.rename(id, &free);
    }
}

/// The token ids as i64, whatever the export's type; embeddings unchanged.
fn token_input(graph: &mut Graph, old: ValueId, role: Role, shape: Shape) -> ValueId {
    let name = role.name();
    if role == Role::Embeddings || graph.value(old).dtype == Some(DType::I64) {
        if graph.value(old).name != name {
            graph.rename(old, &name);
        }
        graph.inputs.push(old);
        return old;
    }
    let dtype = graph.value(old).dtype.unwrap_or(DType::I32);
    if graph.value(old).name == name {
        let free = graph.fresh_name(&format!("export.{name}"));
        graph.rename(old, &free);
    }
    let new = graph.add_input(&name, DType::I64, shape);
    let narrow = graph.add_node(&format!("{name}.cast"), Op::Cast { to: dtype }, &[new]);
    let old_shape = graph.shape(old).cloned();
    let value = graph.value_mut(narrow);
    (value.dtype, value.shape) = (Some(dtype), old_shape);
    graph.replace_uses(old, narrow);
    new
}

impl Emitter<'_> {
    fn typed(&mut self, name: &str, op: Op, inputs: &[ValueId], dtype: DType, shape: Shape) -> ValueId {
        let id = self.graph.add_node(name, op, inputs);
        let value = self.graph.value_mut(id);
        (value.dtype, value.shape) = (Some(dtype), Some(shape));
        id
    }

    fn cast(&mut self, x: ValueId, to: DType, name: &str) -> ValueId {
        if self.graph.value(x).dtype == Some(to) {
            return x;
        }
        let shape = self.graph.shape(x).cloned().unwrap_or_default();
        self.typed(&format!("{name}.cast"), Op::Cast { to }, &[x], to, shape)
    }

    fn layer(&mut self, index: usize, layer: &AttentionLayer, analysis: &Analysis) -> Result<(), String> {
        let name = format!("layers.{index}.attention");
        let mut written = [None; 2];
        for (slot, (old, part)) in [(layer.key_cache, "key"), (layer.value_cache, "value")]
            .into_iter()
            .enumerate()
        {
            written[slot] = Some(self.write(old, &format!("{name}.{part}"), analysis)?);
        }
        let [Some(key), Some(value)] = written else {
            unreachable!()
        };
        let dtype = self.graph.value(key).dtype.unwrap_or(DType::F32);
        let rounding = &layer.rounding;
        let query = self.rows(&layer.query, &rounding.query, &format!("{name}.query"), dtype, analysis)?;
        let key = self.read(key, &rounding.key, &format!("{name}.key.read"));
        let value = self.read(value, &rounding.value, &format!("{name}.value.read"));
        let mask = self.mask(layer.scores.window);
        let half = dtype.is_half();
        let inside = [rounding.scores, rounding.capped, rounding.probabilities];
        let mut inputs = vec![query, key, value, mask];
        let biased = layer.slopes.iter().any(|slope| *slope != 0.0) || layer.found.sinks.is_some();
        let op = match inside {
            _ if biased => {
                if inside.iter().any(Option::is_some) {
                    return Err(
                        "it rounds its scores or probabilities to codes and has slopes (ALiBi) or sinks: \
                                only one of these is supported; with --activations float it is not rounded"
                            .into(),
                    );
                }
                inputs.extend(self.slopes_and_sinks(layer, &name)?);
                Op::BiasedAttention(BiasedAttention {
                    scale: layer.scores.scale,
                    softcap: layer.scores.softcap.unwrap_or(0.0),
                })
            }
            [None, None, None] => Op::Attention(layer.scores.operator(half.then_some(DType::F32))),
            [scores, capped, probabilities] => Op::RoundedAttention(RoundedAttention {
                scale: layer.scores.scale,
                softcap: layer.scores.softcap.unwrap_or(0.0),
                scores,
                capped,
                probabilities,
            }),
        };
        let width = analysis.caches[&layer.value_cache].dim;
        let shape = vec![
            self.batch.clone(),
            Dim::from(layer.query.heads),
            self.tokens.clone(),
            Dim::from(width),
        ];
        let attended = self.typed(&name, op, &inputs, dtype, shape);
        let old = layer.found.output;
        let to = self.graph.value(old).clone();
        let attended = self.cast(attended, to.dtype.unwrap_or(dtype), &name);
        let target = to
            .shape
            .ok_or_else(|| format!("the shape of {} is not known", to.name))?;
        let reshaped = reshape_to(
            self.graph,
            self.token_input,
            attended,
            &target,
            &format!("{name}.output"),
        )
        .ok_or_else(|| format!("no reshape gives {} its shape {target:?}", to.name))?;
        self.graph.replace_uses(old, reshaped);
        Ok(())
    }

    /// Both f32 `[heads]`, with neutral numbers if a layer has none.
    fn slopes_and_sinks(&mut self, layer: &AttentionLayer, name: &str) -> Result<[ValueId; 2], String> {
        let heads = layer.query.heads;
        let filled = |value: f32| Constant::tensor(Tensor::from_f32(vec![heads], &vec![value; heads]));
        let slopes = match layer.slopes.len() == heads {
            true => Constant::tensor(Tensor::from_f32(vec![heads], &layer.slopes)),
            false => filled(0.0),
        };
        let sinks = match layer.found.sinks {
            None => filled(f32::NEG_INFINITY),
            Some(id) => {
                let sinks = self.graph.constant(id).filter(|sinks| sinks.len() == heads);
                let sinks = sinks.ok_or_else(|| format!("its sinks are not {heads} numbers, one for each head"))?;
                sinks.reshaped(vec![heads]).cast(DType::F32)
            }
        };
        let keys = [format!("{:?}", layer.slopes), format!("{:?}", layer.found.sinks)];
        let [of_slopes, of_sinks] = keys;
        let both = [("slopes", of_slopes, slopes), ("sinks", of_sinks, sinks)];
        Ok(both.map(|(part, key, constant)| {
            let key = (part, key);
            if let Some(known) = self.of_heads.get(&key) {
                return *known;
            }
            let id = self.graph.add_constant(&format!("{name}.{part}"), constant);
            self.of_heads.insert(key, id);
            id
        }))
    }

    /// The cache with this call's rows.
    fn write(&mut self, old: ValueId, name: &str, analysis: &Analysis) -> Result<ValueId, String> {
        let (input, written) = self.caches[&old];
        if let Some(written) = written {
            return Ok(written);
        }
        let value = self.graph.value(input);
        let (dtype, shape) = (
            value.dtype.unwrap_or(DType::F32),
            value.shape.clone().unwrap_or_default(),
        );
        let cache = &analysis.caches[&old];
        let rows = self.rows(&cache.rows, &cache.rounding, name, dtype, analysis)?;
        let op = Op::TensorScatter {
            axis: 2,
            circular: false,
        };
        let inputs = [input, rows, self.write_indices];
        let updated = self.typed(&format!("{name}.cache"), op, &inputs, dtype, shape);
        self.caches.insert(old, (input, Some(updated)));
        Ok(updated)
    }

    /// A cache as it is read, with its roundings.
    fn read(&mut self, cache: ValueId, how: &CacheRounding, name: &str) -> ValueId {
        let new = self.rounded(cache, &how.new, name);
        let Some(older) = &how.older else { return new };
        let older = self.rounded(cache, older, &format!("{name}.older"));
        let is_older = self.is_older();
        let (dtype, shape) = self.type_of(cache);
        self.typed(name, Op::Where, &[is_older, older, new], dtype, shape)
    }

    /// `[batch, 1, capacity, 1]`, true where a slot was written by an earlier call.
    fn is_older(&mut self) -> ValueId {
        if let Some(known) = self.older {
            return known;
        }
        let (slots, positions) = self.counters();
        let (unit, capacity) = (Dim::from(1usize), Dim::sym(Sym::capacity()));
        let ints = [0, 1, 2].map(|value| self.graph.add_i64("older.slice", &[value]));
        let first = [self.batch.clone(), unit.clone(), unit.clone(), unit.clone()].to_vec();
        let inputs = [positions, ints[0], ints[1], ints[2]];
        let first = self.typed("older.first", Op::Slice, &inputs, DType::I64, first);
        let axes = self.graph.add_i64("older.axes", &[1]);
        let column = vec![capacity.clone(), unit.clone()];
        let slots = self.typed("older.slots", Op::Unsqueeze, &[slots, axes], DType::I64, column);
        let op = Op::Binary(Binary::Less);
        let shape = vec![self.batch.clone(), unit.clone(), capacity, unit];
        let older = self.typed("older", op, &[slots, first], DType::Bool, shape);
        *self.older.insert(older)
    }

    /// `[batch, 1, tokens, capacity]`, true where a token attends to a slot.
    fn mask(&mut self, window: Option<usize>) -> ValueId {
        if let Some(mask) = self.masks.get(&window) {
            return *mask;
        }
        let (slots, positions) = self.counters();
        let capacity = Dim::sym(Sym::capacity());
        let shape = vec![self.batch.clone(), Dim::from(1usize), self.tokens.clone(), capacity];
        let mask = match window {
            None => {
                let op = Op::Binary(Binary::LessOrEqual);
                self.typed("mask.causal", op, &[slots, positions], DType::Bool, shape)
            }
            Some(window) => {
                let causal = self.mask(None);
                let column = self.graph.shape(positions).cloned().unwrap_or_default();
                let width = Tensor::from_i64(vec![], &[window as i64]);
                let width = self.graph.add_constant(&format!("mask.window.{window}"), width);
                let sub = Op::Binary(Binary::Sub);
                let before = self.typed(
                    &format!("mask.before.{window}"),
                    sub,
                    &[positions, width],
                    DType::I64,
                    column,
                );
                let op = Op::Binary(Binary::Greater);
                let name = format!("mask.recent.{window}");
                let recent = self.typed(&name, op, &[slots, before], DType::Bool, shape.clone());
                let and = Op::Binary(Binary::And);
                self.typed(
                    &format!("mask.causal.{window}"),
                    and,
                    &[causal, recent],
                    DType::Bool,
                    shape,
                )
            }
        };
        self.masks.insert(window, mask);
        mask
    }

    fn counters(&mut self) -> (ValueId, ValueId) {
        if let Some(counters) = self.counters {
            return counters;
        }
        let cache = self.first_cache.expect("an analysis without obstacles has a cache");
        let capacity = Dim::sym(Sym::capacity());
        let op = Op::Shape { start: 2, end: Some(3) };
        let size = self.typed("mask.capacity", op, &[cache], DType::I64, vec![Dim::from(1usize)]);
        let axis = self.graph.add_i64("mask.axis", &[0]);
        let size = self.typed("mask.size", Op::Squeeze, &[size, axis], DType::I64, vec![]);
        let mut scalar = |name: &str, value: i64| self.graph.add_constant(name, Tensor::from_i64(vec![], &[value]));
        let (zero, one) = (scalar("mask.zero", 0), scalar("mask.one", 1));
        let slots = self.typed("mask.slots", Op::Range, &[zero, size, one], DType::I64, vec![capacity]);
        let axes = self.graph.add_i64("mask.axes", &[1, 3]);
        let unit = Dim::from(1usize);
        let column = vec![self.batch.clone(), unit.clone(), self.tokens.clone(), unit];
        let ids = self.position_ids;
        let positions = self.typed("mask.positions", Op::Unsqueeze, &[ids, axes], DType::I64, column);
        *self.counters.insert((slots, positions))
    }
}
