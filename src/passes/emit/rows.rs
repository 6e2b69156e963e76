//! Rows of queries, keys and values: picked from a projection, rotated, and rounded where the export rounds them.

use std::ops::Range;

use super::Emitter;
use crate::dim::Dim;
use crate::graph::op::{Binary, Op, Rounding};
use crate::graph::{Constant, Graph, Shape, ValueId};
use crate::passes::attention::Analysis;
use crate::passes::attention::layout::{Columns, TokenLayout};
use crate::passes::attention::projection::Projection;
use crate::passes::attention::rope::{Rope, Table};
use crate::passes::attention::rounding::{RotationRounding, RowRounding};
use crate::passes::reshapes::reshape_to;
use crate::tensor::{DType, Tensor};

/// The table of a part of a rotation.
#[derive(Clone, Copy)]
enum Part {
    /// Its own table.
    Table,
    /// The table of sines.
    Sine,
    Zero,
    One,
}

impl Emitter<'_> {
    /// Rounds every element, in this order.
    pub(super) fn rounded(&mut self, mut x: ValueId, roundings: &[Rounding], name: &str) -> ValueId {
        for rounding in roundings {
            let (dtype, shape) = self.type_of(x);
            x = self.typed(&format!("{name}.rounded"), rounding.operator(), &[x], dtype, shape);
        }
        x
    }

    /// `[batch, heads, tokens, head_dim]`, from all parts.
    pub(super) fn rows(
        &mut self,
        p: &Projection,
        rounding: &RowRounding,
        name: &str,
        dtype: DType,
        analysis: &Analysis,
    ) -> Result<ValueId, String> {
        let mut rows = self.part_of_rows(p, rounding, name, dtype, analysis)?;
        let mut rest = p.rest.as_deref();
        for n in 1.. {
            let Some(part) = rest else { break };
            let more = self.part_of_rows(part, rounding, &format!("{name}.part{n}"), dtype, analysis)?;
            rows = self.joined([rows, more], &format!("{name}.joined{n}"));
            rest = part.rest.as_deref();
        }
        Ok(rows)
    }

    /// `[batch, heads, tokens, dim]`, from one part.
    fn part_of_rows(
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
        let rows = self.table_rows(&analysis.tables.tables[rope.table]);
        self.typed(name, op, &[x, cos, sin, rows], dtype, shape)
    }

    /// The row of a table for each token, `[batch, tokens]`: its position, plus the number of rows for short runs if
    /// the run is long.
    fn table_rows(&mut self, table: &Table) -> ValueId {
        let (Some(long), Some(total_lengths)) = (&table.long, self.total_lengths) else {
            return self.position_ids;
        };
        if let Some(known) = self.table_rows {
            return known;
        }
        let (unit, batch) = (Dim::from(1usize), self.batch.clone());
        let after = self.graph.add_constant(
            "rotary.longest_short_run",
            Tensor::from_i64(vec![], &[long.after as i64]),
        );
        let none = self.graph.add_constant("rotary.none", Tensor::from_i64(vec![], &[0]));
        let axis = self.graph.add_i64("rotary.axis", &[1]);
        let shape = vec![batch.clone()];
        let greater = Op::Binary(Binary::Greater);
        let is_long = self.typed(
            "rotary.is_long",
            greater,
            &[total_lengths, after],
            DType::Bool,
            shape.clone(),
        );
        let shift = self.typed("rotary.shift", Op::Where, &[is_long, after, none], DType::I64, shape);
        let shift = self.typed(
            "rotary.shift.column",
            Op::Unsqueeze,
            &[shift, axis],
            DType::I64,
            vec![batch.clone(), unit],
        );
        let (shape, ids) = (vec![batch, self.tokens.clone()], self.position_ids);
        let rows = self.typed("rotary.rows", Op::Binary(Binary::Add), &[ids, shift], DType::I64, shape);
        *self.table_rows.insert(rows)
    }

    /// The sum of two rotations, one with only cosines and one with only sines, whose results are rounded. Elements
    /// that are not rotated follow.
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

    pub(super) fn type_of(&self, x: ValueId) -> (DType, Shape) {
        let value = self.graph.value(x);
        (
            value.dtype.unwrap_or(DType::F32),
            value.shape.clone().unwrap_or_default(),
        )
    }

    /// A slice of the last of four axes.
    fn columns(&mut self, x: ValueId, columns: Range<usize>, name: &str) -> ValueId {
        let (dtype, mut shape) = self.type_of(x);
        let mut ints = |value: usize| self.graph.add_i64(&format!("{name}.slice"), &[value as i64]);
        let operands = [ints(columns.start), ints(columns.end), ints(3)];
        shape.pop();
        shape.push(Dim::from(columns.len()));
        let inputs = [x, operands[0], operands[1], operands[2]];
        self.typed(name, Op::Slice, &inputs, dtype, shape)
    }

    /// Concatenated on the last of four axes.
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
        let pick = match &p.pick {
            Columns::Even(pick) => *pick,
            Columns::Listed(columns) => return self.listed(p, columns, name),
        };
        let columns = pick.groups * pick.stride;
        let whole = pick.groups == 1 && columns == p.heads * p.dim;
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
        let ids = self.token_input;
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
                Dim::from(pick.groups),
                Dim::from(pick.stride),
            ];
            x = reshape(self.graph, x, &groups, ".groups")?;
            let run = pick.per_group * p.dim;
            let mut ints = |value: usize| self.graph.add_i64(&format!("{name}.slice"), &[value as i64]);
            let operands = [ints(pick.offset), ints(pick.offset + run), ints(3)];
            let to = vec![batch.clone(), tokens.clone(), Dim::from(pick.groups), Dim::from(run)];
            let inputs = [x, operands[0], operands[1], operands[2]];
            x = self.typed(&format!("{name}.columns"), Op::Slice, &inputs, dtype, to);
            x = reshape(self.graph, x, &rows, ".heads")?;
        }
        let perm = Some(vec![0, 2, 1, 3]);
        Ok(self.typed(&format!("{name}.rows"), Op::Transpose { perm }, &[x], dtype, heads))
    }

    /// Elements that are individually selected columns of a projection.
    fn listed(&mut self, p: &Projection, columns: &[usize], name: &str) -> Result<ValueId, String> {
        let (dtype, shape) = self.type_of(p.source);
        let fixed = self.batch.as_const().map(|n| n as usize);
        let layout = TokenLayout::find(&shape, fixed);
        let in_rows = layout.is_some_and(|layout| layout.is_batch_first() || layout.token_axis() == 0);
        let source = &self.graph.value(p.source).name;
        let refused = format!("{source} has the shape {shape:?}, of which no columns can be taken one by one");
        let all = shape.iter().fold(Dim::from(1usize), |all, dim| &all * dim);
        let width = all.div_exact(&(&self.batch * &self.tokens)).filter(|_| in_rows);
        let width = width
            .filter(|width| width.as_const().is_some())
            .ok_or_else(|| refused.clone())?;
        let rows = |width: Dim, of: &Self| -> Shape { vec![of.batch.clone(), of.tokens.clone(), width] };
        let to = rows(width, self);
        let flat = reshape_to(self.graph, self.token_input, p.source, &to, &format!("{name}.flat")).ok_or(refused)?;
        let indices: Vec<i64> = columns.iter().map(|column| *column as i64).collect();
        let indices = self.graph.add_i64(&format!("{name}.columns"), &indices);
        let to = rows(Dim::from(columns.len()), self);
        let taken = self.typed(
            &format!("{name}.taken"),
            Op::Gather { axis: 2 },
            &[flat, indices],
            dtype,
            to,
        );
        let (batch, tokens) = (self.batch.clone(), self.tokens.clone());
        let heads: Shape = vec![batch.clone(), tokens.clone(), Dim::from(p.heads), Dim::from(p.dim)];
        let split = reshape_to(self.graph, self.token_input, taken, &heads, &format!("{name}.heads"))
            .ok_or_else(|| format!("no reshape gives {name} its heads"))?;
        let perm = Some(vec![0, 2, 1, 3]);
        let to = vec![batch, Dim::from(p.heads), tokens, Dim::from(p.dim)];
        Ok(self.typed(&format!("{name}.rows"), Op::Transpose { perm }, &[split], dtype, to))
    }

    fn table(&mut self, index: usize, dtype: DType, analysis: &Analysis) -> (ValueId, ValueId) {
        if let Some(known) = self.tables.get(&(index, dtype)) {
            return *known;
        }
        let table = &analysis.tables.tables[index];
        let mut constant = |part: &str, values: &[f32]| {
            let tensor = Tensor::from_f32(vec![values.len() / table.half, table.half], values);
            let name = if index == 0 {
                format!("rotary.{part}")
            } else {
                format!("rotary.{index}.{part}")
            };
            // In the model's type: the operator requires one type for rows and tables.
            let tensor = Constant::tensor(tensor)
                .cast(dtype)
                .materialize()
                .expect("the table is at hand");
            self.graph.add_constant(&name, tensor)
        };
        // Rows for long runs follow those for short ones.
        let (mut cos, mut sin) = (table.cos.clone(), table.sin.clone());
        if let Some(long) = &table.long {
            cos.extend_from_slice(&long.table.cos);
            sin.extend_from_slice(&long.table.sin);
        }
        let pair = (constant("cos", &cos), constant("sin", &sin));
        self.tables.insert((index, dtype), pair);
        pair
    }
}
