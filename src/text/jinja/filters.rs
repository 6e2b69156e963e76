//! Filters: the names after `|`.

use std::rc::Rc;

use super::call::{Args, int, need, text};
use super::operators::{check_size, slice};
use super::text::{capitalize, is_space, lower, plain_classes, upper};
use super::value::Value;
use super::{Error, arithmetic, attributes, html, json, methods, names, order, percent, wrap};

/// A filter's name for messages.
pub(super) fn described(name: &str) -> String {
    format!("the filter {name:?}")
}

pub(super) fn apply(name: &str, value: &Value, args: Args) -> Result<Value, Error> {
    if !names::FILTERS.contains(&name) {
        return Err(Error::failed(format!("no filter named {name:?}")));
    }
    match name {
        "random" | "urlize" => Err(Error::unsupported(described(name))),
        "map" => Value::generator(value, |value| order::map(value, args)),
        "select" | "reject" | "selectattr" | "rejectattr" => {
            let name = name.to_string();
            Value::generator(value, move |value| order::select(&name, value, args))
        }
        "batch" | "slice" => {
            let is_batch = name == "batch";
            let of = described(name);
            let [count, fill] = args.bind(&of, &[if is_batch { "linecount" } else { "slices" }, "fill_with"])?;
            let count = need(count, &of)?;
            Value::generator(value, move |value| lines(is_batch, value, &count, fill))
        }
        "unique" => {
            let [case_sensitive, attribute] = args.bind(&described(name), &["case_sensitive", "attribute"])?;
            let case_sensitive = case_sensitive.is_some_and(|is| is.is_true());
            Value::generator(value, move |value| order::unique(value, case_sensitive, attribute))
        }
        "sort" | "dictsort" | "min" | "max" | "groupby" => order::ordered(name, value, args),
        "abs" | "round" | "int" | "float" | "sum" | "filesizeformat" => arithmetic::number(name, value, args),
        "first" | "last" | "length" | "count" | "list" | "join" | "reverse" | "items" | "attr" | "default" | "d"
        | "tojson" | "pprint" | "string" | "safe" => general(name, value, args),
        _ => textual(name, value, args),
    }
}

fn general(name: &str, value: &Value, args: Args) -> Result<Value, Error> {
    let of = described(name);
    Ok(match name {
        "default" | "d" => {
            let [default, boolean] = args.bind(&of, &["default_value", "boolean"])?;
            let replaced = value.is_undefined() || boolean.is_some_and(|b| b.is_true()) && !value.is_true();
            match replaced {
                true => default.unwrap_or_else(|| Value::str("")),
                false => value.clone(),
            }
        }
        "tojson" => Value::str(json::to_json(value, args)?),
        "join" => {
            let [separator, attribute] = args.bind(&of, &["d", "attribute"])?;
            let separator = separator.map_or(Ok("".into()), |d| d.to_text())?;
            let mut out = String::new();
            for (i, item) in value.iterate()?.into_iter().enumerate() {
                if i > 0 {
                    out.push_str(&separator);
                }
                let item = match &attribute {
                    None | Some(Value::None) => item,
                    Some(attribute) => order::path(&item, attribute, None)?,
                };
                out.push_str(&item.to_text()?);
                check_size(out.len(), 1)?;
            }
            Value::str(out)
        }
        "attr" => {
            let [attribute] = args.bind(&of, &["name"])?;
            attributes::python_attribute(value, &text(&need(attribute, &of)?, &of)?)?
        }
        name => {
            args.bind(&of, &[])?;
            match name {
                "first" => {
                    let first = match value {
                        Value::Stream(stream) => stream.next()?,
                        _ => value.iterate()?.into_iter().next(),
                    };
                    first.unwrap_or_else(|| Value::undefined("the first item of nothing"))
                }
                "last" => {
                    if matches!(value, Value::Stream(_)) {
                        return Err(Error::failed(format!("{of} does not take a generator")));
                    }
                    value
                        .iterate()?
                        .pop()
                        .unwrap_or_else(|| Value::undefined("the last item of nothing"))
                }
                "length" | "count" => match value.len() {
                    Some(length) => Value::Int(length as i128),
                    None => return Err(Error::failed(format!("{} has no length", value.described()))),
                },
                "list" => Value::list(value.iterate()?),
                "reverse" => match value {
                    Value::Str(_) | Value::Safe(_) => {
                        slice(value, [None, None, Some(-1)])?.unwrap_or_else(|| Value::str(""))
                    }
                    Value::Stream(_) => Value::list(value.iterate()?.into_iter().rev().collect()),
                    _ => Value::stream(value.iterate()?.into_iter().rev().collect()),
                },
                "items" => match value {
                    Value::Undefined(_) => Value::stream(Vec::new()),
                    Value::Dict(dict) => Value::stream(
                        dict.0
                            .iter()
                            .map(|(k, v)| Value::tuple(vec![k.clone(), v.clone()]))
                            .collect(),
                    ),
                    other => return Err(Error::failed(format!("{of} takes a dict, not {}", other.described()))),
                },
                "string" => match value {
                    Value::Safe(_) => value.clone(),
                    _ => Value::Str(value.to_text()?),
                },
                "safe" => Value::Safe(value.to_text()?),
                "pprint" => {
                    let text = sorted_dicts(value)?.repr()?;
                    match text.chars().count() > 80 {
                        true => {
                            return Err(Error::unsupported(
                                "the filter \"pprint\" on what is longer than a line",
                            ));
                        }
                        false => Value::str(text),
                    }
                }
                name => return Err(Error::unsupported(format!("the filter {name:?}"))),
            }
        }
    })
}

/// The same with the keys of dicts in order.
fn sorted_dicts(value: &Value) -> Result<Value, Error> {
    let all = |items: &[Value]| items.iter().map(sorted_dicts).collect::<Result<Vec<Value>, Error>>();
    Ok(match value {
        Value::List(items) => Value::list(all(items)?),
        Value::Tuple(items) | Value::Group(items) => Value::tuple(all(items)?),
        Value::Dict(dict) => {
            let mut dict = (**dict).clone();
            if dict.0.iter().any(|(key, _)| key.as_str().is_none()) && dict.0.len() > 1 {
                return Err(Error::unsupported("the filter \"pprint\" on keys that are not text"));
            }
            dict.0.sort_by_key(|(key, _)| key.as_str().cloned());
            for (_, value) in &mut dict.0 {
                *value = sorted_dicts(value)?;
            }
            Value::Dict(Rc::new(dict))
        }
        other => other.clone(),
    })
}

fn lines(is_batch: bool, value: &Value, count: &Value, fill: Option<Value>) -> Result<Vec<Value>, Error> {
    let count = int(count, &described(if is_batch { "batch" } else { "slice" }))?;
    let fill = fill.filter(|fill| !matches!(fill, Value::None));
    let items = value.iterate()?;
    let lists = match is_batch {
        true => batch(items, count, fill)?,
        false => slices(items, count, fill)?,
    };
    Ok(lists.into_iter().map(Value::list).collect())
}

fn batch(items: Vec<Value>, count: i128, fill: Option<Value>) -> Result<Vec<Vec<Value>>, Error> {
    let mut lists: Vec<Vec<Value>> = Vec::new();
    let mut list: Vec<Value> = Vec::new();
    for item in items {
        if list.len() as i128 == count {
            lists.push(std::mem::take(&mut list));
        }
        list.push(item);
    }
    if !list.is_empty() {
        if let Some(fill) = fill {
            let missing = usize::try_from(count - list.len() as i128).unwrap_or(0);
            check_size(missing, 1)?;
            list.extend(std::iter::repeat_n(fill, missing));
        }
        lists.push(list);
    }
    // With zero items per line, Jinja begins with an empty list.
    if count == 0 && !lists.is_empty() {
        return Err(Error::unsupported("the filter \"batch\" with no item a line"));
    }
    Ok(lists)
}

fn slices(items: Vec<Value>, count: i128, fill: Option<Value>) -> Result<Vec<Vec<Value>>, Error> {
    if count <= 0 {
        return Err(Error::failed("the filter \"slice\" needs a number above zero"));
    }
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    check_size(count, 1)?;
    let (each, longer) = (items.len() / count, items.len() % count);
    let mut items = items.into_iter();
    let mut lists = Vec::new();
    for i in 0..count {
        let mut list: Vec<Value> = items.by_ref().take(each + usize::from(i < longer)).collect();
        if let Some(fill) = &fill
            && i >= longer
        {
            list.push(fill.clone());
        }
        lists.push(list);
    }
    Ok(lists)
}

/// Filters on text, which convert other values to text.
fn textual(name: &str, value: &Value, args: Args) -> Result<Value, Error> {
    let of = described(name);
    match name {
        "e" | "escape" => {
            args.bind(&of, &[])?;
            return Ok(Value::Safe(html::escape(value)?.into()));
        }
        "forceescape" => {
            args.bind(&of, &[])?;
            return Ok(Value::Safe(html::escape_text(&value.to_text()?).into()));
        }
        "striptags" => {
            args.bind(&of, &[])?;
            return Ok(Value::str(html::strip_tags(&value.to_text()?)?));
        }
        "urlencode" => {
            args.bind(&of, &[])?;
            return url_encode(value);
        }
        "xmlattr" => return xml_attributes(value, args),
        "replace" => {
            let [old, new, count] = args.bind(&of, &["old", "new", "count"])?;
            let (old, new) = (need(old, &of)?.to_text()?, need(new, &of)?.to_text()?);
            let count = match count {
                None | Some(Value::None) => -1,
                Some(count) => int(&count, &of)?,
            };
            return Ok(Value::str(methods::replace(&value.to_text()?, &old, &new, count)?));
        }
        _ => {}
    }
    if matches!(value, Value::Safe(_)) {
        return Err(Error::unsupported(format!("{of} on escaped text")));
    }
    let given = value.to_text()?;
    // These accept only text; the others convert.
    if matches!(name, "indent" | "truncate" | "wordwrap") && value.as_str().is_none() {
        return Err(Error::failed(format!("{of} takes text, not {}", value.described())));
    }
    let result = match name {
        "trim" => {
            let [chars] = args.bind(&of, &["chars"])?;
            match chars {
                None | Some(Value::None) => given.trim_matches(is_space).to_string(),
                Some(chars) => {
                    let chars = text(&chars, &of)?;
                    given.trim_matches(|c| chars.contains(c)).to_string()
                }
            }
        }
        "center" => {
            let [width] = args.bind(&of, &["width"])?;
            wrap::center(&given, width.map_or(Ok(80), |width| int(&width, &of))?, ' ')?
        }
        "indent" => {
            let [width, first, blank] = args.bind(&of, &["width", "first", "blank"])?;
            let indention = match width {
                Some(Value::Str(text)) => text.to_string(),
                width => {
                    let width = width.map_or(Ok(4), |width| int(&width, &of))?;
                    let width = usize::try_from(width.max(0)).unwrap_or(usize::MAX);
                    check_size(width, given.len().max(1))?;
                    " ".repeat(width)
                }
            };
            let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
            wrap::indent(&given, &indention, is_true(first), is_true(blank))
        }
        "truncate" => {
            let [length, kill, end, leeway] = args.bind(&of, &["length", "killwords", "end", "leeway"])?;
            let length = length.map_or(Ok(255), |length| int(&length, &of))?;
            let end = end.map_or(Ok("...".into()), |end| text(&end, &of))?;
            let leeway = match leeway {
                None | Some(Value::None) => 5,
                Some(leeway) => int(&leeway, &of)?,
            };
            wrap::truncate(&given, length, kill.is_some_and(|kill| kill.is_true()), &end, leeway)?
        }
        "wordwrap" => {
            let parameters = ["width", "break_long_words", "wrapstring", "break_on_hyphens"];
            let [width, long, between, hyphens] = args.bind(&of, &parameters)?;
            let between = match between {
                None | Some(Value::None) => "\n".into(),
                Some(between) => text(&between, &of)?,
            };
            let is_true = |value: Option<Value>| value.is_none_or(|value| value.is_true());
            let width = width.map_or(Ok(79), |width| int(&width, &of))?;
            wrap::word_wrap(&given, width, is_true(long), &between, is_true(hyphens))?
        }
        "format" => {
            if !args.positional.is_empty() && !args.named.is_empty() {
                return Err(Error::failed(format!(
                    "{of} takes arguments with names or without, not both"
                )));
            }
            let values = match args.named.is_empty() {
                true => Value::tuple(args.positional),
                false => {
                    let pairs = args.named.into_iter().map(|(name, value)| (Value::str(name), value));
                    Value::Dict(Rc::new(super::value::Dict(pairs.collect())))
                }
            };
            percent::format(&given, &values)?
        }
        name => {
            args.bind(&of, &[])?;
            match name {
                "lower" => lower(&given),
                "upper" => upper(&given),
                "capitalize" => capitalize(&given)?,
                "title" => title(&given),
                "wordcount" => {
                    plain_classes(&given, &of)?;
                    let words = given.split(|c: char| !(c.is_alphanumeric() || c == '_'));
                    return Ok(Value::Int(words.filter(|word| !word.is_empty()).count() as i128));
                }
                name => return Err(Error::unsupported(format!("the filter {name:?}"))),
            }
        }
    };
    Ok(Value::str(result))
}

/// Jinja's own: words begin after hyphens, whitespace and opening brackets.
fn title(text: &str) -> String {
    let is_border = |c: char| "-({[<".contains(c) || is_space(c);
    let mut out = String::new();
    for part in text.split_inclusive(is_border) {
        let mut chars = part.chars();
        if let Some(first) = chars.next() {
            out.extend(first.to_uppercase());
            out.push_str(&lower(chars.as_str()));
        }
    }
    out
}

fn url_encode(value: &Value) -> Result<Value, Error> {
    let pairs: Vec<Value> = match value {
        Value::Dict(_) => general("items", value, Args::default())?.iterate()?,
        _ if value.as_str().is_some() || !matches!(value, Value::Stream(_)) && value.items().is_none() => {
            return Ok(Value::str(html::url_quote(&value.to_text()?, false)));
        }
        _ => value.iterate()?,
    };
    let mut out = Vec::new();
    for pair in pairs {
        let pair = pair.iterate()?;
        let [key, value] = &pair[..] else {
            return Err(Error::failed("the filter \"urlencode\" takes pairs"));
        };
        let quote = |value: &Value| value.to_text().map(|text| html::url_quote(&text, true));
        out.push(format!("{}={}", quote(key)?, quote(value)?));
    }
    Ok(Value::str(out.join("&")))
}

fn xml_attributes(value: &Value, args: Args) -> Result<Value, Error> {
    let [space] = args.bind("the filter \"xmlattr\"", &["autospace"])?;
    let Value::Dict(dict) = value else {
        return Err(Error::failed("the filter \"xmlattr\" takes a dict"));
    };
    let mut out = Vec::new();
    for (key, value) in &dict.0 {
        if matches!(value, Value::None | Value::Undefined(_)) {
            continue;
        }
        let name = text(key, "the filter \"xmlattr\"")?;
        if name.contains(|c: char| is_space(c) || "/>=".contains(c)) {
            return Err(Error::failed(format!("{name:?} is not an attribute name")));
        }
        out.push(format!("{}=\"{}\"", html::escape(key)?, html::escape(value)?));
    }
    let text = out.join(" ");
    let space = space.is_none_or(|space| space.is_true()) && !text.is_empty();
    Ok(Value::str(if space { format!(" {text}") } else { text }))
}
