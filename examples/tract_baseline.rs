//! One measurement of an optimum export in tract on the CPU, for `scripts/bench_cpu.py`, after a warm-up.
//!
//! `tract_baseline MODEL.onnx --prompt-ids 1,2,3 --max-new-tokens 48 --threads 2` prints one JSON line. Needs the cargo
//! feature `tract`. Lengths stay symbolic, so one optimised plan serves prefill and decode.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Parser;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::tract_ndarray as ndarray;
use tract_onnx::tract_hir::infer::Factoid;
use tract_onnx::tract_hir::internal::DimLike;

#[derive(Parser)]
struct Args {
    model: PathBuf,
    #[arg(long, value_delimiter = ',')]
    prompt_ids: Vec<i64>,
    #[arg(long)]
    max_new_tokens: usize,
    #[arg(long, default_value_t = 1)]
    threads: usize,
}

struct Decoder {
    plan: Arc<TypedRunnableModel>,
    names: Vec<String>,
    caches: Vec<TValue>,
    length: usize,
}

impl Decoder {
    fn run(&mut self, ids: &[i64]) -> TractResult<i64> {
        let total = self.length + ids.len();
        let mut caches = std::mem::take(&mut self.caches).into_iter();
        let mut inputs: TVec<TValue> = tvec!();
        for name in &self.names {
            inputs.push(match name.as_str() {
                "input_ids" => ndarray::Array2::from_shape_vec((1, ids.len()), ids.to_vec())?
                    .into_tensor()
                    .into(),
                "attention_mask" => ndarray::Array2::from_elem((1, total), 1i64).into_tensor().into(),
                "position_ids" => {
                    let positions = (self.length as i64..total as i64).collect();
                    ndarray::Array2::from_shape_vec((1, ids.len()), positions)?
                        .into_tensor()
                        .into()
                }
                _ => caches.next().expect("a cache for each other input"),
            });
        }
        let mut outputs = self.plan.run(inputs)?;
        let logits = outputs.remove(0);
        // Outputs follow the inputs: present.0.key, present.0.value, present.1.key …
        self.caches = outputs.into_iter().collect();
        self.length = total;
        let view = logits.to_plain_array_view::<f32>()?;
        let last = view.index_axis(ndarray::Axis(1), ids.len() - 1);
        let best = last.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        Ok(best.map_or(0, |(id, _)| id as i64))
    }
}

fn main() -> TractResult<()> {
    let args = Args::parse();
    tract_onnx::tract_core::tract_linalg::multithread::set_default_executor(
        tract_onnx::tract_core::tract_linalg::multithread::Executor::multithread(args.threads),
    );
    let start = Instant::now();
    let mut model = tract_onnx::onnx().model_for_path(&args.model)?;
    let outlets = model.input_outlets()?.to_vec();
    let names: Vec<String> = outlets.iter().map(|o| model.node(o.node).name.clone()).collect();
    // One row: with a symbolic batch tract refuses the flattening of the mask, "a shape with square of symbols".
    let (tokens, past) = (model.symbols.sym("T"), model.symbols.sym("P"));
    let mut empty = Vec::new();
    for (i, (outlet, name)) in outlets.iter().zip(&names).enumerate() {
        let long = i64::datum_type();
        let fact = match name.as_str() {
            "attention_mask" => InferenceFact::dt_shape(long, tvec![1.to_dim(), tokens.to_dim() + past.to_dim()]),
            "input_ids" | "position_ids" => InferenceFact::dt_shape(long, tvec![1.to_dim(), tokens.to_dim()]),
            _ => {
                let shape = model.outlet_fact(*outlet)?.shape.concretize();
                let dim = |i: usize| shape.as_ref().and_then(|s| s[i].to_usize().ok());
                let (heads, head_dim) = (dim(1).unwrap_or(3), dim(3).unwrap_or(64));
                empty.push(Tensor::zero::<f32>(&[1, heads, 0, head_dim])?.into_tvalue());
                let shape = tvec![1.to_dim(), heads.to_dim(), past.to_dim(), head_dim.to_dim()];
                InferenceFact::dt_shape(f32::datum_type(), shape)
            }
        };
        model.set_input_fact(i, fact)?;
    }
    let plan = model.into_optimized()?.into_runnable()?;
    let load = start.elapsed();
    let mut decoder = Decoder {
        plan,
        names,
        caches: empty.clone(),
        length: 0,
    };
    let first = decoder.run(&args.prompt_ids)?;
    decoder.run(&[first])?;
    (decoder.caches, decoder.length) = (empty, 0);

    let start = Instant::now();
    let mut tokens = vec![decoder.run(&args.prompt_ids)?];
    let prefill = start.elapsed();
    let start = Instant::now();
    while tokens.len() < args.max_new_tokens {
        tokens.push(decoder.run(&[tokens[tokens.len() - 1]])?);
    }
    let decode = start.elapsed() / (args.max_new_tokens as u32 - 1).max(1);
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    let (load, prefill, decode) = (ms(load), ms(prefill), ms(decode));
    println!("{{\"tokens\": {tokens:?}, \"load_ms\": {load}, \"prefill_ms\": {prefill}, \"decode_ms\": {decode}}}");
    Ok(())
}
