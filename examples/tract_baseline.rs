//! An optimum export in tract on the CPU, one step at a time, for `scripts/baselines/tract_baseline.py`.
//!
//! `tract_baseline MODEL.onnx --threads 2` first prints `{"version", "load_ms"}`. Then each line of standard input is a
//! request, `{"reset": true}` or `{"feed": [ids], "row": bool}`, answered by one line: `{}`, or `{"ms", "token"}` with
//! the time to the next token and its id, plus its logits if `row` is set. Needs the cargo feature `tract`. Lengths
//! stay symbolic, so one optimized plan serves prefill and decode.

use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::tract_ndarray as ndarray;
use tract_onnx::tract_hir::infer::Factoid;
use tract_onnx::tract_hir::internal::DimLike;

/// As in Cargo.toml.
const TRACT_VERSION: &str = "0.23.9";

#[derive(Parser)]
struct Args {
    model: PathBuf,
    #[arg(long, default_value_t = 1)]
    threads: usize,
}

#[derive(serde::Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct Question {
    reset: bool,
    feed: Vec<i64>,
    row: bool,
}

struct Decoder {
    plan: Arc<TypedRunnableModel>,
    names: Vec<String>,
    caches: Vec<TValue>,
    length: usize,
}

impl Decoder {
    /// Logits of `ids`: `[1, tokens, vocabulary]`; the last row is used.
    fn run(&mut self, ids: &[i64]) -> TractResult<TValue> {
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
        Ok(logits)
    }
}

/// The last row of logits.
fn last_row(logits: &TValue) -> TractResult<ndarray::ArrayView1<'_, f32>> {
    let view = logits
        .to_plain_array_view::<f32>()?
        .into_dimensionality::<ndarray::Ix3>()?;
    let last = view.len_of(ndarray::Axis(1)) - 1;
    Ok(view
        .index_axis_move(ndarray::Axis(0), 0)
        .index_axis_move(ndarray::Axis(0), last))
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
    let mut decoder = Decoder {
        plan,
        names,
        caches: empty.clone(),
        length: 0,
    };
    let mut out = std::io::stdout().lock();
    let load_ms = start.elapsed().as_secs_f64() * 1e3;
    let mut say = |answer: serde_json::Value| -> std::io::Result<()> {
        writeln!(out, "{answer}")?;
        out.flush()
    };
    say(serde_json::json!({"version": TRACT_VERSION, "load_ms": load_ms}))?;
    for line in std::io::stdin().lock().lines() {
        let question: Question = serde_json::from_str(&line?)?;
        if question.reset {
            (decoder.caches, decoder.length) = (empty.clone(), 0);
        }
        if question.feed.is_empty() {
            say(serde_json::json!({}))?;
            continue;
        }
        let start = Instant::now();
        let logits = decoder.run(&question.feed)?;
        let row = last_row(&logits)?;
        let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        let token = best.map_or(0, |(id, _)| id);
        let ms = start.elapsed().as_secs_f64() * 1e3;
        let mut answer = serde_json::json!({"ms": ms, "token": token});
        if question.row {
            answer["row"] = row.iter().copied().collect::<Vec<f32>>().into();
        }
        say(answer)?;
    }
    Ok(())
}
