//! Builds, loads and times every alternative.
//!
//! Input: a canonical graph and profiles. For each of the [`super::questions`] in order, it builds every alternative
//! and runs it with synthetic values. Output: the winner of each profile with all attempts. Weights enter engines as in
//! the package, since TensorRT chooses different kernels for constants and for inputs. The package's settings are
//! decided by `convert` and specs.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::questions::{QUESTIONS, question};
use super::{Attempt, ProfileTuning, Tuning};
use crate::backend::tensorrt::run::timing::SyntheticProgram;
use crate::backend::tensorrt::run::{Caches, LoadOptions, Program, RunError, Runtime, Stream};
use crate::backend::tensorrt::{self, BuildOptions, Library, Plan};
use crate::graph::Graph;
use crate::help::Help;
use crate::interface::Role;
use crate::lower::{self, LowerError, LowerOptions};
use crate::network::{Profile, Tokens};
use crate::target::Refit;

/// Alternatives must be faster by this factor to be chosen; smaller differences are noise.
const WORTH: f64 = 0.005;
/// Number of runs per measurement.
const RUNS: u32 = 30;

/// Why nothing could be tuned.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message says what the fields are")]
pub enum TuneError {
    /// There is no GPU to measure on.
    #[error(transparent)]
    Gpu(#[from] RunError),
    /// The graph cannot be lowered: a bug.
    #[error(transparent)]
    Lower(#[from] LowerError),
    /// Even the lowering without tuning could not be built and run.
    #[error("{profile}: {message}")]
    Nothing { profile: String, message: String },
}

impl Help for TuneError {
    fn help(&self) -> Option<String> {
        match self {
            TuneError::Gpu(error) => error.help(),
            TuneError::Lower(error) => error.help(),
            TuneError::Nothing { .. } => None,
        }
    }
}

/// Tunes every profile, several builds at a time, one measurement at a time. `graph` has the weights' bytes unless
/// `base` binds them; `refit` is that of the engines. `note` is called with every attempt.
pub fn tune(
    library: &Library,
    graph: &Graph,
    profiles: &[Profile],
    (base, refit): (&LowerOptions, Refit),
    threads: usize,
    note: impl Fn(&Profile, &Attempt) + Sync,
) -> Result<Tuning, TuneError> {
    // Also refuses a machine without a GPU before anything is built.
    let runtime = Runtime::new(library)?;
    let driver = runtime.cuda().facts().driver_version.clone();
    let (gpu, version) = (runtime.gpu().to_string(), runtime.version().to_string());
    let bench = Bench {
        library,
        graph,
        refit,
        gpu: Mutex::new(()),
    };
    let mut tuned = Vec::new();
    for profile in profiles {
        tuned.push(of_profile(&bench, profile, base, threads, &note)?);
    }
    Ok(Tuning {
        gpu,
        driver,
        tensorrt: version,
        profiles: tuned,
    })
}

fn of_profile(
    bench: &Bench<'_>,
    profile: &Profile,
    base: &LowerOptions,
    threads: usize,
    note: &(impl Fn(&Profile, &Attempt) + Sync),
) -> Result<ProfileTuning, TuneError> {
    let mut tried = Vec::new();
    let mut now = base.clone();
    let first = bench.attempt(profile, "as it is", "as it is", &now);
    note(profile, &first);
    let Some(untuned_ms) = first.ms else {
        return Err(TuneError::Nothing {
            profile: profile.to_string(),
            message: first.error.unwrap_or_default(),
        });
    };
    let mut best = untuned_ms;
    tried.push(first);
    for about in QUESTIONS {
        let alternatives = question(about, bench.graph, profile, &now).alternatives;
        let attempts: Vec<Attempt> = in_parallel(threads, &alternatives, |(what, options)| {
            let attempt = bench.attempt(profile, about, what, options);
            note(profile, &attempt);
            attempt
        });
        for ((_, options), attempt) in alternatives.iter().zip(&attempts) {
            if let Some(ms) = attempt.ms
                && ms < best * (1.0 - WORTH)
            {
                (best, now) = (ms, options.clone());
            }
        }
        tried.extend(attempts);
    }
    Ok(ProfileTuning {
        profile: profile.to_string(),
        lowering: now,
        ms: best,
        untuned_ms,
        tried,
    })
}

struct Bench<'a> {
    library: &'a Library,
    graph: &'a Graph,
    refit: Refit,
    /// Held during a measurement: only one at a time uses the GPU's memory and time.
    gpu: Mutex<()>,
}

impl Bench<'_> {
    fn attempt(&self, profile: &Profile, about: &str, what: &str, options: &LowerOptions) -> Attempt {
        let mut attempt = Attempt {
            about: about.to_string(),
            what: what.to_string(),
            ms: None,
            build_s: None,
            scratch_bytes: None,
            error: None,
        };
        if let Err(error) = self.measure(profile, options, &mut attempt) {
            attempt.error = Some(error.to_string());
        }
        attempt
    }

    fn measure(
        &self,
        profile: &Profile,
        options: &LowerOptions,
        attempt: &mut Attempt,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let network = lower::lower(self.graph, profile, options)?;
        let options = BuildOptions {
            refit: self.refit,
            ..BuildOptions::default()
        };
        let plans = tensorrt::build_all(self.library, &network, &options)?;
        let took: Duration = plans.iter().map(Plan::elapsed).sum();
        attempt.build_s = Some(took.as_secs_f64());
        // TensorRT's objects stay in the thread that made them.
        let runtime = Runtime::new(self.library)?;
        let loading = LoadOptions {
            graphs: true,
            kernels: None,
            caches: Caches::Tensors,
        };
        let bytes: Vec<&[u8]> = plans.iter().map(Plan::bytes).collect();
        let mut program = Program::load(&runtime, Path::new("(in memory)"), &bytes, &network, loading)?;
        if let Tokens::Dynamic { opt, .. } = profile.tokens {
            program.set_tokens(opt)?;
        }
        attempt.scratch_bytes = Some(program.scratch_bytes() as u64);
        let stream = Stream::new(runtime.cuda())?;
        let _alone = self.gpu.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut program = SyntheticProgram::new(program, &network, Caches::Tensors)?;
        // As if the cache were full: masked slots are read as well.
        for role in [Role::PositionIds, Role::WriteIndices] {
            program.set(role, profile.capacity as i32 - 1)?;
        }
        let took = program.time(&stream, RUNS)?;
        attempt.ms = Some(took.as_secs_f64() * 1e3);
        // Its memory is released before the next measurement.
        drop(program);
        Ok(())
    }
}

/// Applies the function to every item on several threads; results are in order.
fn in_parallel<T: Sync, R: Send>(threads: usize, items: &[T], function: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let done: Vec<Mutex<Option<R>>> = items.iter().map(|_| Mutex::new(None)).collect();
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, items.len().max(1)) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(i) else { return };
                    *done[i].lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(function(item));
                }
            });
        }
    });
    done.into_iter()
        .map(|slot| {
            slot.into_inner()
                .unwrap_or_else(|poisoned| poisoned.into_inner())
                .expect("every item was taken")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_once_and_in_order() {
        for threads in [1, 3, 16] {
            let items: Vec<usize> = (0..50).collect();
            assert_eq!(
                in_parallel(threads, &items, |i| i * i),
                items.iter().map(|i| i * i).collect::<Vec<_>>()
            );
        }
        assert_eq!(in_parallel(4, &[] as &[usize], |i| *i), [] as [usize; 0]);
    }
}
