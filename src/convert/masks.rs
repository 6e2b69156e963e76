//! The meaning of masks that the caller fills, if the export does not compute it.
//!
//! Some exports take a mask of `[batch, 1, tokens, total]` for each kind of layer, full and sliding. The graph shows which layers read
//! which mask, but not the window of each. A `config.json` in the export's folder has both, the window and the kind of every
//! layer: if giving a window to one mask and none to the other makes the layers of the graph equal those of the configuration, the
//! masks have this meaning. Names of inputs are ignored.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::graph::Graph;
use crate::passes::{self, CanonicalizeOptions, MaskWindows};

/// Maximum number of masks whose assignments are tested.
const MOST: usize = 3;

/// Windows for the masks of an export, if it has several and the configuration in `configs` determines them; 0 for
/// none.
pub(super) fn of_config(
    graph: &Graph,
    configs: &Path,
    options: &CanonicalizeOptions,
) -> Option<BTreeMap<String, usize>> {
    let inputs = passes::unknown_masks(graph).filter(|inputs| inputs.len() <= MOST)?;
    let (window, layers) = layers(configs)?;
    // A window longer than the conversion's limit has no effect.
    let expected: Vec<Option<usize>> = layers.iter().map(|sliding| sliding.then_some(window)).collect();
    let seen = |windows: &[Option<usize>], limit: usize| -> Vec<Option<usize>> {
        windows.iter().map(|w| w.filter(|w| *w < limit)).collect()
    };
    (0..1usize << inputs.len()).find_map(|choice| {
        let given = |(i, name): (usize, &String)| (name.clone(), (choice >> i & 1 == 1).then_some(window));
        let mask_windows: MaskWindows = inputs.iter().enumerate().map(given).collect();
        let options = CanonicalizeOptions {
            mask_windows: mask_windows.clone(),
            ..options.clone()
        };
        let made = passes::canonicalize(graph.clone(), &options).ok()?;
        let limit = made.architecture.max_positions.unwrap_or(options.max_positions);
        let same = seen(&made.architecture.windows, limit) == seen(&expected, limit) && window < limit;
        same.then(|| {
            mask_windows
                .into_iter()
                .map(|(name, w)| (name, w.unwrap_or(0)))
                .collect()
        })
    })
}

/// The window, and whether each layer has it, from Hugging Face's configurations: `layer_types`, or a
/// `sliding_window_pattern` of this many layers whose last is full.
fn layers(configs: &Path) -> Option<(usize, Vec<bool>)> {
    let text = std::fs::read_to_string(configs.join("config.json")).ok()?;
    let config: Value = serde_json::from_str(&text).ok()?;
    let config = match &config["text_config"] {
        text @ Value::Object(_) => text,
        _ => &config,
    };
    let number = |key: &str| config[key].as_u64().and_then(|n| usize::try_from(n).ok());
    let window = number("sliding_window").filter(|window| *window > 0)?;
    let sliding = match &config["layer_types"] {
        Value::Array(types) => types
            .iter()
            .map(|kind| match kind.as_str() {
                Some("sliding_attention") => Some(true),
                Some("full_attention") => Some(false),
                _ => None,
            })
            .collect::<Option<Vec<bool>>>()?,
        _ => {
            let (layers, pattern) = (number("num_hidden_layers")?, number("sliding_window_pattern")?);
            (0..layers).map(|layer| (layer + 1) % pattern.max(1) != 0).collect()
        }
    };
    Some((window, sliding))
}
