//! Structured output: JSON schemas and grammars, followed by llguidance. llama.cpp's grammars are translated first
//! (`gbnf`).

use std::collections::BTreeSet;
use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use super::gbnf::{self, GbnfError};
use crate::sample::{Constraint, ConstraintError};
use crate::text::Tokenizer;

/// The required form of a text.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// JSON that follows this schema.
    Schema(Value),
    /// A text of this grammar, in llguidance's variant of Lark.
    Lark(String),
    /// A text of this grammar, in GBNF.
    Gbnf(String),
    /// A text that this pattern matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
}

impl Form {
    /// A text of this grammar in either syntax: GBNF has `::=` in its first rule.
    pub fn grammar(text: String) -> Form {
        match gbnf::is_gbnf(&text) {
            true => Form::Gbnf(text),
            false => Form::Lark(text),
        }
    }
}

/// Stack of the thread that reads a grammar: reading recurses through references to rules. [`gbnf::LONGEST`] limits the
/// depth. Only used stack takes memory.
const STACK: usize = 256 << 20;

/// White space between the parts of JSON: limited, so that a model cannot continue with it forever.
pub(crate) const WHITE_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,24}";

/// Why a form cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormError {
    /// A grammar in llama.cpp's form that cannot be read.
    #[error("{0}")]
    Gbnf(#[from] GbnfError),
    /// A grammar longer than [`gbnf::LONGEST`], with its bytes.
    #[error("the grammar has {0} bytes; {most} are the most", most = gbnf::LONGEST)]
    TooLong(usize),
    /// llguidance's reason.
    #[error("it cannot be followed: {0}")]
    Refused(String),
}

/// llguidance's reason, for clients.
fn reason(error: &str) -> String {
    // Written after a reason whose details are off.
    let known = error.strip_suffix("<non-verbose/>").unwrap_or(error).trim_end();
    match known {
        "NoExtensionBias" => "no token of this model can continue it".to_string(),
        known => known.to_string(),
    }
}

/// A model's tokens, for grammars; built once per model, on first use.
pub struct Grammars {
    factory: ParserFactory,
    end: BTreeSet<u32>,
}

impl Grammars {
    /// For a model with this many tokens, with these end tokens.
    pub fn new(tokenizer: &Tokenizer, vocabulary: usize, end: &BTreeSet<u32>) -> Result<Self, String> {
        let bytes = tokenizer.token_bytes();
        let word = |id: usize| {
            let bytes = bytes.get(id).map_or(&[][..], Vec::as_slice);
            // Special tokens are not part of the text.
            match !bytes.is_empty() && tokenizer.is_special(id as u32) {
                true => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
                false => bytes.to_vec(),
            }
        };
        let mut words: Vec<Vec<u8>> = (0..vocabulary).map(word).collect();
        let first = end.iter().copied().find(|id| (*id as usize) < vocabulary);
        // A model without end tokens gets one that it cannot draw.
        let first = first.unwrap_or_else(|| {
            words.push([&[TokTrie::SPECIAL_TOKEN_MARKER], &b"<end>"[..]].concat());
            vocabulary as u32
        });
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, first), &words);
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&tokens).map_err(|error| error.to_string())?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        let mut end = end.clone();
        end.insert(first);
        Ok(Grammars { factory, end })
    }

    /// Follows a form from the start.
    pub fn follow(&self, form: Form) -> Result<Limited, FormError> {
        let failed = |why: &str| FormError::Refused(why.to_string());
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("grammar".into()).stack_size(STACK);
            let reading = thread.spawn_scoped(scope, || self.read(form));
            let reading =
                reading.map_err(|error| failed(&format!("the system gives no thread to read it: {error}")))?;
            reading.join().unwrap_or_else(|_| Err(failed("reading it failed")))
        })
    }

    fn read(&self, form: Form) -> Result<Limited, FormError> {
        if let Form::Lark(text) | Form::Gbnf(text) = &form
            && text.len() > gbnf::LONGEST
        {
            return Err(FormError::TooLong(text.len()));
        }
        let grammar = match form {
            Form::Schema(schema) => of_schema(schema),
            Form::Lark(text) => TopLevelGrammar::from_lark(text),
            Form::Gbnf(text) => TopLevelGrammar::from_lark(gbnf::to_lark(&text)?),
            Form::Regex(pattern) => TopLevelGrammar::from_regex(&pattern),
            Form::Choice(texts) if texts.is_empty() => {
                return Err(FormError::Refused("there is nothing to choose from".into()));
            }
            Form::Choice(texts) => {
                let texts: Vec<String> = texts.into_iter().map(|text| Value::from(text).to_string()).collect();
                TopLevelGrammar::from_lark(format!("start: {}", texts.join(" | ")))
            }
        };
        let parser = self
            .factory
            .create_parser(grammar)
            .map_err(|error| FormError::Refused(reason(&format!("{error:#}"))))?;
        let mut matcher = Matcher::new(Ok(parser));
        // Some forms that nothing can have are found only where the first token is chosen.
        let begun = matcher.compute_mask_or_eos().map(|_| ());
        match (matcher.get_error(), begun) {
            (Some(error), _) => Err(FormError::Refused(reason(&error))),
            (None, Err(error)) => Err(FormError::Refused(reason(&error.to_string()))),
            (None, Ok(())) => Ok(Limited {
                matcher,
                end: self.end.clone(),
            }),
        }
    }
}

/// A text that follows a form, as far as it is written.
pub struct Limited {
    matcher: Matcher,
    /// Tokens that end a text: allowed where the form is complete.
    end: BTreeSet<u32>,
}

impl Limited {
    /// The same form for another text.
    pub fn again(&self) -> Self {
        Limited {
            matcher: self.matcher.deep_clone(),
            end: self.end.clone(),
        }
    }
}

impl Constraint for Limited {
    fn limit(&mut self, logits: &mut [f32]) -> Result<(), ConstraintError> {
        let mask = self.matcher.compute_mask_or_eos();
        let mask = mask.map_err(|error| ConstraintError(reason(&error.to_string())))?;
        let may_end = self.end.iter().any(|id| mask.is_allowed(*id));
        for (id, logit) in logits.iter_mut().enumerate() {
            let id = id as u32;
            let allowed = match self.end.contains(&id) {
                true => may_end,
                false => (id as usize) < mask.len() && mask.is_allowed(id),
            };
            if !allowed {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<bool, ConstraintError> {
        if self.end.contains(&token) {
            return Ok(true);
        }
        let taken = self.matcher.consume_token(token);
        taken.map_err(|error| ConstraintError(reason(&error.to_string())))?;
        Ok(self.matcher.is_stopped())
    }
}

fn of_schema(mut schema: Value) -> TopLevelGrammar {
    if let Some(object) = schema.as_object_mut() {
        let own = || json!({"whitespace_pattern": WHITE_SPACE});
        object.entry("x-guidance").or_insert_with(own);
    }
    TopLevelGrammar::from_json_schema(schema)
}
