//! Runs a session as users do and times it: prefill by prompt length, decode by context length, end to end; and records its
//! answers.
//!
//! Everything goes through [`decode::stream`], so times include everything that users wait for: the sampler, the copy
//! of the logits, the moves of the cache. End tokens are ignored. Every part starts with a session that was restarted,
//! in the smallest capacity that fits; what is allocated or compiled then happens in the warm-up.

use std::ops::ControlFlow;
use std::time::Instant;

use super::result::{Decode, DeviceMemory, EndToEnd, LayerTimes, LogitRow, Memory, Model, Outputs, Peak, Prefill, Run};
use super::summary::{Summary, stable};
use super::workload::{Workload, WorkloadError};
use super::{layers, machine, model};
use crate::decode::{self, DeviceError, GenerateError, Limits, Session, SessionError};
use crate::help::{Fault, Help};
use crate::sample::{Chain, Settings, SettingsError};

/// Tokens of one run of a decode measurement: the context length grows by no more.
pub const DECODE_RUN: usize = 16;
/// Logits recorded per row.
const TOP: usize = 32;
/// Repetitions of the last step for device timing.
const DEVICE_RUNS: usize = 50;
/// Runs of a profile.
const PROFILE_RUNS: usize = 10;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Prompt lengths.
    pub prefill: Vec<usize>,
    /// Context lengths.
    pub decode: Vec<usize>,
    /// Prompt and new tokens.
    pub end_to_end: Vec<(usize, usize)>,
    /// Warm-up runs of each.
    pub warmup: usize,
    /// Samples of each prefill length.
    pub repetitions: usize,
    /// Minimum samples of each context length.
    pub decode_samples: usize,
    /// End-to-end runs.
    pub runs: usize,
    /// Greedy tokens of each prompt; 0: no outputs.
    pub outputs: usize,
    /// Time by layer, if the device supports it.
    pub profile: bool,
}

/// The measurements, without shares of values that are not known yet.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    pub prefill: Vec<Prefill>,
    pub decode: Vec<Decode>,
    pub end_to_end: Vec<EndToEnd>,
    pub outputs: Option<Outputs>,
    /// Memory of everything above, without engines loaded to time layers.
    pub memory: Memory,
    pub profile: Vec<(String, LayerTimes)>,
}

#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    #[error("{what} needs a cache of {needed} tokens, and the largest of this package has {capacity}")]
    Capacity {
        what: String,
        needed: usize,
        capacity: usize,
    },
    #[error("{what}: there is nothing to measure in that")]
    Nothing { what: String },
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    #[error(transparent)]
    Generate(#[from] GenerateError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Settings(#[from] SettingsError),
}

impl Help for MeasureError {
    fn fault(&self) -> Fault {
        match self {
            MeasureError::Capacity { .. } | MeasureError::Nothing { .. } => Fault::Input,
            MeasureError::Workload(error) => error.fault(),
            MeasureError::Generate(error) => error.fault(),
            MeasureError::Session(error) => error.fault(),
            MeasureError::Device(error) => error.fault(),
            MeasureError::Settings(error) => error.fault(),
        }
    }

    fn help(&self) -> Option<String> {
        match self {
            MeasureError::Capacity { .. } => {
                Some("ask for less, or convert the model again with a larger --capacity".to_string())
            }
            MeasureError::Nothing { .. } => Some("lengths begin at 1".to_string()),
            MeasureError::Workload(error) => error.help(),
            MeasureError::Generate(error) => error.help(),
            MeasureError::Session(error) => error.help(),
            MeasureError::Device(error) => error.help(),
            MeasureError::Settings(error) => error.help(),
        }
    }
}

impl Plan {
    /// Refuses impossible measurements before anything runs.
    pub fn check(&self, workload: &Workload, capacity: usize) -> Result<(), MeasureError> {
        let mut needs = Vec::new();
        for n in &self.prefill {
            needs.push((format!("a prefill of {n} tokens"), *n, *n, *n));
        }
        for n in &self.decode {
            needs.push((format!("decoding after {n} tokens"), *n, *n, n + 1));
        }
        for (n, new) in &self.end_to_end {
            // The last token drawn is not fed.
            let what = format!("{n} prompt tokens and {new} new ones");
            needs.push((what, *n, n.min(new).to_owned(), n + new.saturating_sub(1)));
        }
        for (what, prompt, least, needed) in needs {
            if least == 0 {
                return Err(MeasureError::Nothing { what });
            }
            if needed > capacity {
                return Err(MeasureError::Capacity { what, needed, capacity });
            }
            workload.prompt(prompt)?;
        }
        if self.outputs == 0 {
            return Ok(());
        }
        for (i, prompt) in workload.prompts.iter().enumerate() {
            let needed = prompt.len() + (self.outputs - 1);
            if needed > capacity {
                let what = format!("the output of prompt {i}, {} tokens,", prompt.len());
                return Err(MeasureError::Capacity { what, needed, capacity });
            }
        }
        Ok(())
    }

    /// The longest prompt and the longest text, to load everything in advance.
    pub fn extent(&self, workload: &Workload) -> (usize, usize) {
        let outputs = match self.outputs {
            0 => &[][..],
            _ => &workload.prompts[..],
        };
        let prompts = self.prefill.iter().chain(&self.decode).copied();
        let prompts = prompts.chain(self.end_to_end.iter().map(|(n, _)| *n));
        let texts = self.end_to_end.iter().map(|(n, new)| n + new);
        let texts = texts.chain(self.decode.iter().map(|n| n + DECODE_RUN));
        let texts = texts.chain(outputs.iter().map(|p| p.len() + self.outputs));
        let prompt = prompts.chain(outputs.iter().map(Vec::len)).max().unwrap_or(1);
        (prompt, texts.max().unwrap_or(1).max(prompt))
    }

    /// Number of parts for progress reports.
    fn parts(&self) -> usize {
        let others = usize::from(self.outputs > 0) + usize::from(self.profile);
        (self.prefill.len() + self.decode.len() + self.end_to_end.len() + others).max(1)
    }
}

/// Runs the whole plan. `settings` are the sampler's; `on_part` gets the name of each part as it begins, and the
/// completed share.
pub fn measure(
    session: &mut Session,
    plan: &Plan,
    workload: &Workload,
    settings: &Settings,
    mut on_part: impl FnMut(&str, f32),
) -> Result<Measured, MeasureError> {
    plan.check(workload, session.largest_capacity())?;
    let mut out = Measured::default();
    let mut bench = Bench { session, settings };
    bench.note_memory(&mut out.memory);
    let mut done = 0;
    let mut part = |what: String| {
        on_part(&what, done as f32 / plan.parts() as f32);
        done += 1;
    };
    if plan.outputs > 0 {
        part("outputs".to_string());
        out.outputs = Some(bench.outputs(workload, plan.outputs)?);
        bench.note_memory(&mut out.memory);
    }
    for n in &plan.prefill {
        part(format!("prefill of {n} tokens"));
        out.prefill.push(bench.prefill(workload.prompt(*n)?, plan)?);
        bench.note_memory(&mut out.memory);
    }
    for n in &plan.decode {
        part(format!("decode after {n} tokens"));
        out.decode.push(bench.decode(workload.prompt(*n)?, plan)?);
        bench.note_memory(&mut out.memory);
    }
    for (n, new) in &plan.end_to_end {
        part(format!("{n} prompt tokens, {new} new ones"));
        out.end_to_end.push(bench.end_to_end(workload.prompt(*n)?, *new, plan)?);
        bench.note_memory(&mut out.memory);
    }
    if plan.profile {
        part("layers".to_string());
        out.profile = bench.profiles(plan, workload)?;
    }
    Ok(out)
}

impl Measured {
    /// Fills in the shares of the copy bandwidth and of the peak.
    pub fn relate(&mut self, model: &Model, bandwidth: Option<f64>, peak: Option<&Peak>) {
        for prefill in &mut self.prefill {
            let flop = model::prefill_flop(model, prefill.tokens);
            prefill.mfu = flop
                .zip(peak)
                .map(|(flop, peak)| flop / (prefill.ms.median / 1e3) / peak.flops);
        }
        for decode in &mut self.decode {
            let bytes = model::decode_bytes(model, decode.live);
            decode.mbu = bandwidth.map(|bandwidth| bytes / (decode.ms.median / 1e3) / bandwidth);
        }
    }
}

/// The time of each token of a run.
struct Stamps {
    start: Instant,
    tokens: Vec<Instant>,
    end: Instant,
}

impl Stamps {
    fn ttft_ms(&self) -> f64 {
        (self.tokens[0] - self.start).as_secs_f64() * 1e3
    }

    fn between_ms(&self) -> impl Iterator<Item = f64> {
        self.tokens
            .windows(2)
            .map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3)
    }
}

struct Bench<'a> {
    session: &'a mut Session,
    settings: &'a Settings,
}

impl Bench<'_> {
    /// Draws `new` tokens after the prompt; a cached prefix is reused.
    fn run(&mut self, prompt: &[u32], new: usize, settings: &Settings) -> Result<(Vec<u32>, Stamps), MeasureError> {
        let mut chain = Chain::new(settings)?;
        let limits = Limits {
            max_new_tokens: new,
            ..Limits::default()
        };
        let mut tokens = Vec::with_capacity(new);
        let start = Instant::now();
        let generation = decode::stream(self.session, None, prompt, &mut chain, &limits, |_| {
            tokens.push(Instant::now());
            Ok(ControlFlow::Continue(()))
        })?;
        let end = Instant::now();
        Ok((generation.tokens, Stamps { start, tokens, end }))
    }

    fn prefill(&mut self, prompt: &[u32], plan: &Plan) -> Result<Prefill, MeasureError> {
        self.session.restart();
        let mut samples_ms = Vec::new();
        for i in 0..plan.warmup + plan.repetitions.max(1) {
            self.session.clear();
            let (_, stamps) = self.run(prompt, 1, self.settings)?;
            if i >= plan.warmup {
                samples_ms.push(stamps.ttft_ms());
            }
        }
        let ms = Summary::of(&samples_ms).expect("times are finite");
        Ok(Prefill {
            tokens: prompt.len(),
            prefill_tokens_per_s: prompt.len() as f64 / (ms.median / 1e3),
            mfu: None,
            stable: stable(&samples_ms),
            samples_ms,
            ms,
        })
    }

    fn decode(&mut self, prompt: &[u32], plan: &Plan) -> Result<Decode, MeasureError> {
        self.session.restart();
        // The first drawn token comes from the prompt, and the last is not fed.
        let steps = self.steps(prompt);
        let mut samples_ms = Vec::new();
        let mut runs = 0;
        while samples_ms.len() < plan.decode_samples.max(1) {
            let (_, stamps) = self.run(prompt, steps + 1, self.settings)?;
            // The first run computes the prompt, loads and moves; later ones have its cache.
            if runs >= plan.warmup.max(1) {
                samples_ms.extend(stamps.between_ms());
            }
            runs += 1;
        }
        let ms = Summary::of(&samples_ms).expect("times are finite");
        let gpu_ms = match self.session.instruments() {
            Some(device) => Some(device.step_time(DEVICE_RUNS)?.as_secs_f64() * 1e3),
            None => None,
        };
        Ok(Decode {
            live: prompt.len(),
            capacity: Some(self.session.capacity()),
            gpu_ms,
            output_tokens_per_s: 1e3 / ms.median,
            mbu: None,
            stable: stable(&samples_ms),
            samples_ms,
            ms,
        })
    }

    fn end_to_end(&mut self, prompt: &[u32], new: usize, plan: &Plan) -> Result<EndToEnd, MeasureError> {
        let mut runs = Vec::new();
        let warmup = plan.warmup.min(1);
        for i in 0..warmup + plan.runs.max(1) {
            // Back to a cache for the prompt, allocated and used once; then the text as a user would get it.
            self.session.restart();
            self.session.feed(prompt)?;
            self.session.clear();
            let (tokens, stamps) = self.run(prompt, new, self.settings)?;
            if i >= warmup {
                runs.push(Run {
                    ttft_ms: stamps.ttft_ms(),
                    latency_ms: (stamps.end - stamps.start).as_secs_f64() * 1e3,
                    tokens: tokens.len(),
                    itl_samples_ms: stamps.between_ms().collect(),
                });
            }
        }
        Ok(EndToEnd::of(prompt.len(), new, runs))
    }

    fn outputs(&mut self, workload: &Workload, new: usize) -> Result<Outputs, MeasureError> {
        let greedy = Settings {
            temperature: 0.0,
            ..Settings::neutral()
        };
        let mut outputs = Outputs {
            prompts: workload.prompts.clone(),
            greedy_tokens: Vec::new(),
            logits: Vec::new(),
            reference: None,
        };
        for (i, prompt) in workload.prompts.iter().enumerate() {
            self.session.restart();
            outputs.greedy_tokens.push(self.run(prompt, new, &greedy)?.0);
            self.session.restart();
            let forced = workload.forced.as_ref().map_or(&[][..], |forced| &forced[i]);
            outputs.logits.push(logit_row(i, 0, self.session.feed(prompt)?));
            for (step, token) in forced.iter().take(new - 1).enumerate() {
                outputs
                    .logits
                    .push(logit_row(i, step + 1, self.session.feed(&[*token])?));
            }
        }
        Ok(outputs)
    }

    /// Tokens of a decode run after a prompt, limited by the capacity.
    fn steps(&self, prompt: &[u32]) -> usize {
        DECODE_RUN.min(self.session.largest_capacity() - prompt.len())
    }

    /// Time by layer of the last call of each prefill and of each decode run.
    fn profiles(&mut self, plan: &Plan, workload: &Workload) -> Result<Vec<(String, LayerTimes)>, MeasureError> {
        let mut found = Vec::new();
        if self.session.instruments().is_none() {
            return Ok(found);
        }
        let prefills = plan.prefill.iter().map(|n| (format!("prefill {n}"), *n, false));
        let decodes = plan.decode.iter().enumerate().map(|(i, n)| match i {
            // Reporting draws.
            0 => ("decode".to_string(), *n, true),
            _ => (format!("decode {n}"), *n, true),
        });
        for (name, n, decode) in prefills.chain(decodes) {
            let prompt = workload.prompt(n)?;
            self.session.restart();
            let more = if decode { self.steps(prompt) } else { 0 };
            self.run(prompt, more + 1, self.settings)?;
            let live = self.session.tokens().len();
            let device = self.session.instruments().expect("asked above");
            found.push((name, layers::grouped(live, device.layer_times(PROFILE_RUNS)?)));
        }
        Ok(found)
    }

    /// Records the peak memory of the process and the device.
    fn note_memory(&mut self, memory: &mut Memory) {
        memory.peak_host_bytes = machine::peak_host_bytes();
        memory.peak_anonymous_host_bytes = memory.peak_anonymous_host_bytes.max(machine::anonymous_host_bytes());
        // The device records its own.
        memory.device = self.session.instruments().map(|device| {
            let used = device.memory();
            DeviceMemory {
                weights: Some(used.weights),
                cache: Some(used.cache),
                scratch: Some(used.scratch),
                context: Some(used.context),
                total: used.total,
            }
        });
    }
}

impl EndToEnd {
    /// Summaries of runs, of which there is at least one. Runs of one token have no time between tokens; they count as 0.
    pub fn of(prompt: usize, new_tokens: usize, runs: Vec<Run>) -> Self {
        let summary = |of: fn(&Run) -> f64| {
            let samples: Vec<f64> = runs.iter().map(of).collect();
            Summary::of(&samples).expect("times are finite")
        };
        let latencies: Vec<f64> = runs.iter().map(|run| run.latency_ms).collect();
        let tokens: usize = runs.iter().map(|run| run.tokens).sum();
        EndToEnd {
            prompt,
            new_tokens,
            ttft_ms: summary(|run| run.ttft_ms),
            tpot_ms: summary(Run::tpot_ms),
            itl_ms: summary(Run::itl_ms),
            latency_ms: summary(|run| run.latency_ms),
            output_tokens_per_s: tokens as f64 / (latencies.iter().sum::<f64>() / 1e3),
            stable: stable(&latencies),
            runs,
        }
    }
}

impl Run {
    fn later(&self) -> f64 {
        self.tokens.saturating_sub(1).max(1) as f64
    }

    /// Time between the first and the last token, over the tokens after the first.
    pub fn tpot_ms(&self) -> f64 {
        self.itl_samples_ms.iter().sum::<f64>() / self.later()
    }

    /// Latency minus time to first token, over the tokens after the first.
    pub fn itl_ms(&self) -> f64 {
        match self.tokens {
            0 | 1 => 0.0,
            _ => (self.latency_ms - self.ttft_ms) / self.later(),
        }
    }
}

fn logit_row(prompt: usize, step: usize, logits: &[f32]) -> LogitRow {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let falling = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let top = TOP.min(order.len());
    if top < order.len() {
        order.select_nth_unstable_by(top, falling);
        order.truncate(top);
    }
    order.sort_unstable_by(falling);
    let top: Vec<(u32, f64)> = order.iter().map(|id| (*id, f64::from(logits[*id as usize]))).collect();
    let squares: f64 = logits.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    LogitRow {
        prompt,
        step,
        margin: match &top[..] {
            [first, second, ..] => Some(first.1 - second.1),
            _ => None,
        },
        norm: Some(squares.sqrt()),
        top,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_keeps_its_largest_logits() {
        let logits: Vec<f32> = (0..40).map(|i| (i * 7 % 40) as f32).collect();
        let row = logit_row(2, 1, &logits);
        assert_eq!(
            (row.prompt, row.step, row.top.len(), row.margin),
            (2, 1, TOP, Some(1.0))
        );
        assert_eq!(row.top[0], (17, 39.0), "17 * 7 is 119, 39 more than 2 * 40");
        assert!(row.top.windows(2).all(|pair| pair[0].1 > pair[1].1));
        assert!((row.norm.unwrap() - (39.0 * 40.0 * 79.0 / 6.0f64).sqrt()).abs() < 1e-9);
        let ties = logit_row(0, 0, &[1.0, 2.0, 2.0]);
        assert_eq!(ties.top, [(1, 2.0), (2, 2.0), (0, 1.0)]);
    }

    #[test]
    fn summaries_of_runs_by_hand() {
        let run = |ttft_ms: f64, itl: &[f64], tail: f64| Run {
            ttft_ms,
            latency_ms: ttft_ms + itl.iter().sum::<f64>() + tail,
            tokens: itl.len() + 1,
            itl_samples_ms: itl.to_vec(),
        };
        let all = EndToEnd::of(5, 3, vec![run(10.0, &[1.0, 2.0], 1.0), run(20.0, &[3.0, 2.0], 0.0)]);
        assert_eq!((all.ttft_ms.mean, all.tpot_ms.mean, all.itl_ms.mean), (15.0, 2.0, 2.25));
        assert_eq!(all.latency_ms.max, 25.0);
        assert!((all.output_tokens_per_s - 6.0 / 0.039).abs() < 1e-9);
        assert!(!all.stable);
        let single = EndToEnd::of(5, 1, vec![run(10.0, &[], 0.5)]);
        assert_eq!((single.tpot_ms.mean, single.itl_ms.mean), (0.0, 0.0));
    }
}
