//! Finds the fastest lowering on a GPU, and records all alternatives.
//!
//! [`measure`] tries; the types here are what it gives, what a package's manifest keeps and what a spec takes from it. Good
//! choices where nothing was measured are [`LowerOptions::for_engines`].

#[cfg(feature = "engines")]
pub mod measure;
pub mod questions;

use serde::{Deserialize, Serialize};

use crate::lower::LowerOptions;
use crate::spec::Tuned;

/// What was measured, and on what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tuning {
    /// Name of the GPU.
    pub gpu: String,
    /// Version of its driver.
    pub driver: Option<String>,
    /// Version of the library.
    pub tensorrt: String,
    /// One entry a profile.
    pub profiles: Vec<ProfileTuning>,
}

/// One profile's winner and everything tried on the way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProfileTuning {
    /// As engines are called, for example `b1-t1-c1024`.
    pub profile: String,
    /// The fastest lowering.
    pub lowering: LowerOptions,
    /// GPU time of one run.
    pub ms: f64,
    /// Of what would have been taken without tuning.
    pub untuned_ms: f64,
    /// Every build, in order.
    pub tried: Vec<Attempt>,
}

/// One build that was timed, or why it was not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attempt {
    /// Which question it answers, for example `attention`.
    pub about: String,
    /// Which answer it tries.
    pub what: String,
    /// GPU time of one run.
    pub ms: Option<f64>,
    /// Time of the build.
    pub build_s: Option<f64>,
    /// Working memory of the engine on the GPU.
    pub scratch_bytes: Option<u64>,
    /// Why there is no time.
    pub error: Option<String>,
}

impl Tuning {
    /// As a spec keeps it.
    pub fn tuned(&self) -> Vec<Tuned> {
        let of = |t: &ProfileTuning| Tuned {
            profile: t.profile.clone(),
            lowering: t.lowering.clone(),
        };
        self.profiles.iter().map(of).collect()
    }
}
