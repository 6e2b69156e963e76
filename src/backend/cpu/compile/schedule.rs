//! Which steps run in parallel, and the placement of activations in the arena.

use std::collections::BTreeSet;

use super::super::program::{Buffer, Memory, Phase, Step};

/// A shorter phase runs on one thread: a barrier and a cold cache cost as much.
const WORTH_SHARING: f64 = 6_000.0;

pub(super) struct Schedule {
    pub phases: Vec<Phase>,
    pub arena_bytes: usize,
}

/// Steps in topological order become phases of independent steps; arena buffers get offsets. `None` if the arena would
/// be larger than any memory.
///
/// Kernels rely on two things: steps of one shared phase write different elements (of the same buffer only if several
/// fill it, as in a concatenation) and read no buffer that another of them writes; and buffers whose uses overlap in
/// time have no bytes of the arena in common.
///
/// In a batch, sharing does not depend on shapes: programs of one model have the same phases for every capacity.
pub(super) fn schedule(steps: &[Step], buffers: &mut [Buffer], threads: usize, in_batches: bool) -> Option<Schedule> {
    let phases = phases(steps, buffers, threads, in_batches);
    let arena_bytes = place(steps, buffers, &phases)?;
    Some(Schedule { phases, arena_bytes })
}

fn phases(steps: &[Step], buffers: &[Buffer], threads: usize, in_batches: bool) -> Vec<Phase> {
    // Each step as early as its inputs allow. A cache is also read by steps that must not see a later write.
    let mut written = vec![None::<usize>; buffers.len()];
    let mut read = vec![None::<usize>; buffers.len()];
    let mut levels: Vec<Vec<usize>> = Vec::new();
    for (i, step) in steps.iter().enumerate() {
        let mut level = 0;
        let mut after = |other: Option<usize>| level = level.max(other.map_or(0, |l| l + 1));
        for buffer in &step.reads {
            after(written[buffer.0 as usize]);
        }
        for buffer in &step.writes {
            if let Memory::Cache(_) = buffers[buffer.0 as usize].memory {
                after(written[buffer.0 as usize]);
                after(read[buffer.0 as usize]);
            }
        }
        for buffer in &step.reads {
            let entry = &mut read[buffer.0 as usize];
            *entry = (*entry).max(Some(level));
        }
        for buffer in &step.writes {
            let entry = &mut written[buffer.0 as usize];
            *entry = (*entry).max(Some(level));
        }
        if levels.len() <= level {
            levels.resize(level + 1, Vec::new());
        }
        levels[level].push(i);
    }
    let mut phases: Vec<Phase> = Vec::new();
    for level in levels {
        let time: f64 = level.iter().map(|s| steps[*s].nanoseconds).sum();
        let items: usize = level.iter().map(|s| steps[*s].items).sum();
        let serial = match in_batches {
            true => !level.iter().any(|s| steps[*s].work.is_large()),
            false => threads == 1 || items == 1 || time < WORTH_SHARING,
        };
        match phases.last_mut() {
            Some(last) if serial && last.serial => last.steps.extend(level),
            _ => phases.push(Phase { steps: level, serial }),
        }
    }
    phases
}

/// First fit by offset, in order of first write: simple, and within a few percent of the peak for networks that are
/// mostly a chain.
fn place(steps: &[Step], buffers: &mut [Buffer], phases: &[Phase]) -> Option<usize> {
    // Steps of a shared phase are alive at the same time; those of a serial phase run one after the other.
    let mut spans = vec![None::<(usize, usize)>; buffers.len()];
    let mut time = 0;
    for phase in phases {
        for step in &phase.steps {
            for buffer in steps[*step].reads.iter().chain(&steps[*step].writes) {
                let span = spans[buffer.0 as usize].get_or_insert((time, time));
                span.1 = time;
            }
            time += usize::from(phase.serial);
        }
        time += 1;
    }
    let mut order: Vec<usize> = (0..buffers.len())
        .filter(|b| spans[*b].is_some() && matches!(buffers[*b].memory, Memory::Arena { .. }))
        .collect();
    order.sort_by_key(|b| (spans[*b], *b));
    // (last use, offset, end) of live buffers.
    let mut alive: BTreeSet<(usize, usize, usize)> = BTreeSet::new();
    let mut total = 0;
    for buffer in order {
        let (first, last) = spans[buffer].expect("filtered");
        alive.retain(|(until, _, _)| *until >= first);
        let mut taken: Vec<(usize, usize)> = alive.iter().map(|(_, start, end)| (*start, *end)).collect();
        taken.sort_unstable();
        // A guard of one vector: kernels may load (but never use) bytes just beyond a buffer.
        let bytes = buffers[buffer].bytes.checked_add(64)?.checked_next_multiple_of(64)?;
        let mut offset = 0;
        for (start, end) in taken {
            if start >= bytes.checked_add(offset)? {
                break;
            }
            offset = offset.max(end);
        }
        let end = bytes.checked_add(offset)?;
        alive.insert((last, offset, end));
        total = total.max(end);
        buffers[buffer].memory = Memory::Arena { offset };
    }
    // The maximum size of an allocation, including its alignment.
    (total < isize::MAX as usize - 64).then_some(total)
}
