//! Layers that dequantize: codes as values, zero points and scales, rows of tables.

use super::super::context::{Lowered, Lowering, one};
use super::QuantizedWeight;
use super::parts::{Coding, Parts, Zero};
use crate::dim::Dim;
use crate::network::{Elementwise, LayerKind, Shape, TensorId, UnaryOp};
use crate::tensor::DType;
use crate::tensor::quantized::Granularity;

/// The shapes when codes that share a scale get their own axis: the values' shape with that axis, and the scales'.
fn blocks(shape: &[Dim], granularity: Granularity) -> (Shape, Shape) {
    let mut scales = vec![one(); shape.len()];
    match granularity {
        Granularity::Tensor => (shape.to_vec(), scales),
        Granularity::Channel { axis } => {
            scales[axis] = shape[axis].clone();
            (shape.to_vec(), scales)
        }
        Granularity::Block { axis, size } => {
            let count = shape[axis].as_const().map_or(0, |n| n as usize / size);
            let split = |last: usize| -> Shape {
                let ends = [Dim::from(count), Dim::from(last)];
                [&shape[..axis], &ends, &shape[axis + 1..]].concat()
            };
            (split(size), split(1))
        }
    }
}

impl Lowering<'_> {
    /// The values of a weight.
    pub(super) fn values_of_codes(&mut self, name: &str, weight: &QuantizedWeight) -> Lowered {
        let Parts {
            codes,
            coding,
            scales,
            zero,
            ..
        } = weight.parts;
        let shape: Shape = weight.shape.iter().map(|n| Dim::from(*n)).collect();
        let layout = blocks(&shape, weight.parts.granularity);
        if coding == Coding::Scaled {
            let part = |part: &str| format!("{name}/{part}");
            let kind = LayerKind::Dequantize(weight.parts.granularity);
            let values = self.b.add(&part("values"), kind, &[codes, scales])?;
            let Zero::Scaled(offsets) = zero else {
                return match weight.before_products {
                    true => Ok(values),
                    false => self.kept_apart(name, values),
                };
            };
            let values = self.reshape(&part("blocks"), values, layout.0)?;
            let offsets = self.reshape(&part("offsets"), offsets, layout.1)?;
            let centered = self
                .b
                .elementwise(&part("centered"), Elementwise::Sub, values, offsets)?;
            return self.reshape(&part("weight"), centered, shape);
        }
        let dtype = self.b.dtype(scales);
        let numbers = self.codes_as_numbers(name, codes, coding, dtype)?;
        self.scaled_codes(name, numbers, (scales, zero), layout, shape)
    }

    /// `(number - zero) * scale` for numbers of any shape with the volume of `view`, as `to`.
    fn scaled_codes(
        &mut self,
        name: &str,
        numbers: TensorId,
        (scales, zero): (TensorId, Zero<TensorId>),
        (view, of_scales): (Shape, Shape),
        to: Shape,
    ) -> Lowered {
        let part = |part: &str| format!("{name}/{part}");
        let (dtype, rank) = (self.b.dtype(scales), view.len());
        let numbers = self.reshape(&part("blocks"), numbers, view)?;
        let scales = self.reshape(&part("scale"), scales, of_scales.clone())?;
        let centered = match zero {
            Zero::Number(0) => numbers,
            Zero::Number(number) => {
                let number = self.number(dtype, rank, number as f64)?;
                self.b
                    .elementwise(&part("centered"), Elementwise::Sub, numbers, number)?
            }
            Zero::Points(points) | Zero::Scaled(points) => {
                let points = self.b.cast(&part("zero"), dtype, points)?;
                let points = self.reshape(&part("zeros"), points, of_scales)?;
                self.b
                    .elementwise(&part("centered"), Elementwise::Sub, numbers, points)?
            }
        };
        let values = self
            .b
            .elementwise(&part("values"), Elementwise::Prod, centered, scales)?;
        self.reshape(&part("weight"), values, to)
    }

    /// Codes in floating point, in the shape of the values; packed ones are relative to their minimum.
    pub(super) fn codes_as_numbers(&mut self, name: &str, codes: TensorId, coding: Coding, dtype: DType) -> Lowered {
        let part = |part: &str| format!("{name}/{part}");
        match coding {
            Coding::Integers => Ok(self.b.cast(&part("numbers"), dtype, codes)?),
            Coding::Floats => {
                let unit = self.number(dtype, 0, 1.0)?;
                let kind = LayerKind::Dequantize(Granularity::Tensor);
                Ok(self.b.add(&part("numbers"), kind, &[codes, unit])?)
            }
            Coding::Bytes(each) => {
                let digits = self.digits(name, codes, each, dtype)?;
                let mut to = self.b.shape(codes).clone();
                let last = to.len();
                to.push(one());
                let mut columns = Vec::with_capacity(each);
                for digit in digits {
                    columns.push(self.reshape(&part("column"), digit, to.clone())?);
                }
                let kind = LayerKind::Concatenation { axis: last };
                let joined = self.b.add(&part("numbers"), kind, &columns)?;
                to.pop();
                to[last - 1] = &to[last - 1] * &Dim::from(each);
                self.reshape(&part("numbers/flat"), joined, to)
            }
            Coding::Scaled => unreachable!("a Dequantize layer reads these codes"),
        }
    }

    /// The codes of bytes, starting with the lowest bits; see the head of the module.
    pub(super) fn digits(&mut self, name: &str, bytes: TensorId, each: usize, dtype: DType) -> Lowered<Vec<TensorId>> {
        let part = |part: &str| format!("{name}/{part}");
        let rank = self.b.rank(bytes);
        let base = f64::from(1u32 << (8 / each));
        let mut number = |value: f64| self.number(dtype, rank, value);
        let (over, times, half) = (number(base.recip())?, number(base)?, number(0.5)?);
        let mut rest = self.b.cast(&part("bytes"), dtype, bytes)?;
        let mut digits = Vec::with_capacity(each);
        for _ in 1..each {
            let quotient = self.b.elementwise(&part("quotient"), Elementwise::Prod, rest, over)?;
            let nearest = self.b.elementwise(&part("nearest"), Elementwise::Sum, quotient, half)?;
            let nearest = self.b.unary(&part("whole"), UnaryOp::Floor, nearest)?;
            let multiple = self
                .b
                .elementwise(&part("multiple"), Elementwise::Prod, nearest, times)?;
            digits.push(self.b.elementwise(&part("digit"), Elementwise::Sub, rest, multiple)?);
            rest = self.b.unary(&part("rest"), UnaryOp::Floor, quotient)?;
        }
        digits.push(rest);
        Ok(digits)
    }

    /// Rows of a quantized table, as values; `None` if `table` is not quantized, or rows share scales or bytes.
    pub(in crate::lower) fn quantized_rows(
        &mut self,
        name: &str,
        table: TensorId,
        indices: TensorId,
    ) -> Lowered<Option<TensorId>> {
        let weight = match self.quantized.get(&table) {
            // No layer gathers float codes.
            Some(weight) if !matches!(weight.parts.coding, Coding::Scaled | Coding::Floats) => weight.clone(),
            _ => return Ok(None),
        };
        if matches!(weight.parts.granularity, Granularity::Block { axis: 0, .. }) {
            return Ok(None);
        }
        // Scales on axes other than the rows' are the same for all rows.
        let by_row = !matches!(
            weight.parts.granularity,
            Granularity::Tensor | Granularity::Channel { axis: 1.. }
        );
        let parts = weight.parts.map(|part, tensor| match part == "codes" || by_row {
            true => self.b.add(
                &format!("{name}/{part}"),
                LayerKind::Gather { axis: 0 },
                &[tensor, indices],
            ),
            false => Ok(tensor),
        })?;
        let leading = self.b.shape(indices).clone();
        let row: Shape = weight.shape[1..].iter().map(|n| Dim::from(*n)).collect();
        let more = leading.len();
        let to = [&leading[..], &row].concat();
        let layout = match weight.parts.granularity {
            Granularity::Channel { axis: 0 } => (to.clone(), [&leading[..], &vec![one(); row.len()]].concat()),
            Granularity::Channel { axis } => blocks(&to, Granularity::Channel { axis: axis + more - 1 }),
            Granularity::Block { axis, size } => {
                let axis = axis + more - 1;
                blocks(&to, Granularity::Block { axis, size })
            }
            Granularity::Tensor => blocks(&to, Granularity::Tensor),
        };
        let dtype = self.b.dtype(parts.scales);
        let numbers = self.codes_as_numbers(name, parts.codes, parts.coding, dtype)?;
        Ok(Some(self.scaled_codes(
            name,
            numbers,
            (parts.scales, parts.zero),
            layout,
            to,
        )?))
    }
}
