//! The role of an input or output, and its canonical name.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Side;

/// The role of one input or output of a model. The order of the variants is the order of ports.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Role {
    /// `input_ids`: token ids, `[batch, tokens]`.
    TokenIds,
    /// `inputs_embeds`: a row of floats per token, `[batch, tokens, hidden]`, for models that do not take token ids.
    Embeddings,
    /// `position_ids`: the position, and thus the cache slot, of each token, `[batch, tokens]`.
    PositionIds,
    /// `write_indices`: the slot of each row's first token, `[batch]`.
    WriteIndices,
    /// `total_lengths`: the position after the last token of each row's run, `[batch]`; a run is a prompt, in any
    /// number of calls, or one token. Only if the model depends on the length of the run.
    TotalLengths,
    /// `logit_rows`: which token of each row gets logits, `[batch]`. Only in networks.
    LogitRows,
    /// `key_cache.i`, `value_cache.i`: keys or values of earlier calls, `[batch, kv_heads, capacity, head_dim]`.
    Cache(CacheId),
    /// `logits`: `[batch, tokens, vocabulary]`, or `[batch, 1, vocabulary]` if rows are chosen.
    Logits,
    /// `updated_key_cache.i`, `updated_value_cache.i`: a cache with the rows of this call.
    UpdatedCache(CacheId),
}

/// One cache of a model.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct CacheId {
    /// Counted in the order in which attention layers first read a cache; layers that share a cache count once.
    pub layer: usize,
    /// Keys or values.
    pub part: CachePart,
}

/// The content of a cache.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CachePart {
    /// Keys.
    Key,
    /// Values.
    Value,
}

impl CachePart {
    /// Both, in order.
    pub const ALL: [CachePart; 2] = [CachePart::Key, CachePart::Value];

    fn name(self) -> &'static str {
        match self {
            CachePart::Key => "key",
            CachePart::Value => "value",
        }
    }
}

/// A name that is not a role's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the canonical graph has no input or output {0:?}")]
pub struct UnknownName(
    /// The name.
    pub String,
);

const TOKEN_IDS: &str = "input_ids";
const EMBEDDINGS: &str = "inputs_embeds";
const POSITION_IDS: &str = "position_ids";
const WRITE_INDICES: &str = "write_indices";
const TOTAL_LENGTHS: &str = "total_lengths";
const LOGIT_ROWS: &str = "logit_rows";
const LOGITS: &str = "logits";
const UPDATED: &str = "updated_";
const CACHE: &str = "_cache.";

impl Role {
    /// The side of ports with this role.
    pub fn side(self) -> Side {
        match self {
            Role::TokenIds
            | Role::Embeddings
            | Role::PositionIds
            | Role::WriteIndices
            | Role::TotalLengths
            | Role::LogitRows
            | Role::Cache(_) => Side::Input,
            Role::Logits | Role::UpdatedCache(_) => Side::Output,
        }
    }

    /// The cache that it is, or is the update of.
    pub fn cache(self) -> Option<CacheId> {
        match self {
            Role::Cache(cache) | Role::UpdatedCache(cache) => Some(cache),
            _ => None,
        }
    }

    /// Its canonical name, as `Display` writes it.
    pub fn name(self) -> String {
        self.to_string()
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cache = |CacheId { layer, part }: &CacheId| format!("{}{CACHE}{layer}", part.name());
        match self {
            Role::TokenIds => f.write_str(TOKEN_IDS),
            Role::Embeddings => f.write_str(EMBEDDINGS),
            Role::PositionIds => f.write_str(POSITION_IDS),
            Role::WriteIndices => f.write_str(WRITE_INDICES),
            Role::TotalLengths => f.write_str(TOTAL_LENGTHS),
            Role::LogitRows => f.write_str(LOGIT_ROWS),
            Role::Cache(id) => f.write_str(&cache(id)),
            Role::Logits => f.write_str(LOGITS),
            Role::UpdatedCache(id) => write!(f, "{UPDATED}{}", cache(id)),
        }
    }
}

impl FromStr for Role {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        let cache = |name: &str| {
            let (part, layer) = name.split_once(CACHE)?;
            let part = CachePart::ALL.into_iter().find(|known| known.name() == part)?;
            // `+1` and `01` parse as numbers too, but are not valid names.
            let canonical = layer == "0" || layer.starts_with(|c: char| ('1'..='9').contains(&c));
            let layer = layer.parse().ok().filter(|_| canonical)?;
            Some(CacheId { layer, part })
        };
        let found = match name {
            TOKEN_IDS => Some(Role::TokenIds),
            EMBEDDINGS => Some(Role::Embeddings),
            POSITION_IDS => Some(Role::PositionIds),
            WRITE_INDICES => Some(Role::WriteIndices),
            TOTAL_LENGTHS => Some(Role::TotalLengths),
            LOGIT_ROWS => Some(Role::LogitRows),
            LOGITS => Some(Role::Logits),
            _ => match name.strip_prefix(UPDATED) {
                Some(of) => cache(of).map(Role::UpdatedCache),
                None => cache(name).map(Role::Cache),
            },
        };
        found.ok_or_else(|| UnknownName(name.to_string()))
    }
}

/// By its canonical name.
impl Serialize for Role {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Role {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        name.parse().map_err(serde::de::Error::custom)
    }
}
