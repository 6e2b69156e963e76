//! Reshapes and transposes, merged where one Shuffle layer of TensorRT can do both.

use super::context::{Lowered, Lowering};
use crate::network::{LayerKind, Shape, TensorId};

impl Lowering<'_> {
    /// Reshapes, merged with the shuffle that computed `x` if there is one.
    pub fn reshape(&mut self, name: &str, x: TensorId, to: Shape) -> Lowered {
        self.shuffle(name, x, None, Some(to), None)
    }

    pub fn transpose(&mut self, name: &str, x: TensorId, order: &[usize]) -> Lowered {
        // Moving only dims of 1 moves no element: a reshape, which merges with others and costs nothing.
        let shape = self.b.shape(x);
        let valid = order.len() == shape.len() && order.iter().all(|a| *a < shape.len());
        if valid && order.iter().filter(|a| !shape[**a].is_one()).is_sorted() {
            let to = order.iter().map(|a| shape[*a].clone()).collect();
            return self.reshape(name, x, to);
        }
        self.shuffle(name, x, Some(order.to_vec()), None, None)
    }

    /// One Shuffle for this one and the previous one, if TensorRT's transpose-reshape-transpose can express both.
    fn shuffle(
        &mut self,
        name: &str,
        x: TensorId,
        first: Option<Vec<usize>>,
        reshape: Option<Shape>,
        second: Option<Vec<usize>>,
    ) -> Lowered {
        let before = self
            .b
            .producer(x)
            .map(|layer| (layer.kind.clone(), layer.inputs.clone()));
        let (kind, source) = match before {
            Some((
                LayerKind::Shuffle {
                    first: earlier,
                    reshape: shape,
                    second: None,
                },
                inputs,
            )) if first.is_none() || (shape.is_some() && reshape.is_none()) => {
                let (reshape, second) = match first {
                    None => (reshape.or(shape), second),
                    Some(order) => (shape, Some(order)),
                };
                let kind = LayerKind::Shuffle {
                    first: earlier,
                    reshape,
                    second,
                };
                (kind, inputs[0])
            }
            _ => (LayerKind::Shuffle { first, reshape, second }, x),
        };
        if let LayerKind::Shuffle {
            first: None,
            reshape: Some(to),
            second: None,
        } = &kind
            && to == self.b.shape(source)
        {
            return Ok(source);
        }
        Ok(self.b.add(name, kind, &[source])?)
    }
}
