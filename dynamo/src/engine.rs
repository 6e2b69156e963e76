//! Implements Dynamo's engine trait with a [`Scheduler`].

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use dynamo_backend_common::engine::{GenerateContext, LlmRegistration, MetricsBindings, MetricsCtx};
use dynamo_backend_common::{
    CompletionUsage, ComponentSnapshot, DynamoError, EngineConfig, LLMEngine, LLMEngineOutput, LLMEngineOutputExt,
    PreprocessedRequest, PromptTokensDetails, SnapshotPublisher, TopLogprob, chunk, usage,
};
use futures::stream::BoxStream;
use lapidary::decode::batch::{BatchDecoder, BatchOptions};
use lapidary::decode::{DeviceChoice, FinishReason, SessionOptions, Step};
use lapidary::package::Package;
use lapidary::serve::{Event, Finished, Request, Scheduler, SchedulerOptions, Snapshot, prometheus};

use crate::errors;
use crate::request::{self, Model};

/// The package to run, and options.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its folder.
    pub package: PathBuf,
    /// Its name in requests.
    pub name: String,
    /// The device.
    pub device: DeviceChoice,
    /// Threads of the CPU executor; one per core if not given.
    pub threads: Option<usize>,
    /// The TensorRT library; searched for if not given.
    pub tensorrt_lib: Option<PathBuf>,
    /// Maximum of queued requests.
    pub queue: usize,
    /// Sequences, chunks and caches.
    pub batch: BatchOptions,
}

impl Options {
    /// A package under the name of its folder, on the CPU.
    pub fn on_cpu(package: PathBuf) -> Self {
        let name = package.file_name().map(|name| name.to_string_lossy().into_owned());
        Options {
            name: name.unwrap_or_default(),
            package,
            device: DeviceChoice::Cpu,
            threads: None,
            tensorrt_lib: None,
            queue: 64,
            batch: BatchOptions::default(),
        }
    }
}

/// The state of a started worker.
struct Running {
    scheduler: Scheduler,
    model: Model,
}

/// See the module's head.
pub struct Engine {
    options: Options,
    running: Mutex<Option<Arc<Running>>>,
}

/// The interval at which changed metrics are published.
const PUBLISHED_EVERY: Duration = Duration::from_millis(100);

impl Engine {
    /// An engine that has not started.
    pub fn new(options: Options) -> Self {
        Engine {
            options,
            running: Mutex::new(None),
        }
    }

    fn running(&self) -> Option<Arc<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn open(options: &Options) -> Result<Running, DynamoError> {
        let package = Package::open(&options.package).map_err(|error| errors::start(&error))?;
        let tokenizer = package.tokenizer().map_err(|error| errors::start(&error))?;
        let folder = options.package.display();
        let Some(tokenizer) = tokenizer else {
            return Err(errors::invalid(format!(
                "{folder}: the package has no tokenizer, which the frontend needs; convert again with --tokenizer FILE_OR_DIR"
            )));
        };
        // The frontend makes its model card from these.
        for file in ["config.json", "tokenizer_config.json"] {
            if !options.package.join("tokenizer").join(file).is_file() {
                return Err(errors::invalid(format!(
                    "{folder}: tokenizer/{file} is not there, and the frontend needs it; convert again with --tokenizer \
                     DIR of a folder that has it"
                )));
            }
        }
        let eos_ids = package.manifest.eos_token_ids.clone();
        let own = options.clone();
        let open = move || {
            let session = SessionOptions {
                device: own.device,
                threads: own.threads,
                tensorrt_lib: own.tensorrt_lib.as_deref(),
                note: &|why| tracing::warn!("running on the CPU: {why}"),
                ..SessionOptions::default()
            };
            BatchDecoder::open(&package, &session, own.batch)
        };
        let scheduling = SchedulerOptions {
            queue: options.queue,
            ..SchedulerOptions::default()
        };
        // The frontend handles text, so no tokenizer is needed.
        let scheduler = Scheduler::start(open, None, scheduling).map_err(|error| errors::start(&error))?;
        let facts = scheduler.facts().clone();
        let model = Model::new(&tokenizer, eos_ids, facts.vocabulary, facts.capacity)?;
        Ok(Running { scheduler, model })
    }
}

#[async_trait]
impl LLMEngine for Engine {
    async fn start(&self, worker_id: u64) -> Result<EngineConfig, DynamoError> {
        let options = self.options.clone();
        tracing::info!(worker_id, package = %options.package.display(), "opening the package");
        let opened = tokio::task::spawn_blocking(move || Self::open(&options)).await;
        let running = opened.map_err(|_| errors::gone())??;
        let facts = running.scheduler.facts().clone();
        tracing::info!(worker_id, device = %facts.device, engine = %facts.engine, "ready");
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(running));
        let chunk = self.options.batch.chunk;
        let chunks = facts.capacity.div_ceil(chunk) * facts.sequences;
        Ok(EngineConfig {
            model: self.options.name.clone(),
            served_model_name: Some(self.options.name.clone()),
            llm: Some(LlmRegistration {
                context_length: u32::try_from(facts.capacity).ok(),
                // Prefixes are shared in whole chunks.
                kv_cache_block_size: u32::try_from(chunk).ok(),
                total_kv_blocks: Some(chunks as u64),
                max_num_seqs: Some(facts.sequences as u64),
                max_num_batched_tokens: Some(chunk.max(facts.sequences) as u64),
                ..LlmRegistration::default()
            }),
            ..EngineConfig::default()
        })
    }

    async fn generate(
        &self,
        request: PreprocessedRequest,
        ctx: GenerateContext,
    ) -> Result<BoxStream<'static, Result<LLMEngineOutput, DynamoError>>, DynamoError> {
        let running = self.running().ok_or_else(errors::gone)?;
        let prompt = request.token_ids.len();
        let (sender, mut events) = tokio::sync::mpsc::unbounded_channel();
        let submit = move || {
            let asked = request::read(&request, &running.model)?;
            let request = Request {
                prompt: asked.prompt,
                sampling: asked.sampling,
                constraint: asked.constraint,
                limits: asked.limits,
                deadline: None,
                events: Box::new(move |event| sender.send(event).is_ok()),
            };
            running
                .scheduler
                .submit(request)
                .map_err(|refusal| errors::refused(&refusal))
        };
        // A large schema can take long.
        let submitted = tokio::task::spawn_blocking(submit).await;
        // Ends the request when the stream is dropped.
        let ticket = submitted.map_err(|_| errors::gone())??;
        Ok(Box::pin(async_stream::stream! {
            let ticket = ticket;
            let mut generated = 0;
            loop {
                let event = tokio::select! {
                    biased;
                    _ = ctx.stopped() => {
                        ticket.cancel();
                        yield Ok(LLMEngineOutput::cancelled().with_usage(usage(prompt as u32, generated)));
                        return;
                    }
                    event = events.recv() => event,
                };
                match event {
                    Some(Event::Piece { token: Some(token), step, .. }) => {
                        generated += 1;
                        yield Ok(piece(token, step));
                    }
                    Some(Event::Piece { token: None, .. }) => {}
                    Some(Event::Finished(finished)) => {
                        yield Ok(end(&finished));
                        return;
                    }
                    Some(Event::Failed(failure)) => {
                        yield Err(errors::failed(&failure));
                        return;
                    }
                    None => {
                        yield Err(errors::gone());
                        return;
                    }
                }
            }
        }))
    }

    async fn cleanup(&self) -> Result<(), DynamoError> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(running) = running {
            running.scheduler.stop();
            let ended = tokio::task::spawn_blocking(move || drop(running)).await;
            ended.map_err(|_| errors::gone())?;
        }
        Ok(())
    }

    async fn setup_metrics(&self, ctx: MetricsCtx<'_>) -> Result<MetricsBindings, DynamoError> {
        let Some(running) = self.running() else {
            return Ok(MetricsBindings::default());
        };
        let (weak, name) = (Arc::downgrade(&running), self.options.name.clone());
        ctx.metrics.add_expfmt_callback(Arc::new(move || {
            let running = weak.upgrade();
            let snapshot = running.map(|running| running.scheduler.metrics().snapshot());
            Ok(snapshot.map_or_else(String::new, |now| prometheus([(&name[..], now)])))
        }));
        let (weak, chunk) = (Arc::downgrade(&running), self.options.batch.chunk);
        let publish = move |publisher: Arc<SnapshotPublisher>| {
            tokio::spawn(async move {
                let mut before = None;
                // Until cleanup drops it.
                while let Some(running) = weak.upgrade() {
                    let now = component(&running.scheduler.metrics().snapshot(), &running.scheduler, chunk);
                    drop(running);
                    if before != Some(now) {
                        publisher.publish(0, now);
                        before = Some(now);
                    }
                    tokio::time::sleep(PUBLISHED_EVERY).await;
                }
            });
            Ok(())
        };
        Ok(MetricsBindings {
            dp_ranks: vec![0],
            on_publisher_ready: Some(Box::new(publish)),
        })
    }

    async fn health_check_payload(&self) -> Result<Option<serde_json::Value>, DynamoError> {
        // Computes one token: a worker whose device is lost is unhealthy.
        Ok(Some(serde_json::json!({
            "token_ids": [0],
            "sampling_options": {"temperature": 0.0},
            "stop_conditions": {"max_tokens": 1, "ignore_eos": true},
        })))
    }
}

/// The load metrics for a router.
fn component(now: &Snapshot, scheduler: &Scheduler, chunk: usize) -> ComponentSnapshot {
    let facts = scheduler.facts();
    let total = facts.capacity.div_ceil(chunk) * facts.sequences;
    let hits = (now.prompt_tokens > 0).then(|| now.reused_tokens as f32 / now.prompt_tokens as f32);
    ComponentSnapshot {
        kv_used_blocks: (now.cache_use * total as f64).ceil() as u64,
        kv_total_blocks: total as u64,
        gpu_cache_usage: now.cache_use as f32,
        kv_cache_hit_rate: hits,
        dp_rank: 0,
    }
}

fn piece(token: u32, step: Option<Step>) -> LLMEngineOutput {
    let mut output = chunk::token(token);
    if let Some(step) = step {
        let ranked = step
            .top_logprobs
            .iter()
            .enumerate()
            .map(|(i, (id, logprob))| TopLogprob {
                rank: i as u32 + 1,
                token_id: *id,
                // Set by the frontend.
                token: None,
                logprob: *logprob,
                bytes: None,
            });
        output.log_probs = Some(vec![step.logprob]);
        output.top_logprobs = Some(vec![ranked.collect()]);
    }
    output
}

fn end(finished: &Finished) -> LLMEngineOutput {
    let usage = CompletionUsage {
        prompt_tokens_details: Some(PromptTokensDetails {
            cached_tokens: Some(finished.reused as u32),
            ..PromptTokensDetails::default()
        }),
        ..usage(finished.prompt as u32, finished.generated as u32)
    };
    let output = match finished.reason {
        FinishReason::Stop => LLMEngineOutput::stop(),
        FinishReason::Length | FinishReason::Capacity => LLMEngineOutput::length(),
        FinishReason::Interrupted => LLMEngineOutput::cancelled(),
    };
    output.with_usage(usage)
}
