//! Finds the fastest lowering on a GPU, and records all alternatives.
//!
//! [`measure`] does the work; the types here are its results, which a package's manifest stores and a spec uses.
//! Without measurements, [`LowerOptions::for_engines`] has good choices.

#[cfg(feature = "engines")]
pub mod measure;
pub mod questions;

use serde::{Deserialize, Serialize};

use crate::lower::LowerOptions;
use crate::spec::Tuned;

/// The measurements, and the machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tuning {
    /// Name of the GPU.
    pub gpu: String,
    /// Version of its driver.
    pub driver: Option<String>,
    /// Version of the library.
    pub tensorrt: String,
    /// One entry per profile.
    pub profiles: Vec<ProfileTuning>,
}

/// One profile's winner and all attempts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProfileTuning {
    /// The engine's name, for example `b1-t1-c1024`.
    pub profile: String,
    /// The fastest lowering.
    pub lowering: LowerOptions,
    /// GPU time of one run.
    pub ms: f64,
    /// GPU time without tuning.
    pub untuned_ms: f64,
    /// Every build, in order.
    pub tried: Vec<Attempt>,
}

/// One build with its time, or why it failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attempt {
    /// Its question, for example `attention`.
    pub about: String,
    /// Its answer.
    pub what: String,
    /// GPU time of one run.
    pub ms: Option<f64>,
    /// Time of the build.
    pub build_s: Option<f64>,
    /// Scratch memory of the engine on the GPU.
    pub scratch_bytes: Option<u64>,
    /// Why there is no time.
    pub error: Option<String>,
}

impl Tuning {
    /// Its form in a spec.
    pub fn tuned(&self) -> Vec<Tuned> {
        let of = |t: &ProfileTuning| Tuned {
            profile: t.profile.clone(),
            lowering: t.lowering.clone(),
        };
        self.profiles.iter().map(of).collect()
    }
}
