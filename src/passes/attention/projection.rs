//! Identifies rows of queries, keys and values: which columns of a projection, with which scale and rotation.
//!
//! Input: a value of the export that `trace` found to be computed from projections. Finds the [`Projection`] that
//! computes the same by feeding chosen values: ones give the scale, digits of the column number give the columns, unit
//! rows give the rotary table. If heads are concatenated from parts, as in multi-head latent attention from a rotated
//! and an unrotated part, each part is found separately (`parts`). The result is then proved on random rows at other
//! positions; a failed proof is an error.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::fingerprint::{Fingerprint, fingerprint};
use super::layout::{Columns, TokenLayout};
use super::rope::{LongTable, Rope, Table};
use crate::graph::ValueId;
use crate::passes::partial_eval::{PartialEvaluator, Stuck, Trial, tensor_of};
use crate::tensor::{DType, Tensor};

/// Rows `[batch, heads, tokens, dim]` as `rotate(scale * pick(source))`, followed in each head by those of `rest`.
#[derive(Clone, Debug)]
pub struct Projection {
    pub source: ValueId,
    /// The index of the source.
    pub index: usize,
    /// Columns of the previous sources.
    pub base: usize,
    pub heads: usize,
    pub dim: usize,
    pub pick: Columns,
    pub scale: f32,
    pub rope: Option<Rope>,
    pub rest: Option<Box<Projection>>,
}

/// The distinct rotary tables found so far, and their required length.
#[derive(Debug, Default)]
pub struct Tables {
    pub tables: Vec<Table>,
    pub positions: usize,
    /// The longest run with the first of two tables, if the export has two. See [`LongTable`].
    pub switch: Option<usize>,
    /// Results by computation, for equal computations in later layers.
    pub proven: Proven,
}

impl Tables {
    /// Where a table switches to another one for longer runs.
    pub fn longest_short_run(&self) -> Option<usize> {
        self.tables.iter().find_map(|table| Some(table.long.as_ref()?.after))
    }
}

/// Results by fingerprint.
#[derive(Debug, Default)]
pub struct Proven {
    projections: HashMap<Fingerprint, Projection>,
    pub writes: HashSet<Fingerprint>,
    /// Factors of operands.
    pub reads: HashMap<Fingerprint, f32>,
    /// Positional values with one row per position.
    pub positional: HashSet<ValueId>,
}

/// The layout of a value of rows relative to `[batch, heads, tokens, head_dim]`.
#[derive(Clone, Debug)]
pub enum RowOrder {
    /// Already in that order, possibly with merged leading axes.
    Canonical,
    /// Some other order of axes.
    Tokens(TokenLayout),
}

/// The rows to explain.
pub struct Rows<'a, 'g> {
    pub evaluator: &'a PartialEvaluator<'g>,
    pub value: ValueId,
    pub order: RowOrder,
    /// The sources, whose columns are numbered consecutively from 0.
    pub sources: Vec<ValueId>,
    pub heads: usize,
    pub dim: usize,
    /// Offset of these elements in heads of `width`.
    pub start: usize,
    pub width: usize,
}

/// Tensors in place of sources.
pub type Feeds = HashMap<ValueId, Tensor>;

/// Result of probing for each element of each head, `[heads, dim]`: at position 0 it is a column times a factor.
pub(super) struct Seen {
    /// Among the columns of all sources.
    pub columns: Vec<usize>,
    pub factors: Vec<f32>,
}

impl Seen {
    /// Elements of every head.
    pub fn part(&self, dim: usize, part: Range<usize>) -> Seen {
        let columns = self.columns.chunks(dim).flat_map(|head| head[part.clone()].to_vec());
        let factors = self.factors.chunks(dim).flat_map(|head| head[part.clone()].to_vec());
        Seen {
            columns: columns.collect(),
            factors: factors.collect(),
        }
    }

    /// The single source of all columns, and the number of columns before it.
    fn source(&self, sizes: &[usize]) -> Option<(usize, usize)> {
        let mut base = 0;
        for (index, size) in sizes.iter().enumerate() {
            let own = base..base + size;
            if self.columns.iter().all(|column| own.contains(column)) {
                return Some((index, base));
            }
            base += size;
        }
        None
    }
}

/// Fed values are small multiples of 1/64, exact in every float type.
pub fn noise(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 32) % 129) as f64 / 64.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Tolerated relative error of arithmetic in this type.
pub fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => 6e-3,
        DType::Bf16 => 5e-2,
        _ => 2e-4,
    }
}

impl<'a, 'g> Rows<'a, 'g> {
    /// Whole heads of `dim` elements.
    pub fn new(
        evaluator: &'a PartialEvaluator<'g>,
        value: ValueId,
        order: RowOrder,
        sources: &[ValueId],
        [heads, dim]: [usize; 2],
    ) -> Self {
        Rows {
            evaluator,
            value,
            order,
            sources: sources.to_vec(),
            heads,
            dim,
            start: 0,
            width: dim,
        }
    }

    /// Elements of every head.
    pub(super) fn part(&self, part: Range<usize>) -> Self {
        Rows {
            order: self.order.clone(),
            sources: self.sources.clone(),
            dim: part.len(),
            start: self.start + part.start,
            ..*self
        }
    }

    /// Rounding error of the coarsest type in between.
    pub(super) fn tolerance(&self) -> f32 {
        let of = |id: &ValueId| tolerance(self.evaluator.graph.value(*id).dtype.unwrap_or(DType::F32));
        self.sources.iter().map(of).fold(of(&self.value), f32::max)
    }

    fn layout(&self, source: ValueId) -> Result<TokenLayout, Stuck> {
        let graph = self.evaluator.graph;
        let shape = graph.shape(source).cloned().unwrap_or_default();
        TokenLayout::of(&shape, self.evaluator.roles).ok_or_else(|| {
            let name = &graph.value(source).name;
            Stuck {
                at: name.clone(),
                reason: format!("the projection {name} has the shape {shape:?}, in which no axis counts tokens"),
            }
        })
    }

    /// The source tensors whose elements (sequence, token, column) are `element(b, t, column)`.
    pub fn feed(&self, trial: &Trial, element: impl Fn(usize, usize, usize) -> f64) -> Result<Feeds, Stuck> {
        let (batch, tokens) = (trial.sizes.batch, trial.sizes.tokens);
        let mut feeds = HashMap::new();
        let mut base = 0;
        for source in &self.sources {
            let dims = self.evaluator.dims(trial, *source)?;
            let places = self.layout(*source)?.places(&dims, batch, tokens);
            let columns = places.len() / (batch * tokens).max(1);
            let mut values = vec![0.0; dims.iter().product()];
            for (i, place) in places.into_iter().enumerate() {
                let (row, column) = (i / columns, i % columns);
                values[place] = element(row / tokens, row % tokens, base + column);
            }
            base += columns;
            let dtype = self.evaluator.graph.value(*source).dtype.unwrap_or(DType::F32);
            feeds.insert(*source, tensor_of(dtype, dims, &values));
        }
        Ok(feeds)
    }

    /// The rows, `[batch, heads, tokens, dim]`, when the sources are `x`.
    pub fn run(&self, trial: &Trial, x: Feeds) -> Result<Vec<f32>, Stuck> {
        let rows = self.run_whole(trial, x)?;
        if self.dim == self.width {
            return Ok(rows);
        }
        let part = |head: &[f32]| head[self.start..self.start + self.dim].to_vec();
        Ok(rows.chunks(self.width).flat_map(part).collect())
    }

    fn run_whole(&self, trial: &Trial, x: Feeds) -> Result<Vec<f32>, Stuck> {
        let result = self.evaluator.run(trial, &x, &[self.value])?;
        let (batch, tokens) = (trial.sizes.batch, trial.sizes.tokens);
        let flat = result[0].to_f32();
        let wrong = |reason: String| Stuck {
            at: self.evaluator.graph.value(self.value).name.clone(),
            reason,
        };
        if flat.len() != batch * tokens * self.heads * self.width {
            return Err(wrong(format!(
                "has {:?} where {batch} x {} heads x {tokens} tokens x {} were expected",
                result[0].shape(),
                self.heads,
                self.width
            )));
        }
        let layout = match &self.order {
            RowOrder::Canonical => return Ok(flat),
            RowOrder::Tokens(layout) => layout,
        };
        let mut rows = vec![0.0; flat.len()];
        for (i, place) in layout.places(result[0].shape(), batch, tokens).into_iter().enumerate() {
            let (d, h) = (i % self.width, i / self.width % self.heads);
            let (t, b) = (
                i / (self.width * self.heads) % tokens,
                i / (self.width * self.heads * tokens),
            );
            rows[((b * self.heads + h) * tokens + t) * self.width + d] = flat[place];
        }
        Ok(rows)
    }

    /// The columns of each source.
    pub(super) fn columns_of_sources(&self) -> Result<Vec<usize>, Stuck> {
        let trial = self.evaluator.trial(1, 0, 1);
        let columns = |source: &ValueId| {
            let volume: usize = self.evaluator.dims(&trial, *source)?.iter().product();
            Ok(volume / (trial.sizes.batch * trial.sizes.tokens).max(1))
        };
        self.sources.iter().map(columns).collect()
    }

    /// The columns of all sources.
    pub(super) fn columns(&self) -> Result<usize, Stuck> {
        Ok(self.columns_of_sources()?.iter().sum())
    }

    /// Finds and proves the projection. New rotary tables are added to `tables`; existing ones are reused.
    pub fn solve(&self, tables: &mut Tables) -> Result<Projection, String> {
        let context = format!("rows {} {} {:?}", self.heads, self.dim, self.order);
        let print = fingerprint(self.evaluator, self.value, &self.sources, &context);
        if let Some(known) = tables.proven.projections.get(&print) {
            let mut known = known.clone();
            known.each_part(&mut |part| part.source = self.sources[part.index]);
            return Ok(known);
        }
        let found = self.execute(tables)?;
        tables.proven.projections.insert(print, found.clone());
        Ok(found)
    }

    fn execute(&self, tables: &mut Tables) -> Result<Projection, String> {
        let text = |stuck: Stuck| stuck.to_string();
        if self.heads == 0 || self.dim == 0 {
            return Err("it has no heads, or heads of no elements".into());
        }
        self.prove_positional(tables)?;
        let columns = self.columns().map_err(text)?;
        let first = self.evaluator.trial(1, 0, 1);
        let tokens = first.sizes.tokens;
        let at_first = |rows: &[f32]| -> Vec<f32> {
            (0..self.heads * self.dim)
                .map(|i| rows[(i / self.dim) * tokens * self.dim + i % self.dim])
                .collect()
        };
        let probe = |element: &dyn Fn(usize) -> f64| -> Result<Vec<f32>, String> {
            let x = self.feed(&first, |_, _, c| element(c)).map_err(text)?;
            Ok(at_first(&self.run(&first, x).map_err(text)?))
        };
        // At position 0 a rotation does nothing except possibly scale.
        let factors = probe(&|_| 1.0)?;
        if factors.iter().any(|f| !f.is_finite() || *f == 0.0) {
            return Err("its rows are not columns of the projection".into());
        }
        let base = if self.tolerance() > 1e-3 { 16usize } else { 256 };
        let mut found = vec![0usize; factors.len()];
        let mut unit = 1usize;
        while unit < columns {
            let digits = probe(&|c| ((c / unit) % base) as f64)?;
            for (found, (digit, factor)) in found.iter_mut().zip(digits.iter().zip(&factors)) {
                let digit = digit / factor;
                if (digit - digit.round()).abs() > 0.2 || digit < -0.5 {
                    return Err("its rows are not columns of the projection".into());
                }
                *found = found.saturating_add(unit.saturating_mul(digit.round() as usize));
            }
            unit *= base;
        }
        // A damaged file can compute any number.
        if found.iter().any(|column| *column >= columns) {
            return Err("its rows are not columns of the projection".into());
        }
        let seen = Seen {
            columns: found,
            factors,
        };
        let projection = match self.projection(&seen, tables) {
            Ok(projection) => projection,
            Err(reason) => self.in_parts(&seen, tables)?.ok_or(reason)?,
        };
        for (seed, (batch, past, count)) in [(2, 2, 3), (1, 0, 4), (2, 5, 1)].into_iter().enumerate() {
            let trial = self.evaluator.trial(batch, past, count);
            self.prove(&projection, tables, &trial, seed as u64 + 1)?;
        }
        self.prove_beyond(&projection, tables)?;
        Ok(projection)
    }

    /// The projection of rows that are evenly spaced columns of one source, optionally rotated from their first element
    /// on.
    pub(super) fn projection(&self, seen: &Seen, tables: &mut Tables) -> Result<Projection, String> {
        let sizes = self.columns_of_sources().map_err(|stuck| stuck.to_string())?;
        let (index, base) = seen
            .source(&sizes)
            .ok_or("its heads are columns of several projections")?;
        let columns: Vec<usize> = seen.columns.iter().map(|column| column - base).collect();
        let pick = Columns::of(columns, self.heads, self.dim, sizes[index]);
        let mut projection = Projection {
            source: self.sources[index],
            index,
            base,
            heads: self.heads,
            dim: self.dim,
            pick,
            scale: seen.factors[0],
            rope: None,
            rest: None,
        };
        if let Some((interleaved, rotary_dim)) = self.rotation(&projection, seen.factors[0])? {
            self.find_table(&mut projection, &seen.factors, interleaved, rotary_dim, tables)?;
        }
        Ok(projection)
    }

    /// `(interleaved, rotary_dim)` if the rows depend on the position.
    fn rotation(&self, projection: &Projection, factor: f32) -> Result<Option<(bool, usize)>, String> {
        let text = |stuck: Stuck| stuck.to_string();
        let trial = self.evaluator.trial(1, 3, 1);
        let tokens = trial.sizes.tokens;
        let x = noise(self.columns().map_err(text)?, 7);
        let rows = self
            .run(&trial, self.feed(&trial, |_, _, c| x[c]).map_err(text)?)
            .map_err(text)?;
        let limit = self.tolerance() * factor.abs();
        let still = (0..self.heads * self.dim).all(|i| {
            let (h, d) = (i / self.dim, i % self.dim);
            let expected = factor * x[projection.column(h, d)] as f32;
            (rows[h * tokens * self.dim + d] - expected).abs() <= limit
        });
        if still {
            return Ok(None);
        }
        let unit = |wanted: &dyn Fn(usize) -> bool| -> Result<Vec<f32>, String> {
            let on: Vec<usize> = (0..self.dim)
                .filter(|d| wanted(*d))
                .map(|d| projection.column(0, d))
                .collect();
            let x = self
                .feed(&trial, |_, t, c| f64::from(u8::from(t == 0 && on.contains(&c))))
                .map_err(text)?;
            Ok(self.run(&trial, x).map_err(text)?[..self.dim].to_vec())
        };
        let answer = unit(&|d| d == 0)?;
        let partner = (1..self.dim).find(|d| answer[*d].abs() > limit);
        match partner {
            None => Err("it depends on the position, but is no rotation of the row's leading elements".into()),
            Some(1) if self.dim > 2 => {
                let answer = unit(&|d| d % 2 == 0)?;
                let pairs = (0..self.dim / 2).take_while(|i| answer[2 * i + 1] != 0.0).count();
                if pairs == 0 {
                    return Err("it pairs neighbors, but is no rotation".into());
                }
                Ok(Some((true, 2 * pairs)))
            }
            Some(half) if 2 * half <= self.dim => Ok(Some((false, 2 * half))),
            Some(_) => Err("it pairs elements as neither rotate-half nor interleaved rotary embedding does".into()),
        }
    }

    fn find_table(
        &self,
        projection: &mut Projection,
        factors: &[f32],
        interleaved: bool,
        rotary_dim: usize,
        tables: &mut Tables,
    ) -> Result<(), String> {
        let half = rotary_dim / 2;
        let read = |past: usize, count: usize| self.read_table(projection, interleaved, rotary_dim, past, count);
        let scaled = |table: &Table, by: f32| {
            let divided = |values: &[f32]| values.iter().map(|v| v / by).collect();
            Table::new(half, divided(&table.cos), divided(&table.sin))
        };
        // Elements that are not rotated show the scale; otherwise a known table does.
        let shown = (rotary_dim < self.dim).then(|| factors[rotary_dim]);
        let near = read(1, 4)?;
        let last = tables.positions.saturating_sub(2).max(1);
        let far = read(last, 2)?;
        let slack = 2.0 * self.tolerance();
        for (index, table) in tables.tables.iter().enumerate() {
            if table.half != half {
                continue;
            }
            let by = shown.unwrap_or(factors[0] / table.cos[0]);
            let (first, end) = (table.of_run(5), table.of_run(last + 2));
            if first.agrees(1, &scaled(&near, by), slack) && end.agrees(last, &scaled(&far, by), slack) {
                projection.scale = by;
                projection.rope = Some(Rope {
                    table: index,
                    interleaved,
                    rotary_dim,
                });
                return Ok(());
            }
        }
        let by = shown.unwrap_or(1.0);
        let columns = self.columns().map_err(|stuck| stuck.to_string())?;
        let chunk = ((1 << 22) / columns.max(1)).clamp(1, tables.positions);
        // Rows from 0 on, from runs that end before or at `end`, whose first part is no shorter than `first`.
        let whole = |first: usize, end: usize| -> Result<Table, String> {
            let mut table = Table::new(half, Vec::new(), Vec::new());
            let mut start = 0;
            while start < end {
                let count = chunk.max(if start == 0 { first } else { 1 }).min(end - start);
                let part = scaled(&read(start, count)?, by);
                table.cos.extend(part.cos);
                table.sin.extend(part.sin);
                start += count;
            }
            Ok(table)
        };
        let positions = tables.positions;
        let table = match tables.switch {
            Some(after) if after < positions => Table {
                long: Some(LongTable {
                    after,
                    table: Box::new(whole(after + 1, positions)?),
                }),
                ..whole(1, after)?
            },
            _ => whole(1, positions)?,
        };
        let (first, end) = (table.of_run(5), table.of_run(last + 2));
        if !first.agrees(1, &scaled(&near, by), slack) || !end.agrees(last, &scaled(&far, by), slack) {
            return Err(
                "its rotary table depends on more than the position (dynamic or long-context scaling that \
                        switches with the length); export with a fixed scaling"
                    .into(),
            );
        }
        projection.scale = by;
        projection.rope = Some(Rope {
            table: tables.tables.len(),
            interleaved,
            rotary_dim,
        });
        tables.tables.push(table);
        Ok(())
    }

    /// Rows `past..past + count` of the table, times the scale of the rows.
    fn read_table(
        &self,
        projection: &Projection,
        interleaved: bool,
        rotary_dim: usize,
        past: usize,
        count: usize,
    ) -> Result<Table, String> {
        let text = |stuck: Stuck| stuck.to_string();
        let half = rotary_dim / 2;
        let trial = self.evaluator.trial(1, past, count);
        let tokens = trial.sizes.tokens;
        let mut firsts = vec![false; self.columns().map_err(text)?];
        for i in 0..half {
            let (first, _) = Rope::pair(interleaved, rotary_dim, i);
            firsts[projection.column(0, first)] = true;
        }
        let x = self
            .feed(&trial, |_, _, c| f64::from(u8::from(firsts[c])))
            .map_err(text)?;
        let rows = self.run(&trial, x).map_err(text)?;
        if count > 64 {
            self.evaluator.forget(&trial);
        }
        let mut table = Table::new(
            half,
            Vec::with_capacity(tokens * half),
            Vec::with_capacity(tokens * half),
        );
        for row in rows[..tokens * self.dim].chunks(self.dim) {
            for i in 0..half {
                let (a, b) = Rope::pair(interleaved, rotary_dim, i);
                table.cos.push(row[a]);
                table.sin.push(row[b]);
            }
        }
        Ok(table)
    }

    pub(super) fn prove(
        &self,
        projection: &Projection,
        tables: &Tables,
        trial: &Trial,
        seed: u64,
    ) -> Result<(), String> {
        let text = |stuck: Stuck| stuck.to_string();
        let x = Noise::new(self, seed).map_err(text)?;
        let rows = self.run(trial, self.feed(trial, |b, t, c| x.at(b, t, c)).map_err(text)?);
        let expected = projection.rows(tables, trial, |b, t, c| x.at(b, t, c) as f32);
        let limit = self.tolerance() * projection.largest_scale().max(f32::MIN_POSITIVE) * 4.0;
        let rows = rows.map_err(text)?;
        let near = rows.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= limit);
        if near {
            Ok(())
        } else {
            Err(format!("what it computes for {} was not understood", trial.sizes))
        }
    }
}

/// Random numbers for (sequence, token, column).
pub struct Noise {
    values: Vec<f64>,
}

impl Noise {
    pub fn new(rows: &Rows<'_, '_>, seed: u64) -> Result<Self, Stuck> {
        Ok(Noise {
            values: noise(rows.columns()? + 977, seed),
        })
    }
    pub fn at(&self, b: usize, t: usize, c: usize) -> f64 {
        self.values[(c + 131 * t + 389 * b) % self.values.len()]
    }
}

impl Projection {
    /// Elements of a head, in all parts.
    pub fn width(&self) -> usize {
        self.dim + self.rest.as_ref().map_or(0, |rest| rest.width())
    }

    fn each_part(&mut self, each: &mut impl FnMut(&mut Projection)) {
        each(self);
        if let Some(rest) = &mut self.rest {
            rest.each_part(each);
        }
    }

    /// The greatest magnitude among the factors of its parts.
    pub fn largest_scale(&self) -> f32 {
        let rest = self.rest.as_ref().map_or(0.0, |rest| rest.largest_scale());
        self.scale.abs().max(rest)
    }

    /// The first part that is rotated.
    pub fn rotated(&self) -> Option<(&Projection, Rope)> {
        let rest = || self.rest.as_ref()?.rotated();
        self.rope.map(|rope| (self, rope)).or_else(rest)
    }

    /// The common factor of all parts, which is then set to 1; 1 if factors differ.
    pub fn take_scale(&mut self) -> f32 {
        let scale = self.scale;
        let mut same = true;
        self.each_part(&mut |part| same &= part.scale == scale);
        if !same {
            return 1.0;
        }
        self.each_part(&mut |part| part.scale = 1.0);
        scale
    }

    /// The number of the column, among those of all sources, of an element of a head.
    fn column(&self, head: usize, element: usize) -> usize {
        self.base + self.pick.column(head, element, self.dim)
    }

    /// The definition: rows `[batch, heads, tokens, width]` computed from sources with these elements.
    pub fn rows(&self, tables: &Tables, trial: &Trial, x: impl Fn(usize, usize, usize) -> f32) -> Vec<f32> {
        let (batch, tokens) = (trial.sizes.batch, trial.sizes.tokens);
        let mut rows = Vec::with_capacity(batch * self.heads * tokens * self.width());
        for b in 0..batch {
            for h in 0..self.heads {
                for t in 0..tokens {
                    let mut part = Some(self);
                    while let Some(p) = part {
                        let start = rows.len();
                        rows.extend((0..p.dim).map(|d| p.scale * x(b, t, p.column(h, d))));
                        if let Some(rope) = &p.rope {
                            let (position, end) = (trial.sizes.past + t, trial.sizes.past + tokens);
                            rope.rotate(&mut rows[start..], &tables.tables[rope.table], position, end);
                        }
                        part = p.rest.as_deref();
                    }
                }
            }
        }
        rows
    }
}
