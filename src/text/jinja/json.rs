//! `tojson`: transformers' own, which is Python's `json.dumps`.

use super::Error;
use super::call::Args;
use super::operators::check_size;
use super::print::float;
use super::value::{Value, compare};

pub(super) fn to_json(value: &Value, args: Args) -> Result<String, Error> {
    let parameters = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ensure_ascii, indent, separators, sort_keys] = args.bind("the filter \"tojson\"", &parameters)?;
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Str(text)) => Some(text.to_string()),
        Some(value) => match value.as_int() {
            Some(width) => {
                let width = usize::try_from(width.max(0)).unwrap_or(usize::MAX);
                check_size(width, 1)?;
                Some(" ".repeat(width))
            }
            None => return Err(Error::failed("tojson: indent is neither a number nor text")),
        },
    };
    let (item, key) = match separators {
        None | Some(Value::None) => (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string()),
        Some(given) => {
            let given = given.iterate()?;
            match &given[..] {
                [Value::Str(item), Value::Str(key)] => (item.to_string(), key.to_string()),
                _ => return Err(Error::failed("tojson: separators are not two texts")),
            }
        }
    };
    let mut writer = Writer {
        out: String::new(),
        ensure_ascii: is_true(ensure_ascii),
        sort_keys: is_true(sort_keys),
        indent,
        item,
        key,
    };
    writer.value(value, 0)?;
    Ok(writer.out)
}

struct Writer {
    out: String,
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item: String,
    key: String,
}

impl Writer {
    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        check_size(self.out.len(), 1)?;
        if depth > 100 {
            return Err(Error::unsupported("JSON nested more than 100 levels deep"));
        }
        match value {
            Value::None => self.out.push_str("null"),
            Value::Bool(is) => self.out.push_str(if *is { "true" } else { "false" }),
            Value::Int(number) => self.out.push_str(&number.to_string()),
            Value::Float(number) => self.out.push_str(&json_float(*number)),
            Value::Str(text) | Value::Safe(text) => self.text(text),
            Value::List(items) | Value::Tuple(items) | Value::Group(items) => {
                self.out.push('[');
                for (i, item) in items.iter().enumerate() {
                    if i > 0 {
                        self.out.push_str(&self.item.clone());
                    }
                    self.line(depth + 1);
                    self.value(item, depth + 1)?;
                }
                if !items.is_empty() {
                    self.line(depth);
                }
                self.out.push(']');
            }
            Value::Dict(dict) => {
                let mut entries: Vec<&(Value, Value)> = dict.0.iter().collect();
                if self.sort_keys {
                    let mut failed = None;
                    entries.sort_by(|(a, _), (b, _)| match compare(a, b) {
                        Ok(order) => order.unwrap_or(std::cmp::Ordering::Equal),
                        Err(error) => {
                            failed.get_or_insert(error);
                            std::cmp::Ordering::Equal
                        }
                    });
                    if let Some(error) = failed {
                        return Err(error);
                    }
                }
                self.out.push('{');
                for (i, (key, item)) in entries.iter().enumerate() {
                    if i > 0 {
                        self.out.push_str(&self.item.clone());
                    }
                    self.line(depth + 1);
                    match key {
                        Value::Str(key) | Value::Safe(key) => self.text(key),
                        Value::None => self.text("null"),
                        Value::Bool(is) => self.text(if *is { "true" } else { "false" }),
                        Value::Int(number) => self.text(&number.to_string()),
                        Value::Float(number) => self.text(&json_float(*number)),
                        other => return Err(Error::failed(format!("tojson: {} as a key", other.described()))),
                    }
                    self.out.push_str(&self.key.clone());
                    self.value(item, depth + 1)?;
                }
                if !entries.is_empty() {
                    self.line(depth);
                }
                self.out.push('}');
            }
            other => return Err(Error::failed(format!("tojson: {} is no JSON", other.described()))),
        }
        Ok(())
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\x0c' => self.out.push_str("\\f"),
                '\x08' => self.out.push_str("\\b"),
                c if c < ' ' || self.ensure_ascii && !(' '..='~').contains(&c) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

fn json_float(number: f64) -> String {
    match number {
        n if n.is_nan() => "NaN".to_string(),
        f64::INFINITY => "Infinity".to_string(),
        f64::NEG_INFINITY => "-Infinity".to_string(),
        n => float(n),
    }
}
