//! The tokens that end a text, and unusable entries about them in the model's files.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use super::tokenizer::{TokenizerError, json_file};

/// Token ids that end a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndTokens {
    /// Their ids.
    pub ids: BTreeSet<u32>,
    /// Invalid entries, with the file and the field.
    pub warnings: Vec<String>,
}

impl EndTokens {
    /// `eos_token_id` of `generation_config.json`, or if that names none, of `config.json`.
    pub(super) fn of_configs(generation: &Value, config: &Value) -> Self {
        let mut found = EndTokens::default();
        for (file, value) in [("generation_config.json", generation), ("config.json", config)] {
            if found.ids.is_empty() {
                found.read(file, &value["eos_token_id"]);
            }
        }
        found
    }

    /// One id or a list of them.
    fn read(&mut self, file: &str, value: &Value) {
        let several = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        for value in several.iter().filter(|value| !value.is_null()) {
            let text = value.as_str().and_then(|text| text.trim().parse::<u32>().ok());
            match whole_number(value).and_then(|id| u32::try_from(id).ok()).or(text) {
                Some(id) => {
                    self.ids.insert(id);
                    if text.is_some() {
                        self.warnings.push(format!(
                            "{file}: eos_token_id is the string {value}; taken as the number"
                        ));
                    }
                }
                None => self.warnings.push(format!(
                    "{file}: eos_token_id is {value}, which is not a token id; it is ignored"
                )),
            }
        }
    }

    /// Leaves out what a model of `vocabulary` tokens cannot generate, with a warning each.
    pub fn limit(&mut self, vocabulary: usize) {
        let beyond: Vec<u32> = self
            .ids
            .iter()
            .copied()
            .filter(|id| *id as usize >= vocabulary)
            .collect();
        for id in beyond {
            self.ids.remove(&id);
            self.warnings.push(format!(
                "the end token {id} (eos_token_id or eos_token) is beyond the model's {vocabulary} tokens; it is ignored"
            ));
        }
    }
}

/// A number without a fraction, written with or without a point.
pub(super) fn whole_number(value: &Value) -> Option<i64> {
    let float = || {
        value
            .as_f64()
            .filter(|x| x.fract() == 0.0 && x.abs() < 1e15)
            .map(|x| x as i64)
    };
    value.as_i64().or_else(float)
}

/// Tokens that end a text, for a package without a tokenizer: from `generation_config.json`, else `config.json`.
pub fn end_tokens_of_configs(folder: &Path) -> Result<EndTokens, TokenizerError> {
    let [generation, config] = ["generation_config.json", "config.json"].map(|name| json_file(&folder.join(name)));
    Ok(EndTokens::of_configs(&generation?, &config?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(generation: Value, config: Value) -> (Vec<u32>, Vec<String>) {
        let found = EndTokens::of_configs(
            &json!({ "eos_token_id": generation }),
            &json!({ "eos_token_id": config }),
        );
        (found.ids.into_iter().collect(), found.warnings)
    }

    #[test]
    fn what_is_no_id_is_named() {
        assert_eq!(of(json!([2, 1.0]), json!(7)), (vec![1, 2], vec![]));
        assert_eq!(of(json!(null), json!(7)), (vec![7], vec![]));
        let (ids, warnings) = of(json!(["2", "</s>", -1, 1.5, null, [3]]), json!(7));
        assert_eq!(ids, [2]);
        assert_eq!(
            warnings[0],
            "generation_config.json: eos_token_id is the string \"2\"; taken as the number"
        );
        assert_eq!(
            warnings[1],
            "generation_config.json: eos_token_id is \"</s>\", which is not a token id; it is ignored"
        );
        assert_eq!(warnings.len(), 5);
        // If one file's entry is invalid, the other's may be valid.
        let (ids, warnings) = of(json!("</s>"), json!(7));
        assert_eq!((ids, warnings.len()), (vec![7], 1));
    }

    #[test]
    fn ids_beyond_the_vocabulary_end_nothing() {
        let mut found = EndTokens::of_configs(&json!({ "eos_token_id": [96, 97, 5000] }), &Value::Null);
        found.limit(97);
        assert_eq!(found.ids, BTreeSet::from([96]));
        assert_eq!(found.warnings.len(), 2);
        assert!(found.warnings[1].contains("the end token 5000"), "{:?}", found.warnings);
    }
}
