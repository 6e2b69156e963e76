//! One step of several sequences at once: every sequence has its own run, and all go through the phases together.
//!
//! Reading weights is nearly all of a decode step, and is done for all sequences in one pass: a product reads each
//! weight once and multiplies it with the rows of all sequences. Everything else (attention over a sequence's own
//! cache, sums over its own activations) is exactly what the sequence's program does alone. So a sequence gets the same
//! values, bit for bit, with any other sequences: except for products, no kernel sees rows of two sequences, and an
//! element of a product depends only on its own row ([`Rows`]).
//!
//! Programs of one model for different capacities can be combined: compiled
//! [`in_batches`](crate::backend::cpu::CompileOptions::in_batches), they have the same steps in the same phases.

use std::mem::discriminant;
use std::sync::{Arc, Mutex};

use super::super::aligned_bytes::AlignedBytes;
use super::super::bindings::Bindings;
use super::super::error::CpuError;
use super::super::kernels::gemv::{Gemv, Rows};
use super::super::kernels::quantized_gemv::{self, QuantizedGemv, Scope};
use super::super::pool::{Pieces, Pool, Team};
use super::super::strided_view::BufferId;
use super::Program;
use super::run::Run;
use super::steps::{MatrixView, Memory, Work};

/// One sequence of a step.
pub struct Member<'p, 'b> {
    /// Compiled in batches, on the threads of the [`Batch`].
    pub program: &'p Program,
    /// Bindings as for [`Program::run`].
    pub bindings: Bindings<'b>,
}

/// The threads and the memory for steps of several sequences. A step allocates little once the batch has had as many
/// sequences.
pub struct Batch {
    pool: Arc<Pool>,
    /// Activations of each member.
    arenas: Vec<AlignedBytes>,
    /// Scratch per thread: for one item, and kept between items.
    scratch: [Vec<AlignedBytes>; 2],
    /// Pieces of each phase.
    pieces: Vec<Pieces>,
    /// Number of passes so far.
    passes: u64,
}

/// Locations of the rows that a product reads and writes.
type Places = Vec<(*const f32, *mut f32)>;

impl Batch {
    /// A batch for programs compiled for the threads of this pool.
    pub fn new(pool: Arc<Pool>) -> Self {
        let each = || (0..pool.threads()).map(|_| AlignedBytes::zeroed(0)).collect();
        Batch {
            arenas: Vec::new(),
            scratch: [each(), each()],
            pieces: Vec::new(),
            passes: 0,
            pool,
        }
    }

    /// Runs every member once, as [`Program::run`] would, and returns the result of each. The failure of one does not
    /// affect the others. Panics if a program was compiled for other threads.
    pub fn run(&mut self, members: &mut [Member<'_, '_>]) -> Vec<Result<(), CpuError>> {
        let mut results: Vec<Result<(), CpuError>> = members.iter().map(|_| Ok(())).collect();
        let mut left: Vec<usize> = (0..members.len()).collect();
        while let [first, ..] = left[..] {
            // Those that can run with the first; a program of another model needs its own pass.
            let leader = members[first].program;
            let (together, others): (Vec<usize>, Vec<usize>) =
                left.iter().partition(|i| alike(leader, members[**i].program));
            self.pass(members, &together, &mut results);
            left = others;
        }
        results
    }

    /// Runs these members, which have the same steps.
    fn pass(&mut self, members: &mut [Member<'_, '_>], which: &[usize], results: &mut [Result<(), CpuError>]) {
        while self.arenas.len() < which.len() {
            self.arenas.push(AlignedBytes::zeroed(0));
        }
        let mut runs: Vec<(usize, Vec<*mut u8>)> = Vec::new();
        for (arena, i) in self.arenas.iter_mut().zip(which) {
            let Member { program, bindings } = &mut members[*i];
            assert!(Arc::ptr_eq(&program.pool, &self.pool), "a program for other threads");
            if arena.len() < program.arena.len() {
                *arena = AlignedBytes::zeroed(program.arena.len());
            }
            match program.addresses(bindings, arena.address()) {
                Ok(addresses) => runs.push((*i, addresses)),
                Err(error) => results[*i] = Err(error),
            }
        }
        let Some((first, _)) = runs.first() else {
            return;
        };
        let leader = members[*first].program;
        self.passes += 1;
        let programs: Vec<&Program> = runs.iter().map(|(i, _)| members[*i].program).collect();
        let joint = joint_products(&programs);
        self.make_room(&programs, &joint);
        while self.pieces.len() < leader.phases.len() {
            self.pieces.push(Pieces::default());
        }
        self.pieces.iter_mut().for_each(Pieces::reset);
        let failures: Vec<Mutex<Option<CpuError>>> = runs.iter().map(|_| Mutex::new(None)).collect();
        let [scratch, kept] = &self.scratch;
        let each = |of: &[AlignedBytes]| -> Vec<*mut u8> { of.iter().map(AlignedBytes::address).collect() };
        let mut pass = Pass {
            leader,
            runs: Vec::new(),
            places: Vec::new(),
            kept: each(kept),
            number: self.passes,
            pieces: &self.pieces,
        };
        for ((program, (_, addresses)), failure) in programs.iter().zip(&runs).zip(&failures) {
            let memory = [each(scratch), each(kept)];
            // SAFETY: each run has its own arena, of its program's bytes at least, which nothing else uses while self
            // is borrowed mutably. The rest is memory that its bindings borrow until `Batch::run` returns, compared with the
            // ports; outputs and caches are borrowed mutably, so those of two members differ. `make_room` made scratch for
            // every thread, and a thread works on one item at a time. Scopes of runs of a pass differ (`Pass::scope`).
            let run = unsafe { Run::new(program, self.passes, addresses.clone(), memory, failure) };
            pass.runs.push(run);
        }
        pass.places = (0..leader.steps.len())
            .map(|step| match joint[step] {
                true => pass.places_of(step),
                false => Vec::new(),
            })
            .collect();
        self.pool.run(|team| pass.thread(team));
        drop(pass);
        for ((i, _), failure) in runs.iter().zip(failures) {
            if let Some(error) = failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
                results[*i] = Err(error);
            }
        }
    }

    /// Scratch for the steps of these programs, with products over the rows of all.
    fn make_room(&mut self, programs: &[&Program], joint: &[bool]) {
        let isa = programs[0].isa;
        let own = |bytes: fn(&Program) -> &[AlignedBytes]| {
            let each = programs.iter().filter_map(|program| bytes(program).first());
            each.map(AlignedBytes::len).max().unwrap_or(0)
        };
        let mut needed = [own(|program| &program.scratch), own(|program| &program.kept)];
        for (step, joint) in programs[0].steps.iter().zip(joint) {
            if let (Work::QuantizedGemv { right, rows, .. }, true) = (&step.work, joint) {
                let rows = rows * programs.len();
                let floats = quantized_gemv::scratch_len(isa.lanes(), right.format(), rows, right.depth());
                needed[1] = needed[1].max(4 * floats);
            }
        }
        for (of_threads, needed) in self.scratch.iter_mut().zip(needed) {
            for bytes in of_threads.iter_mut().filter(|bytes| bytes.len() < needed) {
                *bytes = AlignedBytes::zeroed(needed);
            }
        }
    }
}

/// Whether two programs have the same steps in the same phases, shapes aside.
fn alike(a: &Program, b: &Program) -> bool {
    let kinds = || a.steps.iter().zip(&b.steps);
    std::ptr::eq(a, b)
        || (a.isa == b.isa
            && a.phases == b.phases
            && a.steps.len() == b.steps.len()
            && kinds().all(|(a, b)| discriminant(&a.work) == discriminant(&b.work)))
}

/// For each step: whether it is a product with a weight that all programs share.
fn joint_products(programs: &[&Program]) -> Vec<bool> {
    let (first, others) = programs.split_first().expect("at least one");
    let same = |step: usize| {
        let others = others.iter().filter(|other| !std::ptr::eq(*first, **other));
        reads_weight(first, step) && others.into_iter().all(|other| same_product(first, other, step))
    };
    (0..first.steps.len()).map(same).collect()
}

fn reads_weight(program: &Program, step: usize) -> bool {
    match &program.steps[step].work {
        Work::Gemv { right, .. } => address_of_weight(program, right.buffer).is_some(),
        Work::QuantizedGemv { .. } => true,
        _ => false,
    }
}

fn address_of_weight(program: &Program, buffer: BufferId) -> Option<(*const u8, usize)> {
    match &program.buffers[buffer.0 as usize].memory {
        Memory::Tensor(tensor) => Some((tensor.data().as_ptr(), tensor.data().len())),
        _ => None,
    }
}

/// Whether two programs multiply by the same weight in this step, in the same pieces, and have the left side in the same
/// place of the same buffer: so products that share theirs in one program do in the other.
fn same_product(a: &Program, b: &Program, step: usize) -> bool {
    let same_left =
        |a: &MatrixView, b: &MatrixView| (a.buffer, &a.offsets, a.row_stride) == (b.buffer, &b.offsets, b.row_stride);
    match (&a.steps[step].work, &b.steps[step].work) {
        (
            Work::Gemv {
                left,
                right,
                columns,
                depth,
                per_item,
                rows,
                ..
            },
            Work::Gemv {
                left: l,
                right: other,
                columns: c,
                depth: d,
                per_item: p,
                rows: r,
                ..
            },
        ) => {
            same_left(left, l)
                && (columns, depth, per_item, rows) == (c, d, p, r)
                && address_of_weight(a, right.buffer) == address_of_weight(b, other.buffer)
                && (right.storage, &right.offsets) == (other.storage, &other.offsets)
                && (right.row_stride, right.column_stride) == (other.row_stride, other.column_stride)
        }
        (
            Work::QuantizedGemv {
                left,
                right,
                per_item,
                rows,
                ..
            },
            Work::QuantizedGemv {
                left: l,
                right: other,
                per_item: p,
                rows: r,
                ..
            },
        ) => same_left(left, l) && (per_item, rows) == (p, r) && Arc::ptr_eq(right, other),
        _ => false,
    }
}

/// The execution of a pass.
struct Pass<'a> {
    /// The first member, whose phases and weights are those of all.
    leader: &'a Program,
    /// The run of each member.
    runs: Vec<Run<'a>>,
    /// For each step and each matrix of its batch, the rows of all members; empty if members run the step separately.
    places: Vec<Vec<Places>>,
    /// Kept scratch of each thread.
    kept: Vec<*mut u8>,
    number: u64,
    pieces: &'a [Pieces],
}
// SAFETY: shared by the threads of a pass, as a `Run` is: a thread uses the scratch of its own number alone, and items are
// taken by one thread each; those of one phase write different memory and read none that another writes.
unsafe impl Sync for Pass<'_> {}

impl Pass<'_> {
    /// Data that a thread prepared for one member or step is not used for another: the parts of a pass have distinct
    /// numbers for every member, and for all together.
    fn scope(&self, part: usize, member: Option<usize>) -> Scope {
        let whose = member.map_or(0, |member| member as u64 + 1);
        Scope {
            run: self.number,
            part: whose << 32 | part as u64,
        }
    }

    fn thread(&self, team: Team<'_>) {
        let phases = &self.leader.phases;
        for (i, phase) in phases.iter().enumerate() {
            if phase.serial {
                while let Some(member) = self.pieces[i].take(self.runs.len()) {
                    let run = &self.runs[member];
                    for step in &phase.steps {
                        let scope = self.scope(phases.len() + step, Some(member));
                        let step = run.step(*step);
                        for item in 0..step.items {
                            // SAFETY: an item of the member's step; `Pieces` gave the member's phase to this thread alone,
                            // and its steps come in order.
                            unsafe { run.item(step, item, team.thread(), scope) };
                        }
                    }
                }
            } else {
                let items = |step: &usize| match self.places[*step].is_empty() {
                    true => self.runs.iter().map(|run| run.step(*step).items).sum(),
                    false => self.leader.steps[*step].items,
                };
                let total: usize = phase.steps.iter().map(items).sum();
                while let Some(mut item) = self.pieces[i].take(total) {
                    for step in &phase.steps {
                        let items = items(step);
                        if item < items {
                            self.item(i, *step, item, team.thread());
                            break;
                        }
                        item -= items;
                    }
                }
            }
            team.barrier();
        }
    }

    /// An item of a step of a shared phase.
    fn item(&self, phase: usize, step: usize, mut item: usize, thread: usize) {
        if !self.places[step].is_empty() {
            // SAFETY: an item of the step, and `Pieces` gave it to this thread alone.
            return unsafe { self.product(step, item, thread, self.scope(phase, None)) };
        }
        for (member, run) in self.runs.iter().enumerate() {
            let of_member = run.step(step);
            if item < of_member.items {
                // SAFETY: as above; steps of a shared phase are independent, and so are members.
                return unsafe { run.item(of_member, item, thread, self.scope(phase, Some(member))) };
            }
            item -= of_member.items;
        }
    }

    /// An item of a product for the rows of all members.
    ///
    /// # Safety
    /// As [`Run::item`], of the leader's step.
    unsafe fn product(&self, step: usize, item: usize, thread: usize, scope: Scope) {
        let places = &self.places[step];
        let isa = self.leader.isa;
        // SAFETY: `places` are rows of buffers whose addresses `Run::new` vouches for, with the depth and columns of the
        // leader's step, as `same_product` compared; the weight is the leader's. Rows of two members are of different
        // memory, and items write different columns.
        unsafe {
            match &self.leader.steps[step].work {
                Work::Gemv {
                    right,
                    columns,
                    depth,
                    per_item,
                    ..
                } => {
                    let pieces = columns.div_ceil(*per_item);
                    let (matrix, piece) = (item / pieces, item % pieces);
                    let w = self.runs[0].matrix(right, matrix);
                    isa.run(Gemv {
                        rows: places[matrix].len(),
                        places: Rows::Apart(places[matrix].as_ptr()),
                        depth: *depth,
                        w: w.base,
                        w_stride: w.column_stride as usize,
                        storage: w.storage,
                        columns: piece * per_item..((piece + 1) * per_item).min(*columns),
                    });
                }
                Work::QuantizedGemv { right, per_item, .. } => isa.run(QuantizedGemv {
                    rows: places[0].len(),
                    places: Rows::Apart(places[0].as_ptr()),
                    w: right.kernel(),
                    columns: item * per_item..((item + 1) * per_item).min(right.rows()),
                    scratch: self.kept[thread].cast(),
                    scope,
                }),
                other => unreachable!("{} is not a product of weights", other.name()),
            }
        }
    }

    /// The rows of all members in a product, for each matrix of its batch.
    fn places_of(&self, step: usize) -> Vec<Places> {
        let matrices = match &self.leader.steps[step].work {
            Work::Gemv { right, .. } => right.offsets.len(),
            _ => 1,
        };
        let of_matrix = |matrix: usize| -> Places {
            let rows = self.runs.iter().flat_map(|run| run.product_rows(step, matrix));
            rows.collect()
        };
        (0..matrices).map(of_matrix).collect()
    }
}
