//! A served package, by name.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use crate::sample::{Breakers, DEFAULT_BREAKERS, Settings};
use crate::serve::{Grammars, Scheduler};
use crate::text::{Tokenizer, TokenizerError};

/// See the module's head.
pub struct Model {
    /// Its model name in requests.
    pub name: String,
    /// The name of its package, if it has an adapter.
    pub parent: Option<String>,
    /// Its scheduler.
    pub scheduler: Scheduler,
    /// Its tokenizer, if the package has one.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Default settings for requests.
    pub defaults: Settings,
    /// Seed of requests without one; random each time if `None`.
    pub seed: Option<u64>,
    /// Tokens that end a text.
    pub eos_ids: BTreeSet<u32>,
    /// Breakers of [`DEFAULT_BREAKERS`], built on first use.
    breakers: OnceLock<Arc<Breakers>>,
    /// Built on first use.
    grammars: OnceLock<Result<Grammars, String>>,
}

impl Model {
    /// A package with this name, run by this scheduler.
    pub fn new(
        name: String,
        scheduler: Scheduler,
        tokenizer: Option<Arc<Tokenizer>>,
        defaults: Settings,
        seed: Option<u64>,
        eos_ids: BTreeSet<u32>,
    ) -> Self {
        Model {
            name,
            parent: None,
            scheduler,
            tokenizer,
            defaults,
            seed,
            eos_ids,
            breakers: OnceLock::new(),
            grammars: OnceLock::new(),
        }
    }

    /// The same, as `parent` with an adapter.
    pub fn of(self, parent: &str) -> Self {
        Model {
            parent: Some(parent.to_string()),
            ..self
        }
    }

    /// The default DRY breakers, without a flag or a field of the request.
    pub(super) fn default_breakers(&self) -> Result<Arc<Breakers>, TokenizerError> {
        if let Some(breakers) = self.breakers.get() {
            return Ok(breakers.clone());
        }
        let breakers = match &self.tokenizer {
            // A default that the tokenizer cannot produce is skipped.
            Some(tokenizer) => tokenizer.breakers(&DEFAULT_BREAKERS)?.0,
            None => Breakers::default(),
        };
        Ok(self.breakers.get_or_init(|| Arc::new(breakers)).clone())
    }

    /// Its tokens, for grammars.
    pub(super) fn grammars(&self) -> Result<&Grammars, String> {
        let make = || match &self.tokenizer {
            Some(tokenizer) => Grammars::new(tokenizer, self.scheduler.facts().vocabulary, &self.eos_ids),
            None => Err("its package has no tokenizer".to_string()),
        };
        self.grammars.get_or_init(make).as_ref().map_err(String::clone)
    }

    /// Slots of its longest sequence.
    pub(super) fn capacity(&self) -> usize {
        self.scheduler.facts().capacity
    }
}
