//! Writes the recognised attention as canonical operators, and gives the graph its canonical [`Interface`].
//!
//! Takes an [`Analysis`] without obstacles. Each attention becomes `TensorScatter` on two caches and `Attention`, after
//! the picks and rotations of its projections; masks are written once per window. The export's own masks, caches and
//! positions are then read by nothing and fall away.

use std::collections::HashMap;
use std::ops::Range;

use super::attention::layout::TokenLayout;
use super::attention::projection::Projection;
use super::attention::rope::Rope;
use super::attention::rounding::{CacheRounding, RotationRounding, RowRounding};
use super::attention::{Analysis, AttentionLayer, Obstacle};
use super::contract;
use super::reshapes::reshape_to;
use super::roles::Roles;
use crate::dim::{Dim, Sym};
use crate::graph::op::{Binary, Op, RoundedAttention, Rounding};
use crate::graph::{Constant, Graph, Shape, ValueId};
use crate::interface::{CacheId, CachePart, Interface, Port, Role};
use crate::tensor::{DType, Tensor};

struct Emitter<'g> {
    graph: &'g mut Graph,
    token_ids: ValueId,
    position_ids: ValueId,
    write_indices: ValueId,
    batch: Dim,
    tokens: Dim,
    /// Masks by window.
    masks: HashMap<Option<usize>, ValueId>,
    /// `[capacity]`: the slot numbers, and `[batch, 1, tokens, 1]`: the positions.
    counters: Option<(ValueId, ValueId)>,
    /// Cosine and sine by table and dtype.
    tables: HashMap<(usize, DType), (ValueId, ValueId)>,
    /// Tables of one number, by the cosines whose shape and dtype they have and the number's name.
    filled: HashMap<(ValueId, &'static str), ValueId>,
    /// See [`Emitter::is_older`].
    older: Option<ValueId>,
    /// New caches by the export's: input, and output once written.
    caches: HashMap<ValueId, (ValueId, Option<ValueId>)>,
    /// The first of the new caches, which shows the capacity.
    first_cache: Option<ValueId>,
}

/// What a part of a rotation has in place of a table.
#[derive(Clone, Copy)]
enum Part {
    /// The table of its own.
    Table,
    /// The table of sines.
    Sine,
    Zero,
    One,
}

/// Rewrites the graph and sets its [`Graph::interface`]. Fails where rows or an output have a shape that no reshape can
/// give.
pub fn run(graph: &mut Graph, roles: &Roles, analysis: &Analysis) -> Result<(), Vec<Obstacle>> {
    let logits = graph
        .outputs
        .iter()
        .copied()
        .find(|o| !analysis.caches.values().any(|c| c.output == *o))
        .expect("the analysis found one output besides the caches");
    // The canonical order: pairs as the attentions come.
    let mut pairs: Vec<[ValueId; 2]> = Vec::new();
    for layer in &analysis.layers {
        if !pairs.contains(&[layer.key_cache, layer.value_cache]) {
            pairs.push([layer.key_cache, layer.value_cache]);
        }
    }
    let ids = (0..pairs.len()).flat_map(|layer| CachePart::ALL.map(|part| CacheId { layer, part }));
    let old_caches: Vec<(CacheId, ValueId)> = ids.zip(pairs.into_iter().flatten()).collect();
    free_names(graph, &old_caches, roles.input_ids, logits);

    let batch = roles.batch.map_or_else(|| Dim::sym(Sym::batch()), Dim::from);
    let tokens = Dim::sym(Sym::tokens());
    let old_inputs = std::mem::take(&mut graph.inputs);
    debug_assert!(old_inputs.contains(&roles.input_ids));
    let row = vec![batch.clone(), tokens.clone()];
    let token_ids = token_input(graph, roles.input_ids, row.clone());
    let position_ids = graph.add_input(&Role::PositionIds.name(), DType::I64, row);
    let write_indices = graph.add_input(&Role::WriteIndices.name(), DType::I64, vec![batch.clone()]);
    let mut inputs = vec![
        (Role::TokenIds, token_ids),
        (Role::PositionIds, position_ids),
        (Role::WriteIndices, write_indices),
    ];
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
        token_ids,
        position_ids,
        write_indices,
        batch,
        tokens,
        masks: HashMap::new(),
        counters: None,
        tables: HashMap::new(),
        filled: HashMap::new(),
        older: None,
        first_cache: inputs.get(3).map(|(_, id)| *id),
        caches,
    };
    let mut obstacles = Vec::new();
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

/// Moves values of the export that have canonical names out of the way.
fn free_names(graph: &mut Graph, caches: &[(CacheId, ValueId)], input_ids: ValueId, logits: ValueId) {
    let mut roles = vec![Role::TokenIds, Role::PositionIds, Role::WriteIndices, Role::Logits];
    roles.extend(
        caches
            .iter()
            .flat_map(|(id, _)| [Role::Cache(*id), Role::UpdatedCache(*id)]),
    );
    let mut names: Vec<(String, Role)> = roles.into_iter().map(|role| (role.name(), role)).collect();
    names.sort_unstable();
    for (name, role) in names {
        let Some(id) = graph.find(&name) else { continue };
        if (id == input_ids && role == Role::TokenIds) || (id == logits && role == Role::Logits) {
            continue;
        }
        let free = graph.fresh_name(&format!("export.{name}"));
        graph.rename(id, &free);
    }
}

/// The token ids as i64, whatever the export takes.
fn token_input(graph: &mut Graph, old: ValueId, shape: Shape) -> ValueId {
    let name = Role::TokenIds.name();
    if graph.value(old).dtype == Some(DType::I64) {
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
        let op = match inside {
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
        let attended = self.typed(&name, op, &[query, key, value, mask], dtype, shape);
        let old = layer.found.output;
        let to = self.graph.value(old).clone();
        let attended = self.cast(attended, to.dtype.unwrap_or(dtype), &name);
        let target = to
            .shape
            .ok_or_else(|| format!("the shape of {} is not known", to.name))?;
        let reshaped = reshape_to(self.graph, self.token_ids, attended, &target, &format!("{name}.output"))
            .ok_or_else(|| format!("no reshape gives {} its shape {target:?}", to.name))?;
        self.graph.replace_uses(old, reshaped);
        Ok(())
    }

    /// The cache with this call's rows in it.
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

    /// Every element rounded, in this order.
    fn rounded(&mut self, mut x: ValueId, roundings: &[Rounding], name: &str) -> ValueId {
        for rounding in roundings {
            let (dtype, shape) = self.type_of(x);
            x = self.typed(&format!("{name}.rounded"), rounding.operator(), &[x], dtype, shape);
        }
        x
    }

    /// A cache as it is read.
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

    /// `[batch, heads, tokens, head_dim]`.
    fn rows(
        &mut self,
        p: &Projection,
        rounding: &RowRounding,
        name: &str,
        dtype: DType,
        analysis: &Analysis,
    ) -> Result<ValueId, String> {
        let mut x = self.pick(p, name)?;
        x = self.cast(x, dtype, name);
        x = self.rounded(x, &rounding.before, &format!("{name}.picked"));
        let shape = self.graph.shape(x).cloned().unwrap_or_default();
        if p.scale != 1.0 {
            let factor = Tensor::from_f64_as(dtype, vec![], &[f64::from(p.scale)]);
            let factor = self.graph.add_constant(&format!("{name}.scale"), factor);
            x = self.typed(
                &format!("{name}.scaled"),
                Op::Binary(Binary::Mul),
                &[x, factor],
                dtype,
                shape.clone(),
            );
        }
        if let Some(rope) = &p.rope {
            x = match &rounding.rotation {
                None => self.rotated(
                    x,
                    p,
                    rope,
                    [Part::Table, Part::Table],
                    &format!("{name}.rotary"),
                    analysis,
                ),
                Some(inside) => self.rotated_in_parts(x, p, rope, inside, name, analysis),
            };
        }
        Ok(self.rounded(x, &rounding.after, name))
    }

    fn rotated(
        &mut self,
        x: ValueId,
        p: &Projection,
        rope: &Rope,
        [cos, sin]: [Part; 2],
        name: &str,
        analysis: &Analysis,
    ) -> ValueId {
        let (dtype, shape) = self.type_of(x);
        let table = self.table(rope.table, dtype, analysis);
        let cos = self.part(cos, table, table.0);
        let sin = self.part(sin, table, table.1);
        let op = Op::RotaryEmbedding {
            interleaved: rope.interleaved,
            num_heads: None,
            rotary_dim: if rope.rotary_dim == p.dim { 0 } else { rope.rotary_dim },
        };
        self.typed(name, op, &[x, cos, sin, self.position_ids], dtype, shape)
    }

    /// The sum of two rotations, of which one has cosines alone and one sines alone: their results are rounded. Elements that
    /// are not rotated come behind.
    fn rotated_in_parts(
        &mut self,
        x: ValueId,
        p: &Projection,
        rope: &Rope,
        inside: &RotationRounding,
        name: &str,
        analysis: &Analysis,
    ) -> ValueId {
        let part = |part: &str| format!("{name}.rotary.{part}");
        let (whole, mut x) = (x, x);
        if rope.rotary_dim < p.dim {
            x = self.columns(x, 0..rope.rotary_dim, &part("first"));
            x = self.rounded(x, &inside.first, &part("first"));
        }
        let (width, p) = (
            p.dim,
            &Projection {
                dim: rope.rotary_dim,
                ..p.clone()
            },
        );
        let turned_of = self.rounded(x, &inside.apart[1], &part("sin.first"));
        x = self.rounded(x, &inside.apart[0], &part("cos.first"));
        let cos = self.rotated(x, p, rope, [Part::Table, Part::Zero], &part("cos"), analysis);
        let cos = self.rounded(cos, &inside.cos, &part("cos"));
        let halves = inside.halves.iter().any(|half| !half.is_empty());
        let sin = if inside.turned.is_empty() && !halves {
            self.rotated(turned_of, p, rope, [Part::Zero, Part::Table], &part("sin"), analysis)
        } else {
            let mut turned = self.rotated(turned_of, p, rope, [Part::Zero, Part::One], &part("turned"), analysis);
            if halves {
                let middle = rope.rotary_dim / 2;
                let ends = [0..middle, middle..rope.rotary_dim];
                let halves = [0, 1].map(|i| {
                    let name = part(&format!("half.{i}"));
                    let half = self.columns(turned, ends[i].clone(), &name);
                    self.rounded(half, &inside.halves[i], &name)
                });
                turned = self.joined(halves, &part("halves"));
            }
            let turned = self.rounded(turned, &inside.turned, &part("turned"));
            self.rotated(turned, p, rope, [Part::Sine, Part::Zero], &part("sin"), analysis)
        };
        let sin = self.rounded(sin, &inside.sin, &part("sin"));
        let (dtype, shape) = self.type_of(x);
        let add = Op::Binary(Binary::Add);
        let sum = self.typed(&format!("{name}.rotary"), add, &[cos, sin], dtype, shape);
        if rope.rotary_dim == width {
            return sum;
        }
        let sum = self.rounded(sum, &inside.rotated, &part("sum"));
        let passed = self.columns(whole, rope.rotary_dim..width, &part("passed"));
        let passed = self.rounded(passed, &inside.passed, &part("passed"));
        self.joined([sum, passed], &part("joined"))
    }

    fn type_of(&self, x: ValueId) -> (DType, Shape) {
        let value = self.graph.value(x);
        (
            value.dtype.unwrap_or(DType::F32),
            value.shape.clone().unwrap_or_default(),
        )
    }

    /// Elements of the last of four axes.
    fn columns(&mut self, x: ValueId, columns: Range<usize>, name: &str) -> ValueId {
        let (dtype, mut shape) = self.type_of(x);
        let mut ints = |value: usize| self.graph.add_i64(&format!("{name}.slice"), &[value as i64]);
        let operands = [ints(columns.start), ints(columns.end), ints(3)];
        shape.pop();
        shape.push(Dim::from(columns.len()));
        let inputs = [x, operands[0], operands[1], operands[2]];
        self.typed(name, Op::Slice, &inputs, dtype, shape)
    }

    /// One after the other on the last of four axes.
    fn joined(&mut self, parts: [ValueId; 2], name: &str) -> ValueId {
        let (dtype, mut shape) = self.type_of(parts[0]);
        let (_, other) = self.type_of(parts[1]);
        if let (Some(a), Some(b)) = (shape.pop(), other.last()) {
            shape.push(&a + b);
        }
        self.typed(name, Op::Concat { axis: 3 }, &parts, dtype, shape)
    }

    /// A table of a part of a rotation.
    fn part(&mut self, part: Part, (cos, sin): (ValueId, ValueId), own: ValueId) -> ValueId {
        let (name, number) = match part {
            Part::Table => return own,
            Part::Sine => return sin,
            Part::Zero => ("zero", 0.0),
            Part::One => ("one", 1.0),
        };
        if let Some(known) = self.filled.get(&(cos, name)) {
            return *known;
        }
        let table = self.graph.constant(cos).expect("tables are constants");
        let (shape, dtype) = (table.shape().to_vec(), table.dtype());
        let filled = Tensor::from_f64_as(dtype, shape.clone(), &vec![number; shape.iter().product()]);
        let id = self.graph.add_constant(&format!("rotary.{name}"), filled);
        self.filled.insert((cos, name), id);
        id
    }

    /// The heads among the columns of a projection.
    fn pick(&mut self, p: &Projection, name: &str) -> Result<ValueId, String> {
        let source = self.graph.value(p.source).clone();
        let (dtype, shape) = (
            source.dtype.unwrap_or(DType::F32),
            source.shape.clone().unwrap_or_default(),
        );
        let fixed = |d: &Dim| d.as_const().map(|n| n as usize);
        let (batch, tokens) = (self.batch.clone(), self.tokens.clone());
        let columns = p.pick.groups * p.pick.stride;
        let whole = p.pick.groups == 1 && columns == p.heads * p.dim;
        let layout = TokenLayout::find(&shape, fixed(&batch));
        let layout = layout.ok_or_else(|| format!("{} has the shape {shape:?}", source.name))?;
        let heads: Shape = vec![batch.clone(), Dim::from(p.heads), tokens.clone(), Dim::from(p.dim)];
        let rows: Shape = vec![batch.clone(), tokens.clone(), Dim::from(p.heads), Dim::from(p.dim)];
        if whole && layout.is_canonical(shape.len()) && shape == heads {
            return Ok(p.source);
        }
        let mut x = p.source;
        if layout.is_canonical(shape.len()) {
            let perm = Some(vec![0, 2, 1, 3]);
            let to = [0, 2, 1, 3].map(|i: usize| shape[i].clone()).to_vec();
            x = self.typed(&format!("{name}.tokens"), Op::Transpose { perm }, &[x], dtype, to);
        } else if !layout.is_batch_first() && layout.token_axis() > 1 {
            return Err(format!(
                "{} has the shape {shape:?}, whose order of axes is not understood",
                source.name
            ));
        }
        let ids = self.token_ids;
        let reshape = |graph: &mut Graph, x: ValueId, to: &[Dim], part: &str| {
            reshape_to(graph, ids, x, to, &format!("{name}{part}"))
                .ok_or_else(|| format!("no reshape gives {} the shape {to:?}", source.name))
        };
        if whole {
            x = reshape(self.graph, x, &rows, ".heads")?;
        } else {
            let groups = vec![
                batch.clone(),
                tokens.clone(),
                Dim::from(p.pick.groups),
                Dim::from(p.pick.stride),
            ];
            x = reshape(self.graph, x, &groups, ".groups")?;
            let run = p.pick.per_group * p.dim;
            let mut ints = |value: usize| self.graph.add_i64(&format!("{name}.slice"), &[value as i64]);
            let operands = [ints(p.pick.offset), ints(p.pick.offset + run), ints(3)];
            let to = vec![batch.clone(), tokens.clone(), Dim::from(p.pick.groups), Dim::from(run)];
            let inputs = [x, operands[0], operands[1], operands[2]];
            x = self.typed(&format!("{name}.columns"), Op::Slice, &inputs, dtype, to);
            x = reshape(self.graph, x, &rows, ".heads")?;
        }
        let perm = Some(vec![0, 2, 1, 3]);
        Ok(self.typed(&format!("{name}.rows"), Op::Transpose { perm }, &[x], dtype, heads))
    }

    fn table(&mut self, index: usize, dtype: DType, analysis: &Analysis) -> (ValueId, ValueId) {
        if let Some(known) = self.tables.get(&(index, dtype)) {
            return *known;
        }
        let table = &analysis.tables.tables[index];
        let mut constant = |part: &str, values: &[f32]| {
            let tensor = Tensor::from_f32(vec![table.positions(), table.half], values);
            let name = if index == 0 {
                format!("rotary.{part}")
            } else {
                format!("rotary.{index}.{part}")
            };
            // In the model's own type: the operator takes one type for rows and tables.
            let tensor = Constant::tensor(tensor)
                .cast(dtype)
                .materialize()
                .expect("the table is at hand");
            self.graph.add_constant(&name, tensor)
        };
        let pair = (constant("cos", &table.cos), constant("sin", &table.sin));
        self.tables.insert((index, dtype), pair);
        pair
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
