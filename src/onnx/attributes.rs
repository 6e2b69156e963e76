//! Attributes of one node, read by name with their defaults.
//!
//! Records which attributes were read: an attribute that was not read may change the operator's meaning, so the
//! operator then counts as unknown.

use std::cell::Cell;

use super::proto::{AttributeProto, TensorProto, attribute_type};

/// An attribute that is missing or of the wrong kind: the reason, without the node.
pub(super) type Problem = String;

pub(super) struct Attributes {
    list: Vec<(AttributeProto, Cell<bool>)>,
}

impl Attributes {
    pub(super) fn new(list: Vec<AttributeProto>) -> Self {
        Attributes {
            list: list.into_iter().map(|a| (a, Cell::new(false))).collect(),
        }
    }

    fn find(&self, name: &str) -> Option<&AttributeProto> {
        let (attribute, used) = self.list.iter().find(|(a, _)| a.name.as_deref() == Some(name))?;
        used.set(true);
        Some(attribute)
    }

    /// Marks attributes that have no effect here as read.
    pub(super) fn ignore(&self, names: &[&str]) {
        for name in names {
            self.find(name);
        }
    }

    /// Whether an integer attribute has this value; does not count as reading it.
    pub(super) fn is_int(&self, name: &str, value: i64) -> bool {
        let attribute = self.list.iter().find(|(a, _)| a.name.as_deref() == Some(name));
        attribute.is_some_and(|(a, _)| {
            a.i == Some(value) || (value == 0 && a.i.is_none() && a.r#type == Some(attribute_type::INT))
        })
    }

    pub(super) fn is_zero(&self, name: &str) -> bool {
        self.is_int(name, 0)
    }

    /// The same for strings.
    pub(super) fn is_string(&self, name: &str, value: &str) -> bool {
        let attribute = self.list.iter().find(|(a, _)| a.name.as_deref() == Some(name));
        attribute.is_some_and(|(a, _)| a.s.as_deref() == Some(value.as_bytes()))
    }

    /// The first attribute that was not read, as `name` or `name=value`.
    pub(super) fn left_over(&self) -> Option<String> {
        let (attribute, _) = self.list.iter().find(|(_, used)| !used.get())?;
        let name = attribute.name.as_deref().unwrap_or("unnamed");
        Some(match (attribute.i, attribute.f, &attribute.s) {
            (Some(i), _, _) => format!("{name}={i}"),
            (_, Some(f), _) => format!("{name}={f}"),
            (_, _, Some(s)) if s.len() < 64 => format!("{name}={}", String::from_utf8_lossy(s)),
            _ => name.to_string(),
        })
    }

    fn typed<T>(
        &self,
        name: &str,
        kind: i32,
        kind_name: &str,
        value: impl Fn(&AttributeProto) -> Option<T>,
        default: Option<T>,
    ) -> Result<Option<T>, Problem> {
        let Some(attribute) = self.find(name) else {
            return Ok(None);
        };
        match value(attribute) {
            Some(value) => Ok(Some(value)),
            // proto3 writers omit zeros.
            None if attribute.r#type == Some(kind) && default.is_some() => Ok(default),
            None => Err(format!("its attribute {name:?} is not {kind_name}")),
        }
    }

    pub(super) fn int(&self, name: &str) -> Result<Option<i64>, Problem> {
        self.typed(name, attribute_type::INT, "an integer", |a| a.i, Some(0))
    }

    pub(super) fn int_or(&self, name: &str, default: i64) -> Result<i64, Problem> {
        Ok(self.int(name)?.unwrap_or(default))
    }

    pub(super) fn flag(&self, name: &str, default: bool) -> Result<bool, Problem> {
        Ok(self.int_or(name, i64::from(default))? != 0)
    }

    /// A count that is omitted or 0 when it does not apply.
    pub(super) fn count(&self, name: &str) -> Result<Option<usize>, Problem> {
        match self.int_or(name, 0)? {
            0 => Ok(None),
            n => usize::try_from(n)
                .ok()
                .filter(|n| *n <= i32::MAX as usize)
                .map(Some)
                .ok_or_else(|| format!("its attribute {name:?} is {n}")),
        }
    }

    pub(super) fn required_count(&self, name: &str) -> Result<usize, Problem> {
        self.count(name)?
            .ok_or_else(|| format!("its attribute {name:?} is missing or 0"))
    }

    pub(super) fn float(&self, name: &str) -> Result<Option<f32>, Problem> {
        self.typed(name, attribute_type::FLOAT, "a float", |a| a.f, Some(0.0))
    }

    pub(super) fn float_or(&self, name: &str, default: f32) -> Result<f32, Problem> {
        Ok(self.float(name)?.unwrap_or(default))
    }

    pub(super) fn string(&self, name: &str) -> Result<Option<String>, Problem> {
        let text = |a: &AttributeProto| a.s.as_ref().and_then(|s| String::from_utf8(s.to_vec()).ok());
        self.typed(name, attribute_type::STRING, "a string", text, Some(String::new()))
    }

    /// An empty list of another element type counts as an empty list of integers.
    pub(super) fn ints(&self, name: &str) -> Result<Option<Vec<i64>>, Problem> {
        self.typed(
            name,
            attribute_type::INTS,
            "a list of integers",
            |a| (!a.ints.is_empty()).then(|| a.ints.clone()),
            Some(Vec::new()),
        )
    }

    pub(super) fn floats(&self, name: &str) -> Option<Vec<f32>> {
        self.find(name).map(|a| a.floats.clone())
    }

    pub(super) fn tensor(&self, name: &str) -> Result<Option<&TensorProto>, Problem> {
        match self.find(name) {
            None => Ok(None),
            Some(attribute) => match &attribute.t {
                Some(tensor) => Ok(Some(tensor)),
                None => Err(format!("its attribute {name:?} is not a tensor")),
            },
        }
    }
}
