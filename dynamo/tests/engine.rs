//! What the engine does with requests, without a frontend.

use std::path::PathBuf;
use std::sync::OnceLock;

use dynamo_backend_common::engine::GenerateContext;
use dynamo_backend_common::testing::mock_context;
use dynamo_backend_common::{
    BackendError, DynamoError, ErrorType, FinishReason, GuidedDecodingOptions, LLMEngine, LLMEngineOutput,
    OutputOptions, PreprocessedRequest, SamplingOptions, StopConditions,
};
use futures::StreamExt;
use lapidary::decode::{DeviceChoice, Limits, SessionOptions};
use lapidary::{Chain, Package, SamplerSettings, Session, generate};
use lapidary_dynamo::engine::{Engine, Options};

#[path = "../examples/tiny_package.rs"]
mod tiny_package;

/// Slots of the longest text.
const CAPACITY: usize = 512;

fn package() -> PathBuf {
    static PACKAGE: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let make = || {
        let folder = tempfile::tempdir().unwrap();
        let package = tiny_package::tiny_package(folder.path(), &[64, CAPACITY]).unwrap();
        (folder, package)
    };
    PACKAGE.get_or_init(make).1.clone()
}

async fn started(change: impl FnOnce(&mut Options)) -> Engine {
    let mut options = Options::on_cpu(package());
    change(&mut options);
    let engine = Engine::new(options);
    let config = engine.start(1).await.unwrap();
    let registered = config.llm.unwrap();
    assert_eq!(registered.context_length, Some(CAPACITY as u32));
    engine
}

#[derive(Clone, Default)]
struct Asked {
    prompt: Vec<u32>,
    stops: StopConditions,
    sampling: SamplingOptions,
    output: OutputOptions,
}

/// Greedy, with end tokens ignored.
fn asked(prompt: &[u32], max_tokens: u32) -> Asked {
    Asked {
        prompt: prompt.to_vec(),
        stops: StopConditions {
            max_tokens: Some(max_tokens),
            ignore_eos: Some(true),
            ..StopConditions::default()
        },
        sampling: SamplingOptions {
            temperature: Some(0.0),
            ..SamplingOptions::default()
        },
        output: OutputOptions::default(),
    }
}

impl Asked {
    fn request(self) -> PreprocessedRequest {
        PreprocessedRequest::builder()
            .model("tiny".to_string())
            .token_ids(self.prompt)
            .stop_conditions(self.stops)
            .sampling_options(self.sampling)
            .output_options(self.output)
            .build()
            .unwrap()
    }
}

async fn outputs(engine: &Engine, asked: Asked) -> Result<Vec<LLMEngineOutput>, DynamoError> {
    let stream = engine
        .generate(asked.request(), GenerateContext::new(mock_context(), None))
        .await?;
    stream.collect::<Vec<_>>().await.into_iter().collect()
}

fn tokens(outputs: &[LLMEngineOutput]) -> Vec<u32> {
    outputs.iter().flat_map(|output| output.token_ids.clone()).collect()
}

/// What Lapidary generates by itself.
fn alone(prompt: &[u32], count: usize) -> Vec<u32> {
    let package = Package::open(&package()).unwrap();
    let options = SessionOptions {
        device: DeviceChoice::Cpu,
        ..SessionOptions::default()
    };
    let mut session = Session::open(&package, &options).unwrap();
    let mut chain = Chain::new(&SamplerSettings::greedy()).unwrap();
    let limits = Limits {
        max_new_tokens: count,
        ..Limits::default()
    };
    generate(&mut session, None, prompt, &mut chain, &limits, |_| Ok(()))
        .unwrap()
        .tokens
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_those_of_generate_alone_and_among_others() {
    let engine = started(|_| ()).await;
    let prompts: Vec<Vec<u32>> = (0..6u32)
        .map(|i| (1..20 + i).map(|t| 3 + (t * (i + 3)) % 90).collect())
        .collect();
    let running = prompts.iter().map(|prompt| outputs(&engine, asked(prompt, 60)));
    let given = futures::future::join_all(running).await;
    for (prompt, given) in prompts.iter().zip(given) {
        let given = given.unwrap();
        assert_eq!(tokens(&given), alone(prompt, 60));
        let last = given.last().unwrap();
        assert_eq!(last.finish_reason, Some(FinishReason::Length));
        let usage = last.completion_usage.as_ref().unwrap();
        assert_eq!(
            (usage.prompt_tokens as usize, usage.completion_tokens),
            (prompt.len(), 60)
        );
    }
    engine.cleanup().await.unwrap();
}

/// As the frontend does when a worker is lost: the tokens so far become a part of the prompt.
#[tokio::test(flavor = "multi_thread")]
async fn a_text_that_moves_to_another_worker_goes_on_as_it_was() {
    let [one, other] = [started(|_| ()).await, started(|_| ()).await];
    for temperature in [0.0, 1.0] {
        let mut first = asked(&[1, 20, 5, 40], 100);
        first.sampling.temperature = Some(temperature);
        first.sampling.seed = Some(7);
        first.sampling.repetition_penalty = Some(1.1);
        let whole = tokens(&outputs(&one, first.clone()).await.unwrap());
        let mut second = first;
        second.prompt.extend(&whole[..37]);
        second.stops.max_tokens = Some(63);
        let rest = tokens(&outputs(&other, second).await.unwrap());
        assert_eq!(rest, whole[37..], "temperature {temperature}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_done_is_refused_by_name() {
    let engine = started(|_| ()).await;
    type Change = fn(&mut Asked);
    let changes: [(&str, Change); 18] = [
        ("the prompt has 512 tokens", |a| a.prompt = vec![5; CAPACITY]),
        ("the prompt is empty", |a| a.prompt.clear()),
        ("97", |a| a.prompt = vec![97]),
        ("max_tokens", |a| a.stops.max_tokens = Some(0)),
        ("n:", |a| a.sampling.n = Some(2)),
        ("best_of", |a| a.sampling.best_of = Some(3)),
        ("use_beam_search", |a| a.sampling.use_beam_search = Some(true)),
        ("length_penalty", |a| a.sampling.length_penalty = Some(0.5)),
        ("temperature", |a| a.sampling.temperature = Some(-1.0)),
        ("top_p", |a| a.sampling.top_p = Some(1.5)),
        ("max_thinking_tokens", |a| a.stops.max_thinking_tokens = Some(5)),
        ("prompt_logprobs", |a| a.output.prompt_logprobs = Some(1)),
        ("top_logprobs", |a| a.output.logprobs = Some(21)),
        ("guided_json", |a| {
            guided(a, |g| g.json = Some(serde_json::json!({"type": 5})))
        }),
        ("guided_regex", |a| guided(a, |g| g.regex = Some("(".into()))),
        ("guided_grammar", |a| {
            guided(a, |g| g.grammar = Some("root ::= missing".into()))
        }),
        ("structural_tag", |a| {
            guided(a, |g| g.structural_tag = Some(serde_json::json!({})))
        }),
        ("min_tokens", |a| {
            guided(a, |g| g.regex = Some("[a-z]+".into()));
            a.stops.min_tokens = Some(4);
        }),
    ];
    for (name, change) in changes {
        let mut request = asked(&[1, 20, 5], 4);
        change(&mut request);
        let error = outputs(&engine, request).await.expect_err(name);
        assert_eq!(
            error.error_type(),
            ErrorType::Backend(BackendError::InvalidArgument),
            "{name}: {error}"
        );
        assert!(error.to_string().contains(name), "{name}: {error}");
    }
    // The worker goes on.
    assert_eq!(
        tokens(&outputs(&engine, asked(&[1, 20, 5], 4)).await.unwrap()),
        alone(&[1, 20, 5], 4)
    );
}

fn guided(asked: &mut Asked, change: impl FnOnce(&mut GuidedDecodingOptions)) {
    let mut options = GuidedDecodingOptions::default();
    change(&mut options);
    asked.sampling.guided_decoding = Some(options);
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters_have_their_effect() {
    let engine = started(|_| ()).await;
    let plain = tokens(&outputs(&engine, asked(&[1, 20, 5], 30)).await.unwrap());
    // An end token of the request ends the text.
    let mut stopped = asked(&[1, 20, 5], 30);
    stopped.stops.ignore_eos = None;
    stopped.stops.stop_token_ids = Some(vec![plain[4]]);
    let given = outputs(&engine, stopped.clone()).await.unwrap();
    let end = plain
        .iter()
        .position(|token| *token == plain[4] || *token == 2)
        .unwrap();
    assert_eq!(tokens(&given), plain[..=end]);
    assert_eq!(given.last().unwrap().finish_reason, Some(FinishReason::Stop));
    // Not before so many tokens.
    stopped.stops.min_tokens = Some(20);
    assert!(tokens(&outputs(&engine, stopped).await.unwrap()).len() > 20);
    // The same seed draws the same tokens.
    let mut drawn = asked(&[1, 20, 5], 30);
    drawn.sampling.temperature = Some(1.0);
    drawn.sampling.seed = Some(3);
    let once = tokens(&outputs(&engine, drawn.clone()).await.unwrap());
    assert_eq!(once, tokens(&outputs(&engine, drawn.clone()).await.unwrap()));
    drawn.sampling.seed = Some(4);
    assert_ne!(once, tokens(&outputs(&engine, drawn).await.unwrap()));
    // Log-probabilities, the largest first.
    let mut logs = asked(&[1, 20, 5], 3);
    logs.output.logprobs = Some(4);
    for output in &outputs(&engine, logs).await.unwrap()[..3] {
        let top = &output.top_logprobs.as_ref().unwrap()[0];
        assert_eq!(top.len(), 4);
        assert!(top.windows(2).all(|pair| pair[0].logprob >= pair[1].logprob));
        assert_eq!(
            (top[0].token_id, top[0].logprob),
            (output.token_ids[0], output.log_probs.as_ref().unwrap()[0])
        );
    }
    // The form of a text.
    let mut form = asked(&[1, 20, 5], 60);
    form.stops.ignore_eos = None;
    guided(&mut form, |g| g.choice = Some(vec!["yes".into(), "no".into()]));
    let given = outputs(&engine, form).await.unwrap();
    let text: String = tokens(&given)
        .into_iter()
        .map(|id| char::from(b'!' + (id as u8 - 4)))
        .collect();
    assert!(["yes", "no"].contains(&text.as_str()), "{text:?}");
    assert_eq!(given.last().unwrap().finish_reason, Some(FinishReason::Stop));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_worker_says_so_and_a_stopping_one_hands_requests_on() {
    let engine = started(|options| {
        options.batch.sequences = 1;
        options.queue = 0;
    })
    .await;
    let context = GenerateContext::new(mock_context(), None);
    let mut only = engine.generate(asked(&[1, 20], 500).request(), context).await.unwrap();
    only.next().await.unwrap().unwrap();
    let error = outputs(&engine, asked(&[1, 20], 5)).await.unwrap_err();
    assert_eq!(error.error_type(), ErrorType::WorkerOverloaded, "{error}");
    let engine = started(|_| ()).await;
    let context = GenerateContext::new(mock_context(), None);
    let mut stream = engine.generate(asked(&[1, 20], 500).request(), context).await.unwrap();
    stream.next().await.unwrap().unwrap();
    engine.cleanup().await.unwrap();
    let error = stream
        .collect::<Vec<_>>()
        .await
        .into_iter()
        .find_map(Result::err)
        .expect("it was stopped");
    assert_eq!(
        error.error_type(),
        ErrorType::Backend(BackendError::EngineShutdown),
        "{error}"
    );
    let error = outputs(&engine, asked(&[1, 20], 5)).await.unwrap_err();
    assert_eq!(
        error.error_type(),
        ErrorType::Backend(BackendError::EngineShutdown),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_package_that_a_frontend_cannot_use_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let package = tiny_package::package_without("config.json", folder.path(), &[64]).unwrap();
    let start = async |package: PathBuf| Engine::new(Options::on_cpu(package)).start(1).await.unwrap_err();
    let error = start(package).await;
    assert!(error.to_string().contains("config.json is not there"), "{error}");
    let error = start(folder.path().join("nothing")).await;
    assert_eq!(
        error.error_type(),
        ErrorType::Backend(BackendError::InvalidArgument),
        "{error}"
    );
    assert!(error.to_string().contains("nothing"), "{error}");
}
