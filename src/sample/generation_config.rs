//! A model's `generation_config.json`: the fields that become [`Settings`], and those that are not used.

use serde_json::Value;

use super::settings::{Settings, SettingsError, Stage};

/// Generation settings of transformers that change tokens, with the number that means off.
const OTHER_WAYS: [(&str, f64); 19] = [
    ("num_beams", 1.0),
    ("num_beam_groups", 1.0),
    ("diversity_penalty", 0.0),
    ("penalty_alpha", 0.0),
    ("guidance_scale", 1.0),
    ("encoder_repetition_penalty", 1.0),
    ("no_repeat_ngram_size", 0.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("min_length", 0.0),
    ("min_new_tokens", 0.0),
    ("exponential_decay_length_penalty", 0.0),
    ("bad_words_ids", 0.0),
    ("suppress_tokens", 0.0),
    ("begin_suppress_tokens", 0.0),
    ("forced_bos_token_id", -1.0),
    ("forced_eos_token_id", -1.0),
    ("stop_strings", 0.0),
];

impl Settings {
    /// Applies a model's `generation_config.json`. Missing or null fields keep their value; `do_sample: false` is
    /// greedy, and a `top_k` of -1 is off, as in vLLM. Invalid fields keep their value too, with an error each.
    pub fn take_generation_config(&mut self, config: &Value) -> Vec<SettingsError> {
        let mut errors = Vec::new();
        let mut take = |parameter: &'static str, wanted: &'static str, read: &dyn Fn(&Value, &mut Settings) -> bool| {
            let value = &config[parameter];
            let mut changed = self.clone();
            let wanted = match value.is_null() || read(value, &mut changed) {
                true => changed.check().err().map(|error| error.wanted),
                false => Some(wanted),
            };
            match wanted {
                None => *self = changed,
                Some(wanted) => errors.push(SettingsError {
                    parameter,
                    value: value.to_string(),
                    wanted,
                }),
            }
        };
        type Place = fn(&mut Settings) -> &mut f32;
        let fields: [(&'static str, Place); 5] = [
            ("temperature", |s| &mut s.temperature),
            ("top_p", |s| &mut s.top_p),
            ("min_p", |s| &mut s.min_p),
            ("typical_p", |s| &mut s.typical_p),
            ("repetition_penalty", |s| &mut s.repetition_penalty),
        ];
        for (name, place) in fields {
            take(name, "a number", &|value, settings| {
                let number = value.as_f64();
                *place(settings) = number.unwrap_or_default() as f32;
                number.is_some()
            });
        }
        take(
            "top_k",
            "a whole number of 0 or more, or -1 for off",
            &|value, settings| {
                // Written as 50.0 by tools that keep all numbers as floats.
                let k = value.as_f64().filter(|k| *k >= -1.0 && k.fract() == 0.0);
                settings.top_k = k.unwrap_or_default().max(0.0) as usize;
                k.is_some()
            },
        );
        take("do_sample", "true or false", &|value, settings| {
            if value == false {
                settings.temperature = 0.0;
            }
            value.is_boolean()
        });
        errors
    }

    /// Fields of a `generation_config.json` that are not applied, one line each: invalid values, and unsupported
    /// generation settings.
    pub fn generation_config_warnings(config: &Value) -> Vec<String> {
        let errors = Settings::default().take_generation_config(config);
        let nonsense = errors.iter().map(|e| {
            let (name, value, wanted, flag) = (e.parameter, &e.value, e.wanted, e.flag());
            let flag = match name {
                "do_sample" => "temperature".to_string(),
                _ => flag,
            };
            format!("{name} is {value}, not {wanted}; generating needs --{flag}")
        });
        let other = OTHER_WAYS.iter().filter(|(name, off)| {
            let value = &config[*name];
            let is_off = value.as_f64().is_some_and(|number| number == *off) || value == false;
            let is_empty = value.is_null() || value.as_array().is_some_and(Vec::is_empty);
            !is_off && !is_empty
        });
        let other = other.map(|(name, _)| match *name {
            "stop_strings" => format!(
                "stop_strings is {}, and not used; generating needs --stop",
                config[*name]
            ),
            name => format!(
                "{name} is {}, and not used: there is no such way to generate here",
                config[name]
            ),
        });
        nonsense.chain(other).collect()
    }

    /// Whether a value of `generation_config.json` has an effect with these settings, if no flag overrides it.
    pub fn uses(&self, parameter: &str) -> bool {
        let stage = match parameter {
            "top_k" => Stage::TopK,
            "top_p" => Stage::TopP,
            "min_p" => Stage::MinP,
            "typical_p" => Stage::Typical,
            "repetition_penalty" => Stage::Penalties,
            _ => return true,
        };
        let in_chain = self.order.contains(&stage) && (self.mirostat.is_none() || !stage.truncates());
        // These three never drop the most probable token, which greedy decoding takes.
        let without_effect = self.is_greedy() && matches!(stage, Stage::TopK | Stage::TopP | Stage::MinP);
        in_chain && !without_effect
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::MirostatSettings;
    use super::*;

    #[test]
    fn a_models_wishes_override_the_usual_and_are_checked() {
        let mut settings = Settings::default();
        let config = json!({"temperature": 0.6, "top_k": 20, "top_p": 0.9, "typical_p": null, "eos_token_id": [1, 2],
            "repetition_penalty": 1.1, "do_sample": true});
        assert_eq!(settings.take_generation_config(&config), []);
        let expected = Settings {
            temperature: 0.6,
            top_k: 20,
            top_p: 0.9,
            repetition_penalty: 1.1,
            ..Settings::default()
        };
        assert_eq!(settings, expected);
        assert_eq!(settings.take_generation_config(&json!({"do_sample": false})), []);
        assert!(settings.is_greedy());
        assert_eq!(settings.take_generation_config(&Value::Null), []);
        for (k, read) in [
            (json!(-1), 0),
            (json!(-1.0), 0),
            (json!(50.0), 50),
            (json!(0), 0),
            (json!(7), 7),
        ] {
            let mut settings = Settings::default();
            assert_eq!(settings.take_generation_config(&json!({ "top_k": k })), []);
            assert_eq!(settings.top_k, read, "{k}");
        }
    }

    #[test]
    fn what_makes_no_sense_in_a_models_wishes_changes_nothing_and_is_named() {
        for (config, message) in [
            (json!({"top_p": 1.5}), "top_p 1.5 a number from 0 to 1"),
            (
                json!({"top_k": -2}),
                "top_k -2 a whole number of 0 or more, or -1 for off",
            ),
            (
                json!({"top_k": 0.5}),
                "top_k 0.5 a whole number of 0 or more, or -1 for off",
            ),
            (
                json!({"top_k": "50"}),
                "top_k \"50\" a whole number of 0 or more, or -1 for off",
            ),
            (json!({"temperature": "0.7"}), "temperature \"0.7\" a number"),
            (json!({"temperature": -1}), "temperature -1 a number of 0 or more"),
            (
                json!({"repetition_penalty": 0}),
                "repetition_penalty 0 a number above 0",
            ),
            (json!({"do_sample": "no"}), "do_sample \"no\" true or false"),
        ] {
            let mut settings = Settings::default();
            let errors = settings.take_generation_config(&config);
            let e = &errors[0];
            assert_eq!(format!("{} {} {}", e.parameter, e.value, e.wanted), message);
            assert_eq!((errors.len(), settings), (1, Settings::default()), "{config}");
            let warning = &Settings::generation_config_warnings(&config)[0];
            assert!(
                warning.starts_with(&format!("{} is {}, not", e.parameter, e.value)),
                "{warning}"
            );
        }
        // Valid fields beside it are applied.
        let mut settings = Settings::default();
        let config = json!({"top_p": 1.5, "temperature": 0.5, "top_k": "x", "min_p": 0.25});
        assert_eq!(settings.take_generation_config(&config).len(), 2);
        let expected = Settings {
            temperature: 0.5,
            min_p: 0.25,
            ..Settings::default()
        };
        assert_eq!(settings, expected);
    }

    #[test]
    fn ways_to_generate_that_there_are_not_are_named() {
        let off = json!({"num_beams": 1, "penalty_alpha": null, "bad_words_ids": [], "guidance_scale": 1.0, "min_length": 0,
            "do_sample": true, "top_k": -1, "eos_token_id": 2, "max_length": 20, "forced_eos_token_id": null});
        assert_eq!(Settings::generation_config_warnings(&off), [""; 0]);
        let on = json!({"num_beams": 4, "stop_strings": ["x"], "no_repeat_ngram_size": 3, "forced_bos_token_id": 0});
        let warnings = Settings::generation_config_warnings(&on);
        assert_eq!(warnings.len(), 4, "{warnings:?}");
        assert!(warnings[0].starts_with("num_beams is 4, and not used"), "{warnings:?}");
        assert!(warnings[3].contains("--stop"), "{warnings:?}");
    }

    #[test]
    fn what_the_settings_do_not_use_is_known() {
        let uses = |settings: &Settings| {
            let all = [
                "temperature",
                "top_k",
                "top_p",
                "min_p",
                "typical_p",
                "repetition_penalty",
                "do_sample",
            ];
            all.into_iter().filter(|name| settings.uses(name)).collect::<Vec<_>>()
        };
        let mut settings = Settings::default();
        assert_eq!(uses(&settings).len(), 7);
        settings.temperature = 0.0;
        assert_eq!(
            uses(&settings),
            ["temperature", "typical_p", "repetition_penalty", "do_sample"]
        );
        settings.temperature = 1.0;
        settings.order = vec![Stage::MinP];
        assert_eq!(uses(&settings), ["temperature", "min_p", "do_sample"]);
        settings.mirostat = Some(MirostatSettings::default());
        assert_eq!(uses(&settings), ["temperature", "do_sample"]);
    }
}
