//! One build: TensorRT's objects in their order of creation and destruction, flags, profile, errors.

use std::time::Instant;

use trtx::{BuilderFlag, OptProfileSelector};

use super::cuda::driver;
use super::emit;
use super::error::EngineBuildError;
use super::flavour::FLAVOUR;
use super::library;
use super::log_capture::LogCapture;
use super::observer::Monitor;
use super::{BuildOptions, Library, Plan};
use crate::network::{Layer, LayerKind, Network, Tokens, WeightMode};
use crate::target::Refit;
use crate::tensor::{DType, Tensor};

pub(super) fn build(library: &Library, network: &Network, options: &BuildOptions) -> Result<Plan, EngineBuildError> {
    let started = Instant::now();
    check_profile(network)?;
    let refits = Refits::of(network, options.refit);
    let of_any = (!FLAVOUR.builds_without_gpu).then_some("an engine of full TensorRT");
    if let Some(what) = refits.needs_gpu().or(of_any) {
        driver::driver().map_err(|error| EngineBuildError::NeedsGpu {
            what,
            reason: error.to_string(),
        })?;
    }
    let weights = weight_bytes(network)?;

    // Locals are dropped in reverse order of declaration, as TensorRT requires: config and network before the builder,
    // the builder before its logger, and all of them before the weights, which they point to.
    let capture = LogCapture::default();
    let start = |message: trtx::Error| EngineBuildError::Start {
        message: capture.take_errors().unwrap_or_else(|| message.to_string()),
    };
    let logger = trtx::Logger::new(capture.clone()).map_err(start)?;
    let mut builder = trtx::Builder::new(&logger).map_err(start)?;
    let mut config = builder.create_config().map_err(start)?;
    // Strongly typed is no longer a flag but the only mode.
    let mut definition = builder.create_network(0).map_err(start)?;
    // The builder's errors on a machine without a driver are not errors of the network.
    capture.take_errors();

    emit::emit(network, &mut definition, &weights, refits, &capture, library.version())?;

    let fail = |message: String| EngineBuildError::Build {
        version: library.version(),
        network: network.name.clone(),
        hint: emit::hint(network, &message),
        message,
    };
    let own_words = |error: trtx::Error| capture.take_errors().unwrap_or_else(|| error.to_string());

    for range in ranges(network, options) {
        if let Some(mut profile) = profile(network, range, &mut builder).map_err(|e| fail(own_words(e)))? {
            let added = config.add_optimization_profile(&mut profile);
            added.map_err(|e| fail(own_words(e)))?;
        }
    }
    // On by default, and with it fp32 products are only as precise as fp16.
    config.clear_flag(BuilderFlag::kTF32);
    for flag in refits.flags() {
        config.set_flag(*flag);
    }
    let monitor = options.observer.clone().map(Monitor::new);
    if let Some(monitor) = &monitor {
        config.set_progress_monitor(Box::new(monitor.clone())).map_err(start)?;
    }

    let built = builder.build_serialized_network(&mut definition, &mut config);
    if monitor.is_some_and(|monitor| monitor.cancelled()) {
        return Err(EngineBuildError::Cancelled {
            network: network.name.clone(),
        });
    }
    let memory = built.map_err(|error| fail(own_words(error)))?;
    let mut warnings = capture.take_warnings();
    let in_fp32 = |layer: &Layer| {
        let product = matches!(layer.kind, LayerKind::MatrixMultiply { .. } | LayerKind::Attention);
        product && network.tensor(layer.outputs[0]).dtype == DType::F32
    };
    if library::may_use_tf32() && network.layers.iter().any(in_fp32) {
        warnings.push("fp32 products may be computed in TF32: NVIDIA_TF32_OVERRIDE is not 0".to_string());
    }
    Ok(Plan {
        memory,
        elapsed: started.elapsed(),
        warnings,
    })
}

fn check_profile(network: &Network) -> Result<(), EngineBuildError> {
    match network.profile.tokens {
        Tokens::Dynamic { min, opt, max } if !(1 <= min && min <= opt && opt <= max) => {
            Err(EngineBuildError::Profile {
                network: network.name.clone(),
                min,
                opt,
                max,
            })
        }
        _ => Ok(()),
    }
}

/// The bytes of every weight that becomes a constant, by weight id. Bound weights are not read.
fn weight_bytes(network: &Network) -> Result<Vec<Option<Tensor>>, EngineBuildError> {
    let mut bytes = vec![None; network.weights.len()];
    for layer in &network.layers {
        let LayerKind::Weight(id) = layer.kind else { continue };
        let Some(weight) = network.weights.get(id.0 as usize) else {
            continue; // emit names the layer
        };
        let slot = &mut bytes[id.0 as usize];
        if weight.mode == WeightMode::Bind || slot.is_some() {
            continue;
        }
        *slot = Some(
            weight
                .constant
                .materialize()
                .map_err(|source| EngineBuildError::Weight {
                    network: network.name.clone(),
                    weight: weight.name.clone(),
                    source,
                })?,
        );
    }
    Ok(bytes)
}

/// Token counts (min, opt, max) of each optimization profile.
fn ranges(network: &Network, options: &BuildOptions) -> Vec<[usize; 3]> {
    match network.profile.tokens {
        Tokens::Static(_) => Vec::new(),
        Tokens::Dynamic { min, opt, max } if options.decode_profile => vec![[1; 3], [min, opt, max]],
        Tokens::Dynamic { min, opt, max } => vec![[min, opt, max]],
    }
}

/// A profile over every input that has a symbolic dim; `None` if there is no such input.
fn profile<'b>(
    network: &Network,
    [min, opt, max]: [usize; 3],
    builder: &mut trtx::Builder<'b>,
) -> Result<Option<trtx::optimization_profile::OptimizationProfile<'b>>, trtx::Error> {
    let mut inputs = network.inputs.iter().map(|id| network.tensor(*id));
    let dynamic: Vec<_> = inputs
        .by_ref()
        .filter(|tensor| tensor.shape.iter().any(|dim| dim.as_const().is_none()))
        .collect();
    if dynamic.is_empty() {
        return Ok(None);
    }
    let mut profile = builder.creata_optimization_profile()?;
    for tensor in dynamic {
        for (selector, tokens) in [
            (OptProfileSelector::kMIN, min),
            (OptProfileSelector::kOPT, opt),
            (OptProfileSelector::kMAX, max),
        ] {
            let dims: Vec<i64> = tensor.shape.iter().map(|dim| emit::at_tokens(dim, tokens)).collect();
            let dims = trtx::trtx_sys::Dims64::from_slice(&dims);
            profile.set_dimensions(&tensor.name, selector, &dims)?;
        }
    }
    Ok(Some(profile))
}

/// How the constants of an engine can change later.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refits {
    /// Omit refittable weights from the plan.
    strip: bool,
    /// Mark every weight refittable by any values.
    pub(super) mark: bool,
    /// All weights refittable by the same values.
    pub(super) identical: bool,
}

impl Refits {
    /// What the weights of a network and the caller's `refit` require of TensorRT.
    fn of(network: &Network, refit: Refit) -> Refits {
        let has = |mode| network.weights.iter().any(|weight| weight.mode == mode);
        let strip = has(WeightMode::Strip);
        Refits {
            strip,
            mark: refit == Refit::General && (strip || has(WeightMode::Embed)),
            identical: refit == Refit::Identical && (strip || has(WeightMode::Embed)) || refit == Refit::None && strip,
        }
    }

    fn needs_gpu(self) -> Option<&'static str> {
        if self.strip {
            Some("an engine with stripped weights")
        } else if self.mark || self.identical {
            Some("a refittable engine")
        } else {
            None
        }
    }

    fn flags(self) -> &'static [BuilderFlag] {
        match (self.strip, self.mark, self.identical) {
            (false, false, false) => &[],
            (false, true, _) => &[BuilderFlag::kREFIT_INDIVIDUAL],
            (false, false, true) => &[BuilderFlag::kREFIT_IDENTICAL],
            (true, true, _) => &[BuilderFlag::kREFIT_INDIVIDUAL, BuilderFlag::kSTRIP_PLAN],
            (true, false, _) => &[BuilderFlag::kREFIT_IDENTICAL, BuilderFlag::kSTRIP_PLAN],
        }
    }
}
