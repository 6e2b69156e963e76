//! The form of a stored weight: floats, or codes of some type with scales per channel or block.
//!
//! A package keeps the form of each of its weights, since engines and kernels are built for it. Weights from other
//! sources must have the same form ([`conformed`]): the same bits, the same runs of codes that share a scale, zero
//! points if the package has them. Exporters write equivalent forms in several ways, and these differences are
//! converted without changing a value: signed codes, or unsigned ones around the middle of their range; a zero point
//! for every run, or none where all are the middle; one run per row, or one scale per channel.

use std::fmt;

use crate::graph::{Constant, Quantized};
use crate::tensor::quantized::{Granularity, QuantizedError};
use crate::tensor::{DType, Tensor};

/// The form of a quantized weight, without the type of its scales.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Form {
    /// Element type of the codes.
    pub codes: DType,
    /// Which codes share a scale.
    pub granularity: Granularity,
    /// Scales of the scales, if these are quantized themselves.
    pub scales: Option<Box<Form>>,
    /// Whether there are zero points.
    pub zero_points: bool,
}

impl Form {
    /// The form of a quantized constant; `None` if it is not quantized.
    pub fn of(constant: &Constant) -> Option<Form> {
        let parts = constant.as_quantized()?;
        Some(Form {
            codes: parts.codes.dtype(),
            granularity: parts.granularity,
            scales: Form::of(parts.scales).map(Box::new),
            zero_points: parts.zero_points.is_some(),
        })
    }
}

impl fmt::Display for Form {
    /// `u4 in blocks of 32 on axis 1 with zero points`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.codes, self.granularity)?;
        if let Some(scales) = &self.scales {
            write!(f, " with scales of {scales}")?;
        }
        match self.zero_points {
            true => write!(f, " with zero points"),
            false => Ok(()),
        }
    }
}

/// How a constant is stored, for messages.
pub(super) fn described(constant: &Constant) -> String {
    match constant.as_quantized() {
        Some(parts) => format!("{} of {parts}", constant.dtype()),
        None => constant.dtype().to_string(),
    }
}

/// A weight in the package's form, with unchanged values. An error names both forms.
pub fn conformed(constant: &Constant, form: Option<&Form>) -> Result<Constant, String> {
    let found = Form::of(constant);
    if found.as_ref() == form {
        return Ok(constant.clone());
    }
    let refused = |why: &str| {
        let wanted = form.map_or_else(|| "not quantized".to_string(), Form::to_string);
        let why = if why.is_empty() {
            String::new()
        } else {
            format!(": {why}")
        };
        Err(format!(
            "it is {}, and the package's is {wanted}{why}",
            described(constant)
        ))
    };
    let (Some(form), Some(parts)) = (form, constant.as_quantized()) else {
        return refused("");
    };
    let regrouped = match regrouped(parts, form.granularity) {
        Some(regrouped) => regrouped,
        None => return refused(""),
    };
    let regrouped = match &regrouped {
        Some(regrouped) => regrouped.as_quantized().expect("made of parts"),
        None => parts,
    };
    match recentered(regrouped, form) {
        Ok(Some(made)) if Form::of(&made).as_ref() == Some(form) => Ok(made),
        Ok(_) => refused(""),
        Err(why) => refused(&why),
    }
}

/// Converts between a scale per channel and one block per row. `Some(None)`: nothing to do; `None`: the runs differ.
fn regrouped(parts: Quantized<'_>, granularity: Granularity) -> Option<Option<Constant>> {
    let shape = parts.codes.shape();
    // Without a zero extent: a block has at least one code.
    let scale_shape = match (parts.granularity, granularity, shape) {
        (from, to, _) if from == to => return Some(None),
        (Granularity::Channel { axis: 0 }, Granularity::Block { axis: 1, size }, [rows, columns])
            if size == *columns =>
        {
            vec![*rows, 1]
        }
        (Granularity::Block { axis: 1, size }, Granularity::Channel { axis: 0 }, [rows, columns])
            if size == *columns =>
        {
            vec![*rows]
        }
        _ => return None,
    };
    let part = |part: &Constant| part.reshaped(scale_shape.clone());
    let made = Constant::quantized(
        parts.codes.clone(),
        part(parts.scales),
        parts.zero_points.map(part),
        granularity,
    );
    Some(Some(made.ok()?))
}

/// With codes of the form's signedness and with zero points if it has them. `None`: the codes are of another kind.
fn recentered(parts: Quantized<'_>, form: &Form) -> Result<Option<Constant>, String> {
    let to = form.codes;
    let moved = match parts.codes.dtype() {
        from if from == to => false,
        from if is_reverse(from, to) => true,
        _ => return Ok(None),
    };
    let turned = |codes: &Constant| if moved { codes.half_range_moved() } else { codes.clone() };
    let codes = turned(parts.codes);
    // A missing zero point in the new type corresponds to 0 in the old one.
    let idle = match moved {
        true => half_range(to),
        false => 0,
    };
    let zero_points = parts.zero_points.map(turned);
    let zero_points = match (zero_points, form.zero_points) {
        (Some(zero_points), true) => Some(zero_points),
        (Some(zero_points), false) => {
            let values = zero_points.materialize().map_err(|e| e.to_string())?.to_i64();
            if let Some(at) = values.iter().position(|value| *value != 0) {
                return Err(format!(
                    "its zero points are not all the middle of their range (at {at}: {} from it)",
                    values[at]
                ));
            }
            None
        }
        (None, true) if to.is_float_format() => return Ok(None),
        (None, true) => {
            let shape = parts.scales.shape().to_vec();
            let values = vec![idle; shape.iter().product()];
            Some(Constant::tensor(Tensor::from_i64_as(to, shape, &values)))
        }
        (None, false) if idle == 0 => None,
        (None, false) => return Err(format!("its codes mean 0 at {idle} of that type")),
    };
    let made = Constant::quantized(codes, parts.scales.clone(), zero_points, parts.granularity);
    made.map(Some).map_err(|e: QuantizedError| e.to_string())
}

/// Integer codes of the same width, one signed and one not.
fn is_reverse(a: DType, b: DType) -> bool {
    const PAIRS: [(DType, DType); 3] = [(DType::U8, DType::I8), (DType::U4, DType::I4), (DType::U2, DType::I2)];
    PAIRS.contains(&(a, b)) || PAIRS.contains(&(b, a))
}

/// The 0 of codes of the other signedness.
fn half_range(dtype: DType) -> i64 {
    let (low, high) = dtype.int_range();
    match low {
        0 => (high + 1) / 2,
        low => low,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weight(dtype: DType, codes: &[i64], zero_points: Option<&[i64]>, granularity: Granularity) -> Constant {
        let shape = vec![2, 4];
        let of = granularity.scale_shape(&shape).unwrap();
        let count: usize = of.iter().product();
        let scales: Vec<f32> = (0..count).map(|i| 0.5 + i as f32).collect();
        let zero_points = zero_points.map(|z| Tensor::from_i64_as(dtype, of.clone(), z).into());
        let codes = Tensor::from_i64_as(dtype, shape, codes);
        Constant::quantized(
            codes.into(),
            Tensor::from_f32(of, &scales).into(),
            zero_points,
            granularity,
        )
        .unwrap()
    }

    fn form(codes: DType, granularity: Granularity, zero_points: bool) -> Form {
        Form {
            codes,
            granularity,
            scales: None,
            zero_points,
        }
    }

    const SIGNED: [i64; 8] = [-8, -1, 0, 7, 3, 2, -4, 5];
    const ROW: Granularity = Granularity::Block { axis: 1, size: 4 };
    const CHANNEL: Granularity = Granularity::Channel { axis: 0 };
    const HALVES: Granularity = Granularity::Block { axis: 1, size: 2 };

    #[test]
    fn one_meaning_in_several_forms() {
        let unsigned = SIGNED.map(|v| v + 8);
        let same = [
            weight(DType::I4, &SIGNED, None, ROW),
            weight(DType::U4, &unsigned, Some(&[8, 8]), ROW),
            weight(DType::I4, &SIGNED, Some(&[0, 0]), ROW),
            weight(DType::I4, &SIGNED, None, CHANNEL),
            weight(DType::U4, &unsigned, Some(&[8, 8]), CHANNEL),
        ];
        let values = |c: &Constant| c.materialize().unwrap().to_f32();
        for from in &same {
            for to in &same {
                let form = Form::of(to);
                let made = conformed(from, form.as_ref()).unwrap();
                assert_eq!(Form::of(&made), form);
                assert_eq!(values(&made), values(from), "{from:?} as {to:?}");
                let bytes = |c: &Constant| -> Vec<Vec<u8>> {
                    let parts = c.stored_parts("").into_iter();
                    parts
                        .map(|(_, part)| part.materialize().unwrap().data().to_vec())
                        .collect()
                };
                assert_eq!(bytes(&made), bytes(to), "{from:?} as {to:?}");
            }
        }
        // Individual zero points can be signed or unsigned, but cannot be dropped.
        let skewed = weight(DType::U4, &unsigned, Some(&[8, 3]), ROW);
        let made = conformed(&skewed, Some(&form(DType::I4, ROW, true))).unwrap();
        assert_eq!(values(&made), values(&skewed));
        assert_eq!(
            conformed(&skewed, Some(&form(DType::I4, ROW, false))).unwrap_err(),
            "it is f32 of u4 in blocks of 4 on axis 1 with zero points, and the package's is i4 in blocks of 4 on axis 1: its \
             zero points are not all the middle of their range (at 1: -5 from it)"
        );
        // For unsigned codes without zero points, code 0 means 0.
        let bare = weight(DType::U4, &unsigned, None, ROW);
        assert!(conformed(&bare, Some(&form(DType::I4, ROW, false))).is_err());
        let made = conformed(&bare, Some(&form(DType::I4, ROW, true))).unwrap();
        assert_eq!(values(&made), values(&bare));
    }

    #[test]
    fn other_forms_are_named() {
        let halves = weight(DType::I4, &SIGNED, None, HALVES);
        let refused = |form: Option<Form>| conformed(&halves, form.as_ref()).unwrap_err();
        assert_eq!(
            refused(None),
            "it is f32 of i4 in blocks of 2 on axis 1, and the package's is not quantized"
        );
        assert_eq!(
            refused(Some(form(DType::I4, ROW, false))),
            "it is f32 of i4 in blocks of 2 on axis 1, and the package's is i4 in blocks of 4 on axis 1"
        );
        assert!(
            refused(Some(form(DType::I8, HALVES, false))).ends_with("the package's is i8 in blocks of 2 on axis 1")
        );
        let plain = Constant::tensor(Tensor::from_f32(vec![2, 4], &[0.0; 8]));
        assert_eq!(
            conformed(&plain, Some(&form(DType::I4, HALVES, false))).unwrap_err(),
            "it is f32, and the package's is i4 in blocks of 2 on axis 1"
        );
        assert!(conformed(&plain, None).is_ok());
    }
}
