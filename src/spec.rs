//! Conversion specs: settings of `lapidary convert`, as YAML or as flags.
//!
//! A [`Spec`] is a file of `specs/*.yaml`; every key is optional. [`Spec::or`] combines two, so flags override a file
//! and a file the defaults. [`Spec::resolve`] gives the [`Conversion`], in which only values that depend on the
//! model are open (its dtype, its longest context). Unknown keys are refused, because a misspelled one would have no effect.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::help::Help;
use crate::lower::{LowerOptions, QuantizedForm};
use crate::network::{Profile, RowProduct, Tokens, WeightMode};
use crate::passes::ActivationPolicy;
use crate::target::{Precision, Prefill, Quantization, Refit, Target};

/// A file of `specs/`, or the flags of one run: whatever is `None` is left to the next layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Spec {
    /// A description; nothing reads it.
    pub description: Option<String>,
    /// What the package runs on.
    pub targets: Option<Vec<Target>>,
    /// How weights enter engines.
    pub weights: Option<WeightMode>,
    /// Which weights of its engines can be replaced.
    pub refit: Option<Refit>,
    /// Element type of weights and caches; the export's if not given.
    pub dtype: Option<Precision>,
    /// Treatment of activations that the export quantizes: rounded to the values of their codes (`quantized`, the
    /// default), rounded outside attention only (`partial`), or left in floating point (`float`).
    pub activations: Option<ActivationPolicy>,
    /// For an export whose masks of `[.., tokens, slots]` the caller fills: how many positions each lets a query attend to, by
    /// the name of its input; 0 for all.
    pub mask_windows: Option<BTreeMap<String, usize>>,
    /// How weights in floating point are quantized; not at all if not given.
    pub quantize: Option<Quantization>,
    /// A text that the quantization is calibrated on; relative to the spec's own folder.
    pub calibrate: Option<PathBuf>,
    /// Slots a cache can have.
    pub capacity: Option<Vec<usize>>,
    /// How a prompt is cut for engines.
    pub prefill: Option<Prefill>,
    /// One engine per capacity, with an optimization profile for decoding and one for the prefill range. Slower than engines of
    /// fixed shapes, and smaller where weights are embedded.
    pub one_engine: Option<bool>,
    /// Engines for prompts read a copy of quantized weights in floating point, which the GPU holds beside their codes. Default:
    /// with bound weights, unless `one_engine` or `lowering` is set.
    pub prefill_copy: Option<bool>,
    /// A folder or a `tokenizer.json`; relative to the spec's own folder.
    pub tokenizer: Option<PathBuf>,
    /// Whether decode engines use Lapidary's kernels where these are faster. Default: with bound weights.
    pub kernels: Option<bool>,
    /// Also engines that decode this many sequences in one step, 2 to 16.
    pub batch: Option<Vec<usize>>,
    /// How engines are lowered; its `weight_mode` is ignored.
    pub lowering: Option<LowerOptions>,
    /// The same for single profiles, chosen by `convert --tune`.
    pub tuned: Option<Vec<Tuned>>,
}

/// The lowering of one profile's engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuned {
    /// Name of the engine, for example `b1-t1-c1024`.
    pub profile: String,
    /// How its engine is lowered; its `weight_mode` is ignored.
    pub lowering: LowerOptions,
}

/// Why a spec cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message says what the fields are")]
pub enum SpecError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    /// It is not YAML, or has invalid keys or values.
    #[error("{}: {message}", path.display())]
    Yaml { path: PathBuf, message: String },
    /// Its values are inconsistent.
    #[error("{0}")]
    Value(String),
}

impl Help for SpecError {}

/// Default capacities, up to the model's context.
pub const DEFAULT_CAPACITIES: [usize; 3] = [256, 1024, 4096];
/// Default prefill chunks.
pub const DEFAULT_CHUNKS: [usize; 4] = [128, 256, 512, 2048];

impl Spec {
    /// Reads a file; the paths of its tokenizer and its text are relative to the file's folder.
    pub fn read(path: &Path) -> Result<Self, SpecError> {
        let text = std::fs::read_to_string(path).map_err(|source| SpecError::Read {
            path: path.to_path_buf(),
            source,
        })?;
        let mut spec = Spec::parse(&text).map_err(|message| SpecError::Yaml {
            path: path.to_path_buf(),
            message,
        })?;
        if let Some(folder) = path.parent() {
            for file in [&mut spec.tokenizer, &mut spec.calibrate].into_iter().flatten() {
                *file = folder.join(&*file);
            }
        }
        Ok(spec)
    }

    /// From the text of a spec; an empty one sets nothing.
    pub fn parse(text: &str) -> Result<Self, String> {
        let spec: Option<Spec> = yaml_serde::from_str(text).map_err(|e| e.to_string())?;
        Ok(spec.unwrap_or_default())
    }

    /// As YAML, without open values.
    pub fn to_yaml(&self) -> String {
        let mut value = yaml_serde::to_value(self).expect("plain data serializes");
        if let yaml_serde::Value::Mapping(map) = &mut value {
            map.retain(|_, value| !value.is_null());
        }
        yaml_serde::to_string(&value).expect("plain data serializes")
    }

    /// This spec, with its open values taken from `below`.
    pub fn or(self, below: Spec) -> Spec {
        Spec {
            description: self.description.or(below.description),
            targets: self.targets.or(below.targets),
            weights: self.weights.or(below.weights),
            refit: self.refit.or(below.refit),
            dtype: self.dtype.or(below.dtype),
            quantize: self.quantize.or(below.quantize),
            calibrate: self.calibrate.or(below.calibrate),
            capacity: self.capacity.or(below.capacity),
            prefill: self.prefill.or(below.prefill),
            one_engine: self.one_engine.or(below.one_engine),
            prefill_copy: self.prefill_copy.or(below.prefill_copy),
            activations: self.activations.or(below.activations),
            mask_windows: self.mask_windows.or(below.mask_windows),
            tokenizer: self.tokenizer.or(below.tokenizer),
            kernels: self.kernels.or(below.kernels),
            batch: self.batch.or(below.batch),
            lowering: self.lowering.or(below.lowering),
            tuned: self.tuned.or(below.tuned),
        }
    }

    /// Fills in the defaults and checks that the combination is possible.
    pub fn resolve(self) -> Result<Conversion, SpecError> {
        let bad = |message: String| Err(SpecError::Value(message));
        let mut targets = self.targets.unwrap_or_else(|| vec![Target::Cpu]);
        targets.sort_unstable();
        targets.dedup();
        if targets.is_empty() {
            return bad("no target is given: use cpu, tensorrt-rtx or tensorrt".into());
        }
        let (weights, refit) = (self.weights.unwrap_or_default(), self.refit.unwrap_or_default());
        if refit != Refit::None && weights == WeightMode::Bind {
            return bad(
                "bound weights are changed without a refit: use refit with embedded or stripped weights".into(),
            );
        }
        let ascending = |mut list: Vec<usize>, what: &str| -> Result<Vec<usize>, SpecError> {
            list.sort_unstable();
            list.dedup();
            if list.is_empty() || list[0] == 0 {
                return Err(SpecError::Value(format!("{what} must be numbers above 0")));
            }
            Ok(list)
        };
        let explicit_capacities = self.capacity.is_some();
        let capacities = ascending(
            self.capacity.unwrap_or_else(|| DEFAULT_CAPACITIES.to_vec()),
            "cache capacities",
        )?;
        let prefill = match self.prefill.unwrap_or(Prefill::Chunks(DEFAULT_CHUNKS.to_vec())) {
            Prefill::Chunks(chunks) => Prefill::Chunks(ascending(chunks, "prefill chunks")?),
            Prefill::Range(r) if r.min == 0 || r.min > r.opt || r.opt > r.max => {
                return bad(format!(
                    "prefill {}:{}:{} is not a range: 1 <= min <= opt <= max",
                    r.min, r.opt, r.max
                ));
            }
            range => range,
        };
        let one_engine = self.one_engine.unwrap_or(false);
        if one_engine && !matches!(prefill, Prefill::Range(_)) {
            return bad("one engine for decode and prefill needs a prefill range, such as 1:128:512".into());
        }
        if one_engine && (refit != Refit::None || weights == WeightMode::Strip) {
            return bad(
                "engines that can be refitted have one optimization profile: one engine for decode and prefill needs \
                 embedded or bound weights and no refit"
                    .into(),
            );
        }
        if self.kernels == Some(true) && weights != WeightMode::Bind {
            return bad("kernels read weights where they are bound: use bound weights, or no kernels".into());
        }
        let batch = match self.batch {
            Some(batch) => ascending(batch, "sequences of a step")?,
            None => Vec::new(),
        };
        if batch.iter().any(|rows| !(2..=RowProduct::MOST_ROWS).contains(rows)) {
            return bad(format!(
                "engines decode 2 to {} sequences in one step, beside one",
                RowProduct::MOST_ROWS
            ));
        }
        if !batch.is_empty() && (weights != WeightMode::Bind || self.kernels == Some(false)) {
            return bad("several sequences in one step need kernels, and so bound weights".into());
        }
        // One engine would read the copy for decode too, and a lowering says how prompts read weights.
        let by_default = weights == WeightMode::Bind && !one_engine && self.lowering.is_none();
        let prefill_copy = self.prefill_copy.unwrap_or(by_default);
        if prefill_copy && weights != WeightMode::Bind {
            return bad("a copy of the weights for prompts is bound beside their codes: use bound weights".into());
        }
        if self.calibrate.is_some() && self.quantize.is_none() {
            return bad(
                "a text to calibrate on needs a quantization to calibrate: --quantize int4, int8 or fp8".into(),
            );
        }
        Ok(Conversion {
            one_engine,
            targets,
            weights,
            refit,
            dtype: self.dtype,
            activations: self.activations.unwrap_or_default(),
            mask_windows: self.mask_windows.unwrap_or_default(),
            quantize: self.quantize,
            calibrate: self.calibrate,
            capacities,
            explicit_capacities,
            prefill,
            prefill_copy,
            tokenizer: self.tokenizer,
            kernels: self.kernels,
            batch,
            lowering: LowerOptions {
                weight_mode: weights,
                ..self.lowering.unwrap_or_else(LowerOptions::for_engines)
            },
            tuned: self.tuned.unwrap_or_default(),
        })
    }
}

/// The resolved settings of a conversion.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversion {
    /// Sorted, without repetition, not empty.
    pub targets: Vec<Target>,
    /// How weights enter engines.
    pub weights: WeightMode,
    /// Which weights of its engines can be replaced.
    pub refit: Refit,
    /// `None`: as the export has it.
    pub dtype: Option<Precision>,
    /// Treatment of activations that the export quantizes.
    pub activations: ActivationPolicy,
    /// Windows of masks that the caller fills, by the names of their inputs; 0 for none.
    pub mask_windows: BTreeMap<String, usize>,
    /// `None`: weights are not quantized.
    pub quantize: Option<Quantization>,
    /// Only with a quantization.
    pub calibrate: Option<PathBuf>,
    /// Ascending, not empty.
    pub capacities: Vec<usize>,
    /// The capacities were requested. Default ones are cut to the model's context.
    pub explicit_capacities: bool,
    /// How a prompt is cut for engines.
    pub prefill: Prefill,
    /// Decode and prefill of a capacity in one engine.
    pub one_engine: bool,
    /// Engines for prompts read a copy of quantized weights in floating point.
    pub prefill_copy: bool,
    /// A folder or a `tokenizer.json`; the one beside the model if not given.
    pub tokenizer: Option<PathBuf>,
    /// Whether decode engines use Lapidary's kernels; overrides the lowerings.
    pub kernels: Option<bool>,
    /// Numbers of sequences that engines decode in one step, besides 1; ascending.
    pub batch: Vec<usize>,
    /// Of engines, `weight_mode` included.
    pub lowering: LowerOptions,
    /// Of single profiles' engines.
    pub tuned: Vec<Tuned>,
}

impl Conversion {
    /// How the engine of a profile is lowered.
    pub fn lowering_of(&self, profile: &Profile) -> LowerOptions {
        let name = profile.to_string();
        let tuned = self.tuned.iter().find(|tuned| tuned.profile == name);
        let lowering = tuned.map_or(&self.lowering, |tuned| &tuned.lowering);
        // A tuned engine has what was measured for it.
        let copies = self.prefill_copy && tuned.is_none() && profile.tokens != Tokens::Static(1);
        let prefill_quantized = match copies {
            true => Some(QuantizedForm::Whole),
            false => lowering.prefill_quantized,
        };
        LowerOptions {
            weight_mode: self.weights,
            kernels: self.kernels.unwrap_or(lowering.kernels),
            prefill_quantized,
            ..lowering.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lower;
    use crate::network::Tokens;

    #[test]
    fn flags_go_over_the_file_and_the_file_over_defaults() {
        let file = Spec::parse("dtype: fp16\ncapacity: [1024, 256]\nprefill: {min: 1, opt: 128, max: 512}\n").unwrap();
        let flags = Spec {
            dtype: Some(Precision::Bf16),
            ..Spec::default()
        };
        let conversion = flags.or(file).resolve().unwrap();
        assert_eq!(conversion.dtype, Some(Precision::Bf16));
        assert_eq!(conversion.capacities, [256, 1024]);
        assert_eq!(conversion.targets, [Target::Cpu]);
        assert_eq!(
            conversion.prefill.tokens(),
            [Tokens::Dynamic {
                min: 1,
                opt: 128,
                max: 512
            }]
        );
        assert_eq!(Spec::parse("").unwrap(), Spec::default());
    }

    #[test]
    fn mistakes_are_named() {
        let error = Spec::parse("capacities: [256]\n").unwrap_err();
        assert!(error.contains("unknown field `capacities`"), "{error}");
        let error = Spec::parse("prefill: {min: 1, opt: 2, max: 3, mid: 2}").unwrap_err();
        assert!(error.contains("unknown field `mid`"), "{error}");
        let error = Spec::parse("prefill: much").unwrap_err();
        assert!(
            error.contains("a list of chunk lengths, or min, opt and max"),
            "{error}"
        );
        let resolve = |text: &str| Spec::parse(text).unwrap().resolve().unwrap_err().to_string();
        assert!(resolve("capacity: [0]").contains("above 0"));
        assert!(resolve("prefill: {min: 4, opt: 2, max: 8}").contains("4:2:8"));
        assert!(resolve("refit: general").contains("bound weights"));
        assert!(resolve("calibrate: text.txt").contains("--quantize"));
        assert!(resolve("targets: []").contains("no target"));
        assert!(resolve("batch: [1, 4]").contains("2 to 16"));
        assert!(resolve("batch: [32]").contains("2 to 16"));
        assert!(resolve("{batch: [4], weights: embed}").contains("bound weights"));
        assert!(resolve("{batch: [4], kernels: false}").contains("need kernels"));
        assert!(resolve("{prefill_copy: true, weights: embed}").contains("use bound weights"));
        assert!(resolve("one_engine: true").contains("needs a prefill range"));
        assert!(resolve("{one_engine: true, prefill: {min: 1, opt: 2, max: 4}, weights: strip}").contains("no refit"));
    }

    /// How prompts read quantized weights: from a copy, unless the package has no place for one or something else was chosen.
    #[test]
    fn prompts_of_bound_weights_read_a_copy() {
        let of = |text: &str, profile: Profile| {
            let conversion = Spec::parse(text).unwrap().resolve().unwrap();
            conversion.lowering_of(&profile).prefill_quantized
        };
        let prefill = Profile::prefill(128, 256);
        let apart = LowerOptions::for_engines().prefill_quantized;
        assert_eq!(of("{}", prefill), Some(QuantizedForm::Whole));
        assert_eq!(of("prefill_copy: true", prefill), Some(QuantizedForm::Whole));
        for other in [
            "prefill_copy: false",
            "weights: embed",
            "{one_engine: true, prefill: {min: 1, opt: 64, max: 128}}",
            "lowering: {prefill_quantized: dequantize_apart}",
        ] {
            assert_eq!(of(other, prefill), apart, "{other}");
        }
        assert_eq!(of("{}", Profile::decode(256)), apart, "decode does not use it");
    }

    #[test]
    fn a_tuned_spec_goes_to_yaml_and_back() {
        let fast = LowerOptions {
            attention: lower::AttentionForm::Split(8),
            linear: lower::LinearForm::ReduceRow,
            reduce_depth: Some(2048),
            ..LowerOptions::for_engines()
        };
        let spec = Spec {
            capacity: Some(vec![256, 1024]),
            prefill: Some(Prefill::Chunks(vec![128])),
            weights: Some(WeightMode::Embed),
            tuned: Some(vec![Tuned {
                profile: "b1-t1-c1024".into(),
                lowering: fast.clone(),
            }]),
            ..Spec::default()
        };
        let text = spec.to_yaml();
        assert!(!text.contains("null"), "{text}");
        assert_eq!(Spec::parse(&text).unwrap(), spec, "{text}");
        let conversion = spec.resolve().unwrap();
        let embedded = |options: LowerOptions| LowerOptions {
            weight_mode: WeightMode::Embed,
            ..options
        };
        assert_eq!(conversion.lowering_of(&Profile::decode(1024)), embedded(fast));
        let rest = embedded(LowerOptions::for_engines());
        assert_eq!(conversion.lowering_of(&Profile::decode(256)), rest);
    }

    #[test]
    fn prefill_flags() {
        assert_eq!("128, 512".parse(), Ok(Prefill::Chunks(vec![128, 512])));
        assert!("1:2".parse::<Prefill>().is_err());
        assert!("many".parse::<Prefill>().unwrap_err().contains("\"many\""));
    }

    #[test]
    fn the_specs_we_ship_are_sound() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("specs");
        let mut count = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            Spec::read(&path).unwrap().resolve().unwrap();
            count += 1;
        }
        assert!(count >= 3);
    }
}
