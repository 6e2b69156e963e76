//! Codes packed into 32-bit words.

use bytes::Bytes;

use crate::graph::Constant;
use crate::tensor::{DType, Tensor, packed};

/// The position of each code of a run in its word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// The first in the lowest bits.
    Rising,
    /// AWQ's: of eight 4-bit codes, the even ones in the lower half, the odd ones in the upper.
    Interleaved,
}

/// The unsigned type of this many bits.
pub fn code_type(bits: i64) -> Option<DType> {
    match bits {
        2 => Some(DType::U2),
        4 => Some(DType::U4),
        8 => Some(DType::U8),
        _ => None,
    }
}

/// The codes of words `[rows, columns]`, i32, of which each holds 32/b along `axis` (0 or 1): `shape` gives their
/// number; the rest of the last word is padding. An error describes the mismatch.
pub fn unpacked(
    words: &Constant,
    dtype: DType,
    axis: usize,
    order: Order,
    shape: [usize; 2],
) -> Result<Constant, String> {
    let each = 32 / dtype.bits();
    let mut expected = shape;
    expected[axis] = shape[axis].div_ceil(each);
    if words.dtype() != DType::I32 || words.shape() != expected {
        return Err(format!(
            "is {}{:?}, and {dtype}{shape:?} packed along axis {axis} is i32{expected:?}",
            words.dtype(),
            words.shape()
        ));
    }
    let read = move |inputs: &[Tensor]| read(&inputs[0], dtype, axis, order, shape);
    Ok(Constant::decoded(
        "words",
        vec![words.clone()],
        dtype,
        shape.to_vec(),
        read,
    ))
}

fn read(words: &Tensor, dtype: DType, axis: usize, order: Order, [rows, columns]: [usize; 2]) -> Bytes {
    let (bits, each) = (dtype.bits(), 32 / dtype.bits());
    let width = words.shape()[1];
    let words: Vec<u32> = words
        .data()
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| u32::from_le_bytes(*b))
        .collect();
    let shift = |place: usize| match order {
        Order::Rising => place * bits,
        Order::Interleaved => (place / 2 + place % 2 * (each / 2)) * bits,
    };
    let mask = ((1u64 << bits) - 1) as u32;
    let mut codes = Vec::with_capacity(rows * columns);
    for row in 0..rows {
        match axis {
            0 => {
                let shift = shift(row % each);
                let words = &words[row / each * width..][..columns];
                codes.extend(words.iter().map(|word| (word >> shift & mask) as u8));
            }
            _ => {
                let words = &words[row * width..][..width];
                codes.extend((0..columns).map(|column| (words[column / each] >> shift(column % each) & mask) as u8));
            }
        }
    }
    Bytes::from(match bits {
        8 => codes,
        _ => packed::pack(&codes, bits),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(shape: [usize; 2], words: &[u32]) -> Constant {
        let values: Vec<i32> = words.iter().map(|w| *w as i32).collect();
        Constant::tensor(Tensor::from_i32(shape.to_vec(), &values))
    }

    fn codes(words: &Constant, dtype: DType, axis: usize, order: Order, shape: [usize; 2]) -> Vec<i64> {
        let unpacked = unpacked(words, dtype, axis, order, shape).unwrap();
        unpacked.materialize().unwrap().to_i64()
    }

    #[test]
    fn codes_by_hand() {
        let one = words([1, 1], &[0x7654_3210]);
        assert_eq!(
            codes(&one, DType::U4, 1, Order::Rising, [1, 8]),
            [0, 1, 2, 3, 4, 5, 6, 7]
        );
        assert_eq!(
            codes(&one, DType::U4, 0, Order::Rising, [8, 1]),
            [0, 1, 2, 3, 4, 5, 6, 7]
        );
        assert_eq!(codes(&one, DType::U4, 1, Order::Rising, [1, 5]), [0, 1, 2, 3, 4]);
        // Column k is at nibble [0, 4, 1, 5, 2, 6, 3, 7][k].
        assert_eq!(
            codes(&one, DType::U4, 1, Order::Interleaved, [1, 8]),
            [0, 4, 1, 5, 2, 6, 3, 7]
        );
        let two = words([1, 2], &[0xff00_7f80, 0x0403_0201]);
        assert_eq!(
            codes(&two, DType::U8, 1, Order::Rising, [1, 8]),
            [128, 127, 0, 255, 1, 2, 3, 4]
        );
        assert_eq!(
            codes(&two, DType::U8, 0, Order::Rising, [4, 2]),
            [128, 1, 127, 2, 0, 3, 255, 4]
        );
        let pairs = words([1, 1], &[0b11_10_01_00]);
        assert_eq!(codes(&pairs, DType::U2, 1, Order::Rising, [1, 5]), [0, 1, 2, 3, 0]);
        assert_eq!(
            unpacked(&one, DType::U4, 1, Order::Rising, [1, 9]).unwrap_err(),
            "is i32[1, 1], and u4[1, 9] packed along axis 1 is i32[1, 2]"
        );
    }
}
