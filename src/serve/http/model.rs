//! A package that is served, by its name.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use crate::sample::{Breakers, DEFAULT_BREAKERS, Settings};
use crate::serve::{Grammars, Scheduler};
use crate::text::{Tokenizer, TokenizerError};

/// See the module's head.
pub struct Model {
    /// What requests call it.
    pub name: String,
    /// For one with an adapter, the name of its package.
    pub parent: Option<String>,
    /// What runs it.
    pub scheduler: Scheduler,
    /// If its package has one.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// What a request does not say.
    pub defaults: Settings,
    /// Of requests that give none; another one each time if there is none.
    pub seed: Option<u64>,
    /// Tokens that end a text.
    pub eos_ids: BTreeSet<u32>,
    /// Of [`DEFAULT_BREAKERS`], once asked for.
    breakers: OnceLock<Arc<Breakers>>,
    /// Once asked for.
    grammars: OnceLock<Result<Grammars, String>>,
}

impl Model {
    /// A package of this name, in the hands of this scheduler.
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

    /// The same, known as one of `parent` with an adapter.
    pub fn of(self, parent: &str) -> Self {
        Model {
            parent: Some(parent.to_string()),
            ..self
        }
    }

    /// What ends a repetition for DRY where neither a flag nor the request says so.
    pub(super) fn default_breakers(&self) -> Result<Arc<Breakers>, TokenizerError> {
        if let Some(breakers) = self.breakers.get() {
            return Ok(breakers.clone());
        }
        let breakers = match &self.tokenizer {
            // A tokenizer that cannot write one of the defaults just has one less.
            Some(tokenizer) => tokenizer.breakers(&DEFAULT_BREAKERS)?.0,
            None => Breakers::default(),
        };
        Ok(self.breakers.get_or_init(|| Arc::new(breakers)).clone())
    }

    /// What its tokens are, for grammars.
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
