//! Filters that choose, sort and group items.

use std::cmp::Ordering;
use std::rc::Rc;

use super::call::{Args, int, need, text};
use super::filters::{apply, described};
use super::text::lower;
use super::value::{Value, compare, equal, hashable};
use super::{Error, attributes, checks, numbers};

/// `a.b.0` of an item, each step as `item[step]`.
pub(super) fn path(item: &Value, attribute: &Value, default: Option<&Value>) -> Result<Value, Error> {
    let steps: Vec<Value> = match attribute {
        Value::None => Vec::new(),
        Value::Str(path) => {
            let step = |step: &str| match step.is_empty() || !step.chars().all(|c| c.is_ascii_digit()) {
                true => Ok(Value::str(step)),
                false => numbers::parse_int(step, 10).map(|n| Value::Int(n.unwrap_or_default())),
            };
            path.split('.').map(step).collect::<Result<_, _>>()?
        }
        other => vec![other.clone()],
    };
    let mut item = item.clone();
    for step in steps {
        item = attributes::item(&item, &step)?;
        if item.is_undefined()
            && let Some(default) = default
        {
            item = default.clone();
        }
    }
    Ok(item)
}

pub(super) fn map(value: &Value, mut args: Args) -> Result<Vec<Value>, Error> {
    // Without items Jinja does not evaluate the arguments.
    if !value.is_true() {
        return Ok(Vec::new());
    }
    let items = value.iterate()?;
    let mut out = Vec::new();
    if args.positional.is_empty() && args.named.iter().any(|(name, _)| name == "attribute") {
        let [attribute, default] = args.bind("the filter \"map\"", &["attribute", "default"])?;
        let attribute = attribute.unwrap_or(Value::None);
        let default = default.filter(|default| !matches!(default, Value::None));
        for item in items {
            out.push(path(&item, &attribute, default.as_ref())?);
        }
        return Ok(out);
    }
    if args.positional.is_empty() {
        return Err(Error::failed("the filter \"map\" needs a filter or an attribute"));
    }
    let name = text(&args.positional.remove(0), "the filter \"map\"")?;
    for item in items {
        let args = Args {
            positional: args.positional.clone(),
            named: args.named.clone(),
        };
        out.push(apply(&name, &item, args)?);
    }
    Ok(out)
}

pub(super) fn select(name: &str, value: &Value, args: Args) -> Result<Vec<Value>, Error> {
    if !value.is_true() {
        return Ok(Vec::new());
    }
    let items = value.iterate()?;
    let Args { positional, named } = args;
    let mut positional = positional.into_iter();
    let attribute = match name.ends_with("attr") {
        false => None,
        true => Some(need(positional.next(), &described(name))?),
    };
    let test = positional.next();
    let rest: Vec<Value> = positional.collect();
    let mut out = Vec::new();
    for item in items {
        let looked_at = match &attribute {
            Some(attribute) => path(&item, attribute, None)?,
            None => item.clone(),
        };
        let holds = match &test {
            None => looked_at.is_true(),
            Some(test) => {
                let args = Args {
                    positional: rest.clone(),
                    named: named.clone(),
                };
                checks::apply(&text(test, &described(name))?, &looked_at, args)?
            }
        };
        if holds == name.starts_with("select") {
            out.push(item);
        }
    }
    Ok(out)
}

pub(super) fn unique(value: &Value, case_sensitive: bool, attribute: Option<Value>) -> Result<Vec<Value>, Error> {
    let attribute = attribute.unwrap_or(Value::None);
    let mut seen: Vec<Value> = Vec::new();
    let mut out = Vec::new();
    for item in value.iterate()? {
        let key = folded(path(&item, &attribute, None)?, case_sensitive);
        hashable(&key)?;
        if !seen.iter().any(|other| equal(other, &key)) {
            seen.push(key);
            out.push(item);
        }
    }
    Ok(out)
}

/// Text in lower case, unless case counts.
fn folded(value: Value, case_sensitive: bool) -> Value {
    match value.as_str() {
        Some(text) if !case_sensitive => Value::str(lower(text)),
        _ => value,
    }
}

/// A stable sort by keys.
fn sort(items: Vec<(Value, Value)>, reverse: bool) -> Result<Vec<(Value, Value)>, Error> {
    let mut failed = None;
    let mut items = items;
    if reverse {
        items.reverse();
    }
    items.sort_by(|(a, _), (b, _)| match compare(a, b) {
        Ok(order) => order.unwrap_or(Ordering::Equal),
        Err(error) => {
            failed.get_or_insert(error);
            Ordering::Equal
        }
    });
    if reverse {
        items.reverse();
    }
    match failed {
        Some(error) => Err(error),
        None => Ok(items),
    }
}

/// Python requires a number here, and does not use the truth of other values.
fn flag(value: Option<Value>, of: &str) -> Result<bool, Error> {
    value.map_or(Ok(false), |value| Ok(int(&value, of)? != 0))
}

pub(super) fn ordered(name: &str, value: &Value, args: Args) -> Result<Value, Error> {
    let of = described(name);
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    match name {
        "dictsort" => {
            let [case_sensitive, by, reverse] = args.bind(&of, &["case_sensitive", "by", "reverse"])?;
            let Value::Dict(dict) = value else {
                return Err(Error::failed(format!("{of} takes a dict, not {}", value.described())));
            };
            let by_value = match by.map(|by| text(&by, &of)).transpose()?.as_deref() {
                None | Some("key") => false,
                Some("value") => true,
                Some(_) => return Err(Error::failed(format!("{of} sorts by \"key\" or \"value\""))),
            };
            let case_sensitive = is_true(case_sensitive);
            let reverse = flag(reverse, &of)?;
            let pairs = dict.0.iter().map(|(k, v)| {
                let key = folded(if by_value { v } else { k }.clone(), case_sensitive);
                (key, Value::tuple(vec![k.clone(), v.clone()]))
            });
            let sorted = sort(pairs.collect(), reverse)?;
            Ok(Value::list(sorted.into_iter().map(|(_, pair)| pair).collect()))
        }
        "sort" => {
            let [reverse, case_sensitive, attribute] = args.bind(&of, &["reverse", "case_sensitive", "attribute"])?;
            let attributes: Vec<Value> = match attribute {
                Some(Value::Str(list)) => list.split(',').map(Value::str).collect(),
                other => vec![other.unwrap_or(Value::None)],
            };
            let case_sensitive = is_true(case_sensitive);
            let mut keyed = Vec::new();
            for item in value.iterate()? {
                let keys = attributes
                    .iter()
                    .map(|attribute| Ok(folded(path(&item, attribute, None)?, case_sensitive)));
                keyed.push((Value::list(keys.collect::<Result<_, Error>>()?), item));
            }
            let sorted = sort(keyed, flag(reverse, &of)?)?;
            Ok(Value::list(sorted.into_iter().map(|(_, item)| item).collect()))
        }
        "min" | "max" => {
            let [case_sensitive, attribute] = args.bind(&of, &["case_sensitive", "attribute"])?;
            let (case_sensitive, attribute) = (is_true(case_sensitive), attribute.unwrap_or(Value::None));
            let mut best: Option<(Value, Value)> = None;
            for item in value.iterate()? {
                let key = folded(path(&item, &attribute, None)?, case_sensitive);
                let wanted = if name == "max" {
                    Ordering::Greater
                } else {
                    Ordering::Less
                };
                if best.as_ref().map_or(Ok(true), |(best, _)| {
                    Ok::<_, Error>(compare(&key, best)? == Some(wanted))
                })? {
                    best = Some((key, item));
                }
            }
            Ok(best.map_or_else(|| Value::undefined("an item of nothing"), |(_, item)| item))
        }
        _ => {
            let [attribute, default, case_sensitive] = args.bind(&of, &["attribute", "default", "case_sensitive"])?;
            let attribute = need(attribute, &of)?;
            let default = default.filter(|default| !matches!(default, Value::None));
            let case_sensitive = is_true(case_sensitive);
            let mut keyed = Vec::new();
            for item in value.iterate()? {
                keyed.push((folded(path(&item, &attribute, default.as_ref())?, case_sensitive), item));
            }
            let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
            for (key, item) in sort(keyed, false)? {
                match groups.last_mut() {
                    Some((last, items)) if equal(last, &key) => items.push(item),
                    _ => groups.push((key, vec![item])),
                }
            }
            let mut out = Vec::new();
            for (key, items) in groups {
                // Keys are shown as in the first item.
                let shown = match case_sensitive {
                    true => key,
                    false => path(&items[0], &attribute, default.as_ref())?,
                };
                out.push(Value::Group(Rc::new(vec![shown, Value::list(items)])));
            }
            Ok(Value::list(out))
        }
    }
}
