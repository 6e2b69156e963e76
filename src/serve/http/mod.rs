//! The server: OpenAI's endpoints over HTTP, in front of schedulers.
//!
//! Reads bodies as bytes and writes JSON or server-sent events. `chat` and `completions` define request bodies,
//! `fields` their common fields, `forms` the form that a text must have, `reply` submits the request and writes the
//! answer in one of the `shapes`, `tokens` is the tokenizer endpoints, `body` reads bodies, `error` is every refusal, `log` a line per request,
//! `page.html` a chat in a browser. A request cannot name a file.

mod body;
mod chat;
mod completions;
mod error;
mod fields;
mod forms;
mod log;
mod model;
mod reply;
mod shapes;
mod tokens;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;

use body::Bodies;
use error::ApiError;
pub use model::Model;
use reply::{Asked, json_response, respond};

use crate::serve::{SubmitError, prometheus};

/// Limits of one request.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a body.
    pub body: usize,
    /// Tokens of a prompt; the context of the model if not given.
    pub prompt: Option<usize>,
    /// Prompts times choices.
    pub choices: usize,
    /// Time from arrival to the last token.
    pub timeout: Option<Duration>,
    /// Time for the head of a request to arrive.
    pub header_timeout: Duration,
    /// Time for a body to arrive.
    pub body_timeout: Duration,
    /// Time for a client to read; one that does not is disconnected, and its requests end.
    pub write_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            body: 4 << 20,
            prompt: None,
            choices: 128,
            timeout: None,
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
        }
    }
}

impl Limits {
    fn check_prompt(&self, prompt: &[u32]) -> Result<(), ApiError> {
        match self.prompt {
            Some(most) if prompt.len() > most => {
                let message = format!("the prompt has {} tokens, and this server takes {most}", prompt.len());
                Err(ApiError::bad(message).code("context_length_exceeded"))
            }
            _ => Ok(()),
        }
    }
}

/// API keys, by their hashes: comparing hashes does not reveal how much of a key was right.
#[derive(Clone, Debug, Default)]
pub struct Keys(Vec<blake3::Hash>);

impl Keys {
    /// One per line; empty lines and lines that begin with `#` are ignored.
    pub fn of_lines(text: &str) -> Self {
        let keys = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        Keys(keys.map(|key| blake3::hash(key.as_bytes())).collect())
    }

    /// Adds a key.
    pub fn add(&mut self, key: &str) {
        self.0.push(blake3::hash(key.as_bytes()));
    }

    /// Without keys, every client is served.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn has(&self, key: &str) -> bool {
        let hash = blake3::hash(key.as_bytes());
        self.0.contains(&hash)
    }
}

/// The models and the access rules.
pub struct Server {
    models: Vec<Arc<Model>>,
    limits: Limits,
    keys: Keys,
    logs: bool,
    started: u64,
    stops: AtomicBool,
    bodies: Bodies,
    /// Places for those that parse.
    parsing: Arc<Semaphore>,
}

impl Server {
    /// Serves these models, whose names differ. `logs`: a line of JSON is written to standard error for each request.
    pub fn new(models: Vec<Model>, limits: Limits, keys: Keys, logs: bool) -> Arc<Self> {
        let parsers = std::thread::available_parallelism().map_or(1, usize::from);
        Arc::new(Server {
            models: models.into_iter().map(Arc::new).collect(),
            bodies: Bodies::new(limits.body, limits.body_timeout),
            limits,
            keys,
            logs,
            started: fields::now(),
            stops: AtomicBool::new(false),
            parsing: Arc::new(Semaphore::new(parsers)),
        })
    }

    /// Answers connections of this listener until `stop` is ready; running requests then have at most `grace` to
    /// finish.
    pub async fn run(
        self: Arc<Self>,
        listener: tokio::net::TcpListener,
        stop: impl Future<Output = ()>,
        grace: Duration,
    ) {
        let mut http = hyper::server::conn::http1::Builder::new();
        http.timer(TokioTimer::new())
            .header_read_timeout(self.limits.header_timeout);
        let service = TowerToHyperService::new(self.clone().router());
        let connections = GracefulShutdown::new();
        tokio::pin!(stop);
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        // Each token is sent at once, however small.
                        let _ = stream.set_nodelay(true);
                        let mut stream = TimeoutStream::new(stream);
                        stream.set_write_timeout(Some(self.limits.write_timeout));
                        let connection = http.serve_connection(TokioIo::new(Box::pin(stream)), service.clone());
                        let connection = connections.watch(connection);
                        // Errors of one connection concern only its client.
                        tokio::spawn(async move { drop(connection.await) });
                    }
                    // Too many open files, for example: existing connections continue.
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                },
                () = &mut stop => break,
            }
        }
        drop(listener);
        self.stops.store(true, Ordering::Relaxed);
        self.models.iter().for_each(|model| model.scheduler.drain());
        let ended = connections.shutdown();
        tokio::pin!(ended);
        if tokio::time::timeout(grace, &mut ended).await.is_err() {
            self.models.iter().for_each(|model| model.scheduler.stop());
            // Clients that still read receive the error of stopped requests.
            let _ = tokio::time::timeout(Duration::from_secs(2), ended).await;
        }
    }

    fn router(self: Arc<Self>) -> Router {
        let guarded = Router::new()
            .route("/v1/chat/completions", post(chat_completions))
            .route("/v1/completions", post(text_completions))
            .route("/v1/embeddings", post(no_embeddings))
            .route("/v1/models", get(list_models))
            // A name may contain slashes.
            .route("/v1/models/{*name}", get(one_model))
            .route("/tokenize", post(tokenize))
            .route("/detokenize", post(detokenize))
            .layer(middleware::from_fn_with_state(self.clone(), check_key));
        let open = Router::new()
            .route("/", get(page))
            // Also the probe paths of vLLM and of llama.cpp's server.
            .route("/health", get(health))
            .route("/v1/health", get(health))
            .route("/ping", get(health))
            .route("/version", get(version))
            .route("/metrics", get(metrics));
        guarded
            .merge(open)
            .fallback(|request: Request| async move {
                let message = format!("there is no {} {}", request.method(), request.uri().path());
                ApiError::new(StatusCode::NOT_FOUND, message)
            })
            .method_not_allowed_fallback(|request: Request| async move {
                let message = format!("{} does not take {}", request.uri().path(), request.method());
                ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
            })
            .layer(middleware::from_fn_with_state(self.clone(), read_body))
            .layer(middleware::from_fn_with_state(self.clone(), log_refusals))
            .with_state(self)
    }

    /// Whether a request has one of the keys, or none is asked for.
    fn has_key(&self, headers: &HeaderMap) -> bool {
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let key = given.and_then(|value| value.split_once(' '));
        // Names of schemes have no case.
        let key = key.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        self.keys.is_empty() || key.is_some_and(|(_, key)| self.keys.has(key.trim()))
    }

    /// The model with a name; the only package if there is no name.
    fn find(&self, name: Option<&str>) -> Result<Arc<Model>, ApiError> {
        let mut packages = self.models.iter().filter(|model| model.parent.is_none());
        let found = match name.filter(|name| !name.is_empty()) {
            Some(name) => self.models.iter().find(|model| model.name == name),
            None => match (packages.next(), packages.next()) {
                (only, None) => only,
                _ => return Err(ApiError::field("model", "there are several; name one")),
            },
        };
        found.cloned().ok_or_else(|| {
            let names: Vec<&str> = self.models.iter().map(|model| &model.name[..]).collect();
            let message = format!(
                "unknown model {:?}; the models are {}",
                name.unwrap_or(""),
                names.join(", ")
            );
            let missing = ApiError::new(StatusCode::NOT_FOUND, message).code("model_not_found");
            ApiError {
                param: Some("model".into()),
                ..missing
            }
        })
    }
}

/// Runs slow work, such as encoding a long text, outside the threads that answer connections. At most one task per processor
/// runs at a time: parsing a body takes several times its bytes, and the scheduler needs a processor, too.
async fn off_thread<T: Send + 'static>(
    server: &Server,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let place = server.parsing.clone().acquire_owned().await;
    let place = place.expect("the semaphore is never closed");
    let work = move || {
        // Also when the client is gone: the work goes on.
        let _place = place;
        work()
    };
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| {
        let message = "the request could not be read: this is a bug in Lapidary";
        Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message))
    })
}

type Shared = State<Arc<Server>>;
type Parse = fn(&Server, &[u8]) -> Result<Asked, ApiError>;

async fn answer(server: Arc<Server>, body: Body, parse: Parse) -> Result<Response, ApiError> {
    if server.stops.load(Ordering::Relaxed) {
        return Err((&SubmitError::Stopping).into());
    }
    let bytes = body::read_before(body).await?;
    let logs = server.logs;
    let asked = off_thread(&server.clone(), move || parse(&server, &bytes)).await?;
    respond(Asked { logs, ..asked }).await
}

async fn chat_completions(State(server): Shared, body: Body) -> Result<Response, ApiError> {
    answer(server, body, |server, body| {
        chat::parse(|name| server.find(name), &server.limits, body)
    })
    .await
}

async fn text_completions(State(server): Shared, body: Body) -> Result<Response, ApiError> {
    answer(server, body, |server, body| {
        completions::parse(|name| server.find(name), &server.limits, body)
    })
    .await
}

async fn no_embeddings() -> ApiError {
    let message = "embeddings are not supported: these models generate text";
    ApiError::new(StatusCode::NOT_IMPLEMENTED, message).code("unsupported")
}

async fn tokenize(State(server): Shared, body: Body) -> Result<Response, ApiError> {
    let bytes = body::read_before(body).await?;
    let document = off_thread(&server.clone(), move || {
        tokens::tokenize(|name| server.find(name), &bytes)
    })
    .await?;
    Ok(json_response(&document))
}

async fn detokenize(State(server): Shared, body: Body) -> Result<Response, ApiError> {
    let bytes = body::read_before(body).await?;
    let document = off_thread(&server.clone(), move || {
        tokens::detokenize(|name| server.find(name), &bytes)
    })
    .await?;
    Ok(json_response(&document))
}

fn model_document(server: &Server, model: &Model) -> Value {
    let mut document = json!({
        "id": model.name,
        "object": "model",
        "created": server.started,
        "owned_by": "lapidary",
        "max_model_len": model.capacity(),
    });
    if let Some(parent) = &model.parent {
        document["parent"] = json!(parent);
    }
    document
}

async fn list_models(State(server): Shared) -> Response {
    let models: Vec<Value> = server
        .models
        .iter()
        .map(|model| model_document(&server, model))
        .collect();
    json_response(&json!({"object": "list", "data": models}))
}

async fn one_model(State(server): Shared, Path(name): Path<String>) -> Result<Response, ApiError> {
    let model = server.find(Some(&name))?;
    Ok(json_response(&model_document(&server, &model)))
}

async fn health(State(server): Shared) -> Result<Response, ApiError> {
    if server.stops.load(Ordering::Relaxed) {
        return Err((&SubmitError::Stopping).into());
    }
    match server.models.iter().find(|model| model.scheduler.is_over()) {
        None => Ok(json_response(&json!({"status": "ok"}))),
        Some(model) => {
            let message = format!("the device of {:?} failed", model.name);
            Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message))
        }
    }
}

async fn version() -> Response {
    json_response(&json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// The chat page for a browser. It loads nothing else, and may connect only to this server.
async fn page() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        ),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (headers, include_str!("page.html")).into_response()
}

async fn metrics(State(server): Shared) -> Response {
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4")];
    let models = server.models.iter();
    let text = prometheus(models.map(|model| (&model.name[..], model.scheduler.metrics().snapshot())));
    (kind, text).into_response()
}

/// Reads the body in every case: a connection with an unread body could not be reused, and its client would not know. The body of
/// a client without a key is not kept.
async fn read_body(State(server): Shared, request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    let read = match server.has_key(&head.headers) {
        true => {
            let waits = head.headers.contains_key(header::EXPECT);
            server.bodies.read(body, waits).await.map(Body::from)
        }
        false => server.bodies.discard(body).await.map(|()| Body::empty()),
    };
    match read {
        Ok(body) => next.run(Request::from_parts(head, body)).await,
        Err(error) => {
            let mut response = error.into_response();
            let close = header::HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
            response
        }
    }
}

async fn log_refusals(State(server): Shared, request: Request, next: Next) -> Response {
    let (method, path) = (request.method().to_string(), request.uri().path().to_string());
    let response = next.run(request).await;
    let status = response.status();
    if server.logs && (status.is_client_error() || status.is_server_error()) {
        log::refused(&method, &path, status.as_u16());
    }
    response
}

async fn check_key(State(server): Shared, request: Request, next: Next) -> Response {
    match server.has_key(request.headers()) {
        true => next.run(request).await,
        false => {
            let message = "give one of this server's keys: Authorization: Bearer KEY";
            let refused = ApiError::new(StatusCode::UNAUTHORIZED, message).code("invalid_api_key");
            refused.into_response()
        }
    }
}
