//! Python's methods of text, lists and dicts, and those of loops and cyclers.

use super::call::{Args, int, need, text};
use super::checks::has_case;
use super::operators::check_size;
use super::text::{
    capitalize, clamp, is_cased, is_printable, is_space, lower, plain_classes, split_lines, swap_case, title, upper,
};
use super::value::{Object, Value, View, equal};
use super::wrap::{center, pad};
use super::{Error, str_format};

pub(super) fn call(value: &Value, name: &'static str, args: Args) -> Result<Value, Error> {
    let of = format!("the method {name:?}");
    match value {
        Value::Str(given) => string(given, name, &of, args),
        Value::List(items) | Value::Tuple(items) | Value::Group(items) => {
            let is_list = matches!(value, Value::List(_));
            list(items, name, &of, args, is_list)
        }
        Value::Range(_) => list(&value.iterate()?, name, &of, args, false),
        Value::Dict(dict) => match name {
            "items" | "keys" | "values" => {
                args.bind(&of, &[])?;
                let view = match name {
                    "items" => View::Items,
                    "keys" => View::Keys,
                    _ => View::Values,
                };
                Ok(Value::View(view, dict.clone()))
            }
            "copy" => args.bind(&of, &[]).map(|[]| value.clone()),
            "get" => {
                let args = args.unnamed(&of)?;
                let (key, default) = match &args[..] {
                    [key] => (key, Value::None),
                    [key, default] => (key, default.clone()),
                    _ => return Err(Error::failed(format!("{of} takes a key and a default"))),
                };
                super::value::hashable(key)?;
                Ok(dict.get(key).cloned().unwrap_or(default))
            }
            "fromkeys" => Err(Error::unsupported(of)),
            _ => Err(sandbox(&of)),
        },
        Value::Object(object) => stateful(object, name, &of, args),
        _ => Err(Error::unsupported(of)),
    }
}

fn sandbox(of: &str) -> Error {
    Error::failed(format!("{of} changes a value, which Jinja's sandbox does not allow"))
}

fn stateful(object: &Object, name: &str, of: &str, args: Args) -> Result<Value, Error> {
    match (object, name) {
        (Object::Cycler(items, at), "next") => {
            args.bind(of, &[])?;
            let item = items[at.get()].clone();
            at.set((at.get() + 1) % items.len());
            Ok(item)
        }
        (Object::Cycler(_, at), _) => {
            args.bind(of, &[])?;
            at.set(0);
            Ok(Value::None)
        }
        (Object::Loop(state), "cycle") => {
            let items = args.unnamed(of)?;
            match items.is_empty() {
                true => Err(Error::failed("loop.cycle needs items")),
                false => Ok(items[state.index.get() % items.len()].clone()),
            }
        }
        (Object::Loop(state), _) => {
            let values = args.unnamed(of)?;
            let mut last = state.last_changed.borrow_mut();
            let same = last
                .as_ref()
                .is_some_and(|last| last.len() == values.len() && last.iter().zip(&values).all(|(a, b)| equal(a, b)));
            if !same {
                *last = Some(values);
            }
            Ok(Value::Bool(!same))
        }
        _ => Err(Error::unsupported(of)),
    }
}

fn list(items: &[Value], name: &str, of: &str, args: Args, is_list: bool) -> Result<Value, Error> {
    match name {
        "count" => {
            let [item] = bare(args, of)?;
            let item = need(item, of)?;
            Ok(Value::Int(
                items.iter().filter(|other| equal(other, &item)).count() as i128
            ))
        }
        "index" => {
            let [item, start, stop] = bare(args, of)?;
            let item = need(item, of)?;
            let bound = |value: Option<Value>, default: usize| match value {
                Some(value) => int(&value, of).map(|n| clamp(n, items.len())),
                None => Ok(default),
            };
            let (start, stop) = (bound(start, 0)?, bound(stop, items.len())?);
            let at = (start..stop).find(|i| equal(&items[*i], &item));
            at.map(|i| Value::Int(i as i128))
                .ok_or_else(|| Error::failed(format!("{of}: there is no such item")))
        }
        "copy" if is_list => bare::<0>(args, of).map(|_| Value::list(items.to_vec())),
        _ => Err(sandbox(of)),
    }
}

/// Arguments of a method that accepts them only by position.
fn bare<const N: usize>(args: Args, of: &str) -> Result<[Option<Value>; N], Error> {
    let args = Args {
        positional: args.unnamed(of)?,
        named: Vec::new(),
    };
    args.bind(of, &[""; N])
}

/// `str.replace`; a negative count is all.
pub(super) fn replace(text: &str, old: &str, new: &str, count: i128) -> Result<String, Error> {
    let found = if old.is_empty() {
        text.chars().count() + 1
    } else {
        text.matches(old).count()
    };
    check_size(new.len().max(1), found)?;
    Ok(match usize::try_from(count) {
        Ok(count) => text.replacen(old, new, count),
        Err(_) => text.replace(old, new),
    })
}

/// A part of a text by character positions, for `find`, `count` and `startswith`; `None` if it begins after the end.
fn part<'a>(
    text: &'a str,
    start: Option<Value>,
    stop: Option<Value>,
    of: &str,
) -> Result<Option<(usize, &'a str)>, Error> {
    let length = text.chars().count();
    let bound = |value: Option<Value>, default: usize| match value {
        None | Some(Value::None) => Ok(default as i128),
        Some(value) => int(&value, of),
    };
    let (start, stop) = (bound(start, 0)?, bound(stop, length)?);
    if start > length as i128 {
        return Ok(None);
    }
    let (start, stop) = (clamp(start, length), clamp(stop, length));
    if start > stop {
        return Ok(None);
    }
    let byte = |index: usize| text.char_indices().nth(index).map_or(text.len(), |(i, _)| i);
    Ok(Some((start, &text[byte(start)..byte(stop)])))
}

fn string(given: &str, name: &'static str, of: &str, args: Args) -> Result<Value, Error> {
    let truth = |is: bool| Ok(Value::Bool(is));
    let done = |text: String| Ok(Value::str(text));
    match name {
        "format" => return done(str_format::format(given, &args)?),
        "split" | "rsplit" => return split(given, name, of, args),
        "splitlines" => {
            let [keep] = args.bind(of, &["keepends"])?;
            let keep = keep.map_or(Ok(0), |keep| int(&keep, of))? != 0;
            let lines = split_lines(given, keep);
            return Ok(Value::list(lines.iter().map(Value::str).collect()));
        }
        "expandtabs" => {
            let [size] = args.bind(of, &["tabsize"])?;
            return done(expand_tabs(given, size.map_or(Ok(8), |size| int(&size, of))?)?);
        }
        "encode" | "format_map" | "maketrans" | "translate" => return Err(Error::unsupported(of)),
        "replace" if !args.named.is_empty() => {
            return Err(Error::unsupported(
                "named arguments of the method \"replace\", which Python has since 3.13,",
            ));
        }
        _ => {}
    }
    match name {
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = bare(args, of)?;
            let chars = match chars {
                None | Some(Value::None) => None,
                Some(chars) => Some(text(&chars, of)?),
            };
            let goes = |c: char| chars.as_ref().map_or(is_space(c), |chars| chars.contains(c));
            done(
                match name {
                    "strip" => given.trim_matches(goes),
                    "lstrip" => given.trim_start_matches(goes),
                    _ => given.trim_end_matches(goes),
                }
                .to_string(),
            )
        }
        "find" | "rfind" | "index" | "rindex" | "count" => {
            let [wanted, start, stop] = bare(args, of)?;
            let wanted = text(&need(wanted, of)?, of)?;
            let found = part(given, start, stop, of)?;
            if name == "count" {
                let count = found.map_or(0, |(_, part)| match wanted.is_empty() {
                    true => part.chars().count() + 1,
                    false => part.matches(&*wanted).count(),
                });
                return Ok(Value::Int(count as i128));
            }
            let at = found.and_then(|(start, part)| {
                let at = if name.starts_with('r') {
                    part.rfind(&*wanted)
                } else {
                    part.find(&*wanted)
                };
                at.map(|at| start + part[..at].chars().count())
            });
            match at {
                Some(at) => Ok(Value::Int(at as i128)),
                None if name.ends_with("find") => Ok(Value::Int(-1)),
                None => Err(Error::failed(format!("{of}: the text does not hold {wanted:?}"))),
            }
        }
        "startswith" | "endswith" => {
            let [wanted, start, stop] = bare(args, of)?;
            let wanted = match need(wanted, of)? {
                Value::Tuple(items) => items.iter().map(|item| text(item, of)).collect::<Result<Vec<_>, _>>()?,
                one => vec![text(&one, of)?],
            };
            let found = part(given, start, stop, of)?;
            truth(found.is_some_and(|(_, part)| {
                wanted.iter().any(|wanted| match name {
                    "startswith" => part.starts_with(&**wanted),
                    _ => part.ends_with(&**wanted),
                })
            }))
        }
        "removeprefix" | "removesuffix" => {
            let [wanted] = bare(args, of)?;
            let wanted = text(&need(wanted, of)?, of)?;
            let rest = match name {
                "removeprefix" => given.strip_prefix(&*wanted),
                _ => given.strip_suffix(&*wanted),
            };
            done(rest.unwrap_or(given).to_string())
        }
        "partition" | "rpartition" => {
            let [separator] = bare(args, of)?;
            let separator = text(&need(separator, of)?, of)?;
            if separator.is_empty() {
                return Err(Error::failed(format!("{of}: the separator is empty")));
            }
            let found = match name {
                "partition" => given.split_once(&*separator),
                _ => given.rsplit_once(&*separator),
            };
            let parts = match found {
                Some((before, after)) => [before, &separator, after],
                None if name == "partition" => [given, "", ""],
                None => ["", "", given],
            };
            Ok(Value::tuple(parts.into_iter().map(Value::str).collect()))
        }
        "replace" => {
            let [old, new, count] = bare(args, of)?;
            let (old, new) = (text(&need(old, of)?, of)?, text(&need(new, of)?, of)?);
            done(replace(
                given,
                &old,
                &new,
                count.map_or(Ok(-1), |count| int(&count, of))?,
            )?)
        }
        "join" => {
            let [items] = bare(args, of)?;
            let mut parts = Vec::new();
            for item in need(items, of)?.iterate()? {
                parts.push(text(&item, of)?);
            }
            check_size(
                given.len() + parts.iter().map(|part| part.len()).max().unwrap_or(0),
                parts.len().max(1),
            )?;
            done(parts.join(given))
        }
        "center" | "ljust" | "rjust" => {
            let [width, fill] = bare(args, of)?;
            let width = int(&need(width, of)?, of)?;
            let fill = fill.map_or(Ok(" ".into()), |fill| text(&fill, of))?;
            let mut chars = fill.chars();
            let (Some(fill), None) = (chars.next(), chars.next()) else {
                return Err(Error::failed(format!("{of}: the fill is not one character")));
            };
            let missing = (width - given.chars().count() as i128).max(0);
            done(match name {
                "center" => center(given, width, fill)?,
                "ljust" => pad(given, 0, missing, fill)?,
                _ => pad(given, missing, 0, fill)?,
            })
        }
        "zfill" => {
            let [width] = bare(args, of)?;
            let missing = int(&need(width, of)?, of)? - given.chars().count() as i128;
            let signed = given.starts_with(['+', '-']);
            let (sign, digits) = given.split_at(usize::from(signed));
            done(sign.to_string() + &pad(digits, missing, 0, '0')?)
        }
        name => {
            bare::<0>(args, of)?;
            plain(given, name, of)
        }
    }
}

/// Methods without arguments.
fn plain(given: &str, name: &str, of: &str) -> Result<Value, Error> {
    let some_and_all = |is: fn(char) -> bool| -> Result<bool, Error> {
        plain_classes(given, of)?;
        Ok(!given.is_empty() && given.chars().all(is))
    };
    let is = match name {
        "lower" => return Ok(Value::str(lower(given))),
        "upper" => return Ok(Value::str(upper(given))),
        "capitalize" => return capitalize(given).map(Value::str),
        "title" => return title(given).map(Value::str),
        "swapcase" => return swap_case(given).map(Value::str),
        "casefold" if given.is_ascii() => return Ok(Value::str(lower(given))),
        "casefold" => return Err(Error::unsupported("the method \"casefold\" of text beyond ASCII")),
        "isascii" => given.is_ascii(),
        "isspace" => !given.is_empty() && given.chars().all(is_space),
        "isprintable" => given.chars().all(|c| c == ' ' || is_printable(c)),
        "islower" => has_case(given, char::is_lowercase),
        "isupper" => has_case(given, char::is_uppercase),
        "isalpha" => some_and_all(char::is_alphabetic)?,
        "isalnum" => some_and_all(char::is_alphanumeric)?,
        "isdigit" | "isdecimal" | "isnumeric" => some_and_all(|c| c.is_ascii_digit())?,
        "isidentifier" => {
            plain_classes(given, of)?;
            let begins = given.starts_with(|c: char| c.is_alphabetic() || c == '_');
            begins && given.chars().all(|c| c.is_alphanumeric() || c == '_')
        }
        _ => {
            plain_classes(given, of)?;
            let mut in_word = false;
            let mut any = false;
            let good = given.chars().all(|c| {
                let fits = !is_cased(c) || c.is_uppercase() != in_word;
                in_word = is_cased(c);
                any |= in_word;
                fits
            });
            good && any
        }
    };
    Ok(Value::Bool(is))
}

fn expand_tabs(text: &str, size: i128) -> Result<String, Error> {
    let mut out = String::new();
    let mut column = 0i128;
    for c in text.chars() {
        match c {
            '\t' if size > 0 => {
                let spaces = size - column % size;
                out = pad(&out, 0, spaces, ' ')?;
                column += spaces;
            }
            '\t' => {}
            '\n' | '\r' => {
                out.push(c);
                column = 0;
            }
            c => {
                out.push(c);
                column += 1;
            }
        }
    }
    Ok(out)
}

fn split(given: &str, name: &str, of: &str, args: Args) -> Result<Value, Error> {
    let [separator, most] = args.bind(of, &["sep", "maxsplit"])?;
    let most = most.map_or(Ok(-1), |most| int(&most, of))?;
    let most = usize::try_from(most).unwrap_or(usize::MAX - 1);
    let from_right = name == "rsplit";
    let mut parts: Vec<&str> = match separator {
        None | Some(Value::None) => split_words(given, most, from_right),
        Some(separator) => {
            let separator = text(&separator, of)?;
            if separator.is_empty() {
                return Err(Error::failed(format!("{of}: the separator is empty")));
            }
            match from_right {
                true => given.rsplitn(most + 1, &*separator).collect(),
                false => given.splitn(most + 1, &*separator).collect(),
            }
        }
    };
    if from_right {
        parts.reverse();
    }
    Ok(Value::list(parts.into_iter().map(Value::str).collect()))
}

/// Splits at whitespace; the rest keeps the whitespace at its far end. From the right, the last word comes first.
fn split_words(text: &str, most: usize, from_right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        rest = match from_right {
            true => rest.trim_end_matches(is_space),
            false => rest.trim_start_matches(is_space),
        };
        if rest.is_empty() {
            return parts;
        }
        if parts.len() == most {
            parts.push(rest);
            return parts;
        }
        match from_right {
            true => {
                let at = rest
                    .rfind(is_space)
                    .map_or(0, |i| i + rest[i..].chars().next().map_or(1, char::len_utf8));
                parts.push(&rest[at..]);
                rest = &rest[..at];
            }
            false => {
                let at = rest.find(is_space).unwrap_or(rest.len());
                parts.push(&rest[..at]);
                rest = &rest[at..];
            }
        }
    }
}
