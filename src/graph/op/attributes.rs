//! Attributes of operators: their values, and how the table describes them.
//!
//! A field of an operator is declared with one of the descriptions below, which has ONNX's name and default and
//! converts the field into an [`Attribute`] and back. The same description serves the ONNX reader and writer, the dump
//! and its parser: the two readers are [`AttributeSource`]s.

use super::{Rounding, ScatterMode};
use crate::tensor::{DType, Tensor};

/// The value of an attribute.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Attribute {
    /// An integer; flags are 0 and 1.
    Int(i64),
    /// A float.
    Float(f32),
    /// A list of integers.
    Ints(Vec<i64>),
    /// One of a few words.
    Text(&'static str),
    /// An element type; ONNX writes its number.
    DType(DType),
    /// A small tensor.
    Tensor(Tensor),
}

/// Why an attribute cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AttributeError {
    /// It violates ONNX's rules: the reason, as in "its attribute "axis" is missing".
    Malformed(String),
    /// A value that ONNX allows and Lapidary does not support, as `name=value`.
    Unsupported(String),
}

/// The source of one node's attributes. An absent name gives `None`; a value of another kind is an error.
pub(crate) trait AttributeSource {
    /// The source's error.
    type Error: From<AttributeError>;
    /// An integer.
    fn int(&self, name: &str) -> Result<Option<i64>, Self::Error>;
    /// A float.
    fn float(&self, name: &str) -> Result<Option<f32>, Self::Error>;
    /// A list of integers.
    fn ints(&self, name: &str) -> Result<Option<Vec<i64>>, Self::Error>;
    /// A text.
    fn text(&self, name: &str) -> Result<Option<String>, Self::Error>;
    /// An element type; [`AttributeError::Unsupported`] for one that Lapidary does not have.
    fn dtype(&self, name: &str) -> Result<Option<DType>, Self::Error>;
    /// A tensor.
    fn tensor(&self, name: &str) -> Result<Option<Tensor>, Self::Error>;
    /// Attributes that have no effect here: they count as read.
    fn ignore(&self, names: &[&str]);
}

fn malformed<T, E: From<AttributeError>>(reason: String) -> Result<T, E> {
    Err(AttributeError::Malformed(reason).into())
}

/// How one field is written as an attribute.
pub(super) trait AttributeSpec {
    type Field;
    fn name(&self) -> &'static str;
    /// The field's value for an omitted attribute; any valid value if it is required.
    fn default(&self) -> Self::Field;
    /// `None`: the attribute is omitted.
    fn value(&self, field: &Self::Field) -> Option<Attribute>;
    /// Whether writing the attribute is redundant.
    fn is_default(&self, field: &Self::Field) -> bool;
    fn read<S: AttributeSource>(&self, source: &S) -> Result<Self::Field, S::Error>;

    fn visit(&self, field: &Self::Field, each: &mut impl FnMut(&'static str, Option<Attribute>, bool)) {
        each(self.name(), self.value(field), self.is_default(field));
    }
}

macro_rules! spec {
    (
        $(#[$doc:meta])*
        $constructor:ident -> $spec:ident { $($part:ident : $part_type:ty),* } for $field:ty;
        default($this:ident) $default:expr;
        value($v:ident) $value:expr;
        is_default($same:ident) $is_default:expr;
        read($source:ident) $read:expr;
    ) => {
        pub(super) struct $spec { name: &'static str, $($part: $part_type),* }

        $(#[$doc])*
        pub(super) const fn $constructor(name: &'static str $(, $part: $part_type)*) -> $spec {
            $spec { name $(, $part)* }
        }

        impl AttributeSpec for $spec {
            type Field = $field;
            fn name(&self) -> &'static str {
                self.name
            }
            fn default(&self) -> $field {
                let $this = self;
                $default
            }
            fn value(&self, $v: &$field) -> Option<Attribute> {
                let $this = self;
                let _ = $this;
                $value
            }
            fn is_default(&self, $same: &$field) -> bool {
                let $this = self;
                let _ = ($this, $same);
                $is_default
            }
            fn read<S: AttributeSource>(&self, $source: &S) -> Result<$field, S::Error> {
                let $this = self;
                $read
            }
        }
    };
}

spec! {
    /// An integer.
    int -> Int { default: i64 } for i64;
    default(this) this.default;
    value(v) Some(Attribute::Int(*v));
    is_default(v) *v == this.default;
    read(source) Ok(source.int(this.name)?.unwrap_or(this.default));
}

spec! {
    /// A required integer.
    required_int -> RequiredInt {} for i64;
    default(_this) 0;
    value(v) Some(Attribute::Int(*v));
    is_default(v) false;
    read(source) match source.int(_this.name)? {
        Some(value) => Ok(value),
        None => malformed(format!("its attribute {:?} is missing", _this.name)),
    };
}

spec! {
    /// An integer without a default.
    optional_int -> OptionalInt {} for Option<i64>;
    default(_this) None;
    value(v) v.map(Attribute::Int);
    is_default(v) v.is_none();
    read(source) source.int(_this.name);
}

spec! {
    /// A flag, written 0 or 1.
    flag -> Flag { default: bool } for bool;
    default(this) this.default;
    value(v) Some(Attribute::Int(i64::from(*v)));
    is_default(v) *v == this.default;
    read(source) Ok(source.int(this.name)?.map_or(this.default, |v| v != 0));
}

spec! {
    /// A count that is omitted or 0 when it does not apply.
    count -> Count {} for Option<usize>;
    default(_this) None;
    value(v) v.map(|n| Attribute::Int(n as i64));
    is_default(v) v.is_none_or(|n| n == 0);
    read(source) read_count(source, _this.name);
}

spec! {
    /// A size, 0 by default.
    size -> Size {} for usize;
    default(_this) 0;
    value(v) Some(Attribute::Int(*v as i64));
    is_default(v) *v == 0;
    read(source) Ok(read_count(source, _this.name)?.unwrap_or(0));
}

spec! {
    /// A required size, not 0.
    required_size -> RequiredSize {} for usize;
    default(_this) 1;
    value(v) Some(Attribute::Int(*v as i64));
    is_default(v) *v == 0;
    read(source) match read_count(source, _this.name)? {
        Some(size) => Ok(size),
        None => malformed(format!("its attribute {:?} is missing or 0", _this.name)),
    };
}

spec! {
    /// A float.
    real -> Real { default: f32 } for f32;
    default(this) this.default;
    value(v) Some(Attribute::Float(*v));
    is_default(v) *v == this.default;
    read(source) Ok(source.float(this.name)?.unwrap_or(this.default));
}

spec! {
    /// A float that is always written.
    written_real -> WrittenReal { default: f32 } for f32;
    default(this) this.default;
    value(v) Some(Attribute::Float(*v));
    is_default(v) false;
    read(source) Ok(source.float(this.name)?.unwrap_or(this.default));
}

spec! {
    /// A float without a default.
    optional_real -> OptionalReal {} for Option<f32>;
    default(_this) None;
    value(v) v.map(Attribute::Float);
    is_default(v) v.is_none();
    read(source) source.float(_this.name);
}

spec! {
    /// A float that is omitted or 0 when it does not apply.
    nonzero_real -> NonzeroReal {} for Option<f32>;
    default(_this) None;
    value(v) v.map(Attribute::Float);
    is_default(v) v.is_none();
    read(source) Ok(source.float(_this.name)?.filter(|v| *v != 0.0));
}

spec! {
    /// One of two words, the first by default.
    either -> Either { no: &'static str, yes: &'static str } for bool;
    default(_this) false;
    value(v) Some(Attribute::Text(if *v { _this.yes } else { _this.no }));
    is_default(v) !*v;
    read(source) match source.text(_this.name)? {
        None => Ok(false),
        Some(text) if text == _this.no => Ok(false),
        Some(text) if text == _this.yes => Ok(true),
        Some(other) => Err(AttributeError::Unsupported(format!("{}={other}", _this.name)).into()),
    };
}

spec! {
    /// A required element type.
    element_type -> ElementType {} for DType;
    default(_this) DType::F32;
    value(v) Some(Attribute::DType(*v));
    is_default(v) false;
    read(source) match source.dtype(_this.name)? {
        Some(dtype) => Ok(dtype),
        None => malformed(format!("its attribute {:?} is missing", _this.name)),
    };
}

spec! {
    /// A float type, ONNX's 0 when it does not apply.
    float_type -> FloatType {} for Option<DType>;
    default(_this) None;
    value(v) v.map(Attribute::DType);
    is_default(v) v.is_none();
    read(source) match source.dtype(_this.name)? {
        Some(dtype) if !dtype.is_float() => malformed(format!("its {} is {dtype}, which is not a float type", _this.name)),
        dtype => Ok(dtype),
    };
}

spec! {
    /// A permutation of the axes; reversed if omitted.
    permutation -> Permutation {} for Option<Vec<usize>>;
    default(_this) None;
    value(v) v.as_ref().map(|perm| Attribute::Ints(perm.iter().map(|axis| *axis as i64).collect()));
    is_default(v) v.is_none();
    read(source) {
        let Some(perm) = source.ints(_this.name)? else {
            return Ok(None);
        };
        let mut seen = vec![false; perm.len()];
        for axis in &perm {
            match usize::try_from(*axis).ok().and_then(|i| seen.get_mut(i)) {
                Some(seen) if !*seen => *seen = true,
                _ => return malformed(format!("{} {perm:?} is not a permutation", _this.name)),
            }
        }
        Ok(Some(perm.iter().map(|axis| *axis as usize).collect()))
    };
}

spec! {
    /// How a scatter combines elements.
    scatter_mode -> Mode {} for ScatterMode;
    default(_this) ScatterMode::Replace;
    value(v) Some(Attribute::Text(match v {
        ScatterMode::Replace => "none",
        ScatterMode::Add => "add",
        ScatterMode::Mul => "mul",
        ScatterMode::Max => "max",
        ScatterMode::Min => "min",
    }));
    is_default(v) *v == ScatterMode::Replace;
    read(source) Ok(match source.text(_this.name)?.as_deref() {
        None | Some("none") => ScatterMode::Replace,
        Some("add") => ScatterMode::Add,
        Some("mul") => ScatterMode::Mul,
        Some("max") => ScatterMode::Max,
        Some("min") => ScatterMode::Min,
        Some(other) => return Err(AttributeError::Unsupported(format!("{}={other}", _this.name)).into()),
    });
}

spec! {
    /// A tensor of one element, the f32 0 by default; always written.
    element -> Element {} for Tensor;
    default(_this) Tensor::from_f32(vec![1], &[0.0]);
    value(v) Some(Attribute::Tensor(v.clone()));
    is_default(v) false;
    read(source) match source.tensor(_this.name)? {
        Some(value) if value.len() == 1 => Ok(value),
        Some(value) => malformed(format!("its {} has {} elements, not one", _this.name, value.len())),
        None => Ok(_this.default()),
    };
}

/// An enum whose variants are words in attributes.
pub(super) trait Words: Copy + PartialEq + 'static {
    /// Every variant with its word.
    const WORDS: &'static [(Self, &'static str)];
}

/// One of several words.
pub(super) struct WordSpec<W> {
    name: &'static str,
    default: W,
}

pub(super) const fn word<W: Words>(name: &'static str, default: W) -> WordSpec<W> {
    WordSpec { name, default }
}

impl<W: Words> AttributeSpec for WordSpec<W> {
    type Field = W;
    fn name(&self) -> &'static str {
        self.name
    }
    fn default(&self) -> W {
        self.default
    }
    fn value(&self, field: &W) -> Option<Attribute> {
        let word = W::WORDS.iter().find(|(variant, _)| variant == field);
        word.map(|(_, word)| Attribute::Text(word))
    }
    fn is_default(&self, field: &W) -> bool {
        *field == self.default
    }
    fn read<S: AttributeSource>(&self, source: &S) -> Result<W, S::Error> {
        let Some(text) = source.text(self.name)? else {
            return Ok(self.default);
        };
        match W::WORDS.iter().find(|(_, word)| *word == text) {
            Some((variant, _)) => Ok(*variant),
            None => Err(AttributeError::Unsupported(format!("{}={text}", self.name)).into()),
        }
    }
}

/// A rounding to codes in three attributes, all omitted if there is none.
pub(super) struct RoundingSpec {
    to: &'static str,
    scale: &'static str,
    zero_point: &'static str,
}

pub(super) const fn rounding(to: &'static str, scale: &'static str, zero_point: &'static str) -> RoundingSpec {
    RoundingSpec { to, scale, zero_point }
}

impl AttributeSpec for RoundingSpec {
    type Field = Option<Rounding>;
    fn name(&self) -> &'static str {
        self.to
    }
    fn default(&self) -> Option<Rounding> {
        None
    }
    fn value(&self, field: &Option<Rounding>) -> Option<Attribute> {
        field.map(|rounding| Attribute::DType(rounding.to))
    }
    fn is_default(&self, field: &Option<Rounding>) -> bool {
        field.is_none()
    }
    fn read<S: AttributeSource>(&self, source: &S) -> Result<Option<Rounding>, S::Error> {
        let (scale, zero_point) = (source.float(self.scale)?, source.int(self.zero_point)?);
        let Some(to) = source.dtype(self.to)? else {
            return match (scale, zero_point) {
                (None, None) => Ok(None),
                _ => malformed(format!("its attribute {:?} is missing", self.to)),
            };
        };
        Ok(Some(Rounding {
            to,
            scale: scale.unwrap_or(1.0),
            zero_point: zero_point.unwrap_or(0),
        }))
    }
    fn visit(&self, field: &Option<Rounding>, each: &mut impl FnMut(&'static str, Option<Attribute>, bool)) {
        let none = field.is_none();
        each(self.to, self.value(field), none);
        each(self.scale, field.map(|rounding| Attribute::Float(rounding.scale)), none);
        each(
            self.zero_point,
            field.map(|rounding| Attribute::Int(rounding.zero_point)),
            none,
        );
    }
}

fn read_count<S: AttributeSource>(source: &S, name: &str) -> Result<Option<usize>, S::Error> {
    match source.int(name)?.unwrap_or(0) {
        0 => Ok(None),
        n => match usize::try_from(n).ok().filter(|n| *n <= i32::MAX as usize) {
            Some(n) => Ok(Some(n)),
            None => malformed(format!("its attribute {name:?} is {n}")),
        },
    }
}
