//! The project's terms: one name for one thing, in tables, plots, help texts and documentation.
//!
//! docs/glossary.md is written from [`GLOSSARY`]; tables and plots take their names from the constants, so that a name
//! changes in one place. Field names of JSON documents are a contract and stay as they are: the glossary lists them beside
//! the terms.

/// One term.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Term {
    /// In running text, and in plots.
    pub name: &'static str,
    /// Heading of a table's column, with its unit; empty if no table has it.
    pub column: &'static str,
    /// Field of JSON documents that holds it; empty if there is none.
    pub field: &'static str,
    /// Definition: one or two sentences.
    pub meaning: &'static str,
}

macro_rules! terms {
    ($($id:ident: $name:literal, $column:literal, $field:literal, $meaning:literal;)*) => {
        $(
            #[doc = $meaning]
            pub const $id: Term = Term { name: $name, column: $column, field: $field, meaning: $meaning };
        )*
        const ALL: &[Term] = &[$($id),*];
    };
}

terms! {
    // The compiler
    EXPORT: "export", "", "",
        "The ONNX file that an exporter (optimum, torch.onnx, ONNX Runtime GenAI, mobius) wrote for a model.";
    CANONICAL_GRAPH: "canonical graph", "", "graph",
        "The graph that all exports of one model become: static KV cache, fused norms, rotary embedding and attention. It is valid ONNX.";
    PASS: "pass", "pass", "passes",
        "One rewrite of the graph. Passes run in a fixed order; the manifest records what each did.";
    LOWERING: "lowering", "", "lowering",
        "Turning the canonical graph into a network for one profile, and the choices made there.";
    NETWORK: "network", "", "",
        "TensorRT layers as plain data. The same network becomes an engine or runs on the CPU executor.";
    LAYER: "layer", "layer", "",
        "One operation of a network, with the meaning that TensorRT documents for it. A decoder layer (attention and feed-forward) is always called that.";
    PROFILE: "profile", "profile", "profile",
        "The shapes that an engine is built for: batch, tokens per run, capacity. `b1-t128-c1024` is batch 1, 128 tokens, capacity 1024.";
    ENGINE: "engine", "engines", "engines",
        "The program that TensorRT builds from a network for one profile.";
    PLAN: "plan", "plans", "plans_bytes",
        "The serialized form of an engine: a file in the package.";
    DECODE_KERNEL: "decode kernel", "", "kernels",
        "A CUDA kernel of Lapidary that replaces TensorRT layers in a decode engine.";
    CPU_EXECUTOR: "CPU executor", "", "",
        "The engine that runs networks on the CPU. It is the reference in tests, and runs models on machines without a GPU.";
    PACKAGE: "package", "package", "",
        "The folder that `convert` writes: manifest, canonical graph, weights, engine plans, tokenizer.";
    MANIFEST: "manifest", "", "",
        "`manifest.json` of a package: everything that is known without running it.";
    SPEC: "spec", "", "",
        "A YAML file with settings of a conversion (`specs/*.yaml`). Flags override it.";
    // The cache
    KV_CACHE: "KV cache", "cache", "cache",
        "Keys and values of earlier tokens. It is static: a fixed number of slots; each step writes its own.";
    SLOT: "slot", "", "",
        "The place of one token in the KV cache.";
    CAPACITY: "capacity", "capacity", "capacity",
        "Number of slots. A package has several; a session moves to the next larger one when the cache is full.";
    CONTEXT_LENGTH: "context length", "context", "live",
        "Number of tokens in the cache before a step. \"At context 300\" means that 300 tokens precede the measured one.";
    // Weights
    BOUND: "bound weights", "", "bind",
        "Weights that engines get as inputs at load. All engines of a package share one copy, so replacing the weights is one copy to the device.";
    EMBEDDED: "embedded weights", "", "embed",
        "Weights inside each plan.";
    STRIPPED: "stripped engine", "", "strip",
        "An engine without its weights, which TensorRT refits at load.";
    REFIT: "refit", "refit", "refit",
        "Replacing a package's weights (`lapidary refit`), or TensorRT's own way of replacing an engine's weights. General: any weights of the architecture; identical: only those that it was built with.";
    CODES: "codes", "", "",
        "The integers (or small floats) of a quantized weight. Its values are (code - zero point) * scale.";
    // Time
    PREFILL: "prefill", "prompt", "prefill",
        "Computing a prompt, up to and including its first output token.";
    CHUNK: "chunk", "", "prefill_chunks",
        "Number of prompt tokens that one engine run computes. A prompt is cut into chunks; the last one is padded.";
    DECODE: "decode", "", "decode",
        "Computing one output token after another.";
    TTFT: "time to first token", "TTFT ms", "ttft_ms",
        "From the first prompt token fed to the first output token on the host.";
    TPOT: "time per output token", "ms/token", "tpot_ms",
        "Wall-clock time of one decode step, sampling included. For a whole text: the mean over all tokens after the first.";
    GPU_TIME: "GPU time per token", "GPU ms/token", "gpu_ms",
        "The part of the time per output token in which the GPU is busy, measured by device events.";
    HOST_OVERHEAD: "host overhead per token", "host overhead ms", "",
        "Time per output token minus GPU time per token.";
    ITL: "inter-token latency", "ITL ms", "itl_ms",
        "(latency - TTFT) / (tokens - 1) of one text; it includes the end of the run after the last token.";
    LATENCY: "latency", "latency ms", "latency_ms",
        "From the first prompt token fed to the end of the text.";
    OUTPUT_RATE: "output tokens per second", "tokens/s", "output_tokens_per_s",
        "Output tokens over time.";
    PREFILL_RATE: "prompt tokens per second", "tokens/s", "prefill_tokens_per_s",
        "Prompt tokens over time to first token.";
    STABLE: "stable", "", "stable",
        "The mean of the first and of the last quarter of the samples differ by at most 5 %. Other measurements are marked unstable.";
    MBU: "memory bandwidth utilization", "MBU", "mbu",
        "Bytes that a decode step must read (weights and cache) over its time, as a share of the measured copy bandwidth.";
    MFU: "model FLOPS utilization", "MFU", "mfu",
        "Floating-point operations that a prefill must do over its time, as a share of the peak.";
    COPY_BANDWIDTH: "copy bandwidth", "copy bandwidth", "copy_bandwidth_bytes_per_s",
        "Bytes read plus bytes written by the fastest of several large copies, per second.";
    // Loading and memory
    COLD_LOAD: "cold load", "cold load ms", "first_load_ms",
        "Loading a package with an empty kernel cache: TensorRT compiles kernels for this GPU.";
    WARM_LOAD: "warm load", "warm load ms", "load_ms",
        "Loading a package whose kernels are in the kernel cache.";
    KERNEL_CACHE: "kernel cache", "", "kernels_kept",
        "Kernels that TensorRT compiled at the first load, kept in the package or in `LAPIDARY_CACHE`.";
    SCRATCH: "scratch memory", "scratch", "scratch",
        "Device memory for intermediate results. All engines of a session share one buffer, since only one runs at a time.";
    CUDA_CONTEXT: "CUDA context", "CUDA context", "context",
        "Device memory in use before the model is loaded: CUDA's own, the driver's, and other processes'.";
    // Answers
    REFERENCE: "reference", "", "reference",
        "The result that outputs are compared with: transformers in fp32.";
    LOGIT_ERROR: "relative logit error", "relative logit error", "worst_relative_logit_error",
        "Norm of the difference of two rows of logits over the norm of the reference's row.";
    TOP1: "top-1 agreement", "top-1 agreement", "same_best",
        "Share of rows in which both systems rank the same token first.";
    PERPLEXITY: "perplexity", "perplexity", "perplexity",
        "exp of the mean negative log-probability of the tokens of a text. Lower is better.";
    KL: "KL divergence", "KL nats/token", "kl",
        "Mean Kullback-Leibler divergence of a model's token distributions from another model's, in nats per token.";
}

/// All terms, by chapter.
pub const GLOSSARY: &[(&str, &[Term])] = &[
    ("The compiler", between(0, 14)),
    ("The cache", between(14, 18)),
    ("Weights", between(18, 23)),
    ("Time", between(23, 38)),
    ("Loading and memory", between(38, 43)),
    ("Answers", between(43, 48)),
];

/// A part of [`ALL`].
const fn between(start: usize, end: usize) -> &'static [Term] {
    ALL.split_at(end).0.split_at(start).1
}

/// `ms/token at context 300`
pub fn token_at(context: usize) -> String {
    format!("{} at {} {context}", TPOT.column, CONTEXT_LENGTH.column)
}

/// `TTFT ms, prompt 512`
pub fn first_token_of(prompt: usize) -> String {
    format!("{}, {} {prompt}", TTFT.column, PREFILL.column)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_term_is_in_one_chapter() {
        let listed: Vec<Term> = GLOSSARY.iter().flat_map(|(_, terms)| terms.iter().copied()).collect();
        assert_eq!(listed, ALL);
        assert_eq!(GLOSSARY[1].1[0], KV_CACHE);
        assert_eq!(GLOSSARY[2].1[0], BOUND);
        assert_eq!(GLOSSARY[3].1[0], PREFILL);
        assert_eq!(GLOSSARY[4].1[0], COLD_LOAD);
        assert_eq!(GLOSSARY[5].1[0], REFERENCE);
        let mut names: Vec<&str> = ALL.iter().map(|term| term.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
    }
}
