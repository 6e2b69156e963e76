//! Counters of schedulers in Prometheus' text format.
//!
//! Queue, running requests, cache use, tokens and latencies have vLLM's names, which inference gateways read (the Gateway
//! API's inference extension asks for `vllm:num_requests_waiting` and `vllm:kv_cache_usage_perc` by default).

use std::fmt::Write;

use super::metrics::{Histogram, Snapshot, metric_ends};

/// All metrics of these models, by model name.
pub fn prometheus<'a>(models: impl IntoIterator<Item = (&'a str, Snapshot)>) -> String {
    let models = models.into_iter();
    let all: Vec<(String, Snapshot)> = models.map(|(name, snapshot)| (escaped(name), snapshot)).collect();
    let mut page = Page {
        text: String::new(),
        all: &all,
    };
    page.number(
        "vllm:num_requests_running",
        "gauge",
        "Requests that have a sequence.",
        |s| s.running as f64,
    );
    page.number(
        "vllm:num_requests_waiting",
        "gauge",
        "Requests that wait for a place.",
        |s| s.waiting as f64,
    );
    page.number(
        "vllm:kv_cache_usage_perc",
        "gauge",
        "Share of the slots of all caches that running sequences use, 0 to 1.",
        |s| s.cache_use,
    );
    page.number(
        "vllm:prompt_tokens_total",
        "counter",
        "Prompt tokens, reused ones included.",
        |s| s.prompt_tokens as f64,
    );
    page.number("vllm:generation_tokens_total", "counter", "Tokens generated.", |s| {
        s.generated_tokens as f64
    });
    page.number(
        "vllm:prefix_cache_hits_total",
        "counter",
        "Prompt tokens whose keys were there.",
        |s| s.reused_tokens as f64,
    );
    page.number(
        "vllm:prefix_cache_queries_total",
        "counter",
        "Prompt tokens that were looked for.",
        |s| s.prompt_tokens as f64,
    );
    page.histogram(
        "vllm:time_to_first_token_seconds",
        "From arrival to the first token.",
        |s| &s.to_first_token,
    );
    page.histogram(
        "vllm:inter_token_latency_seconds",
        "From one token of a request to its next.",
        |s| &s.between_tokens,
    );
    page.histogram(
        "vllm:request_queue_time_seconds",
        "From arrival to the first chunk of the prompt.",
        |s| &s.queued,
    );
    page.histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", |s| {
        &s.whole
    });
    page.ends();
    page.number(
        "lapidary:requests_rejected_total",
        "counter",
        "Requests that found the queue full.",
        |s| s.rejected as f64,
    );
    page.number(
        "lapidary:decode_steps_total",
        "counter",
        "Steps of one token of some sequences.",
        |s| s.steps as f64,
    );
    page.number(
        "lapidary:cache_running_bytes",
        "gauge",
        "Bytes of caches of running sequences.",
        |s| s.cache_bytes[0] as f64,
    );
    page.number(
        "lapidary:cache_kept_bytes",
        "gauge",
        "Bytes of caches kept for their prefixes.",
        |s| s.cache_bytes[1] as f64,
    );
    page.text
}

struct Page<'a> {
    text: String,
    /// Each model's name, as a label, and its counts.
    all: &'a [(String, Snapshot)],
}

impl Page<'_> {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn number(&mut self, name: &str, kind: &str, help: &str, of: impl Fn(&Snapshot) -> f64) {
        self.head(name, kind, help);
        for (model, snapshot) in self.all {
            let _ = writeln!(self.text, "{name}{{model_name=\"{model}\"}} {}", of(snapshot));
        }
    }

    fn histogram(&mut self, name: &str, help: &str, of: impl Fn(&Snapshot) -> &Histogram) {
        self.head(name, "histogram", help);
        for (model, snapshot) in self.all {
            let histogram = of(snapshot);
            let bounds = histogram.bounds.iter().map(f64::to_string).chain(["+Inf".to_string()]);
            let mut below = 0;
            for (bound, count) in bounds.zip(&histogram.counts) {
                below += count;
                let _ = writeln!(
                    self.text,
                    "{name}_bucket{{model_name=\"{model}\",le=\"{bound}\"}} {below}"
                );
            }
            let _ = writeln!(self.text, "{name}_sum{{model_name=\"{model}\"}} {}", histogram.sum);
            let _ = writeln!(self.text, "{name}_count{{model_name=\"{model}\"}} {below}");
        }
    }

    fn ends(&mut self) {
        let name = "vllm:request_success_total";
        self.head(name, "counter", "Requests that ended, by reason.");
        for (model, snapshot) in self.all {
            for reason in metric_ends() {
                let labels = format!("model_name=\"{model}\",finished_reason=\"{reason}\"");
                let _ = writeln!(self.text, "{name}{{{labels}}} {}", snapshot.ended_by(reason));
            }
        }
    }
}

fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
