//! Floats of 8 bits and less, and tables of numbers: every code as an f32, and the nearest code of a number.
//!
//! Rounding is to nearest, ties to the even code. Numbers beyond the largest finite one, and infinity, become that one,
//! as ONNX's `Cast` and `QuantizeLinear` saturate by default (<https://onnx.ai/onnx/technical/float8.html>).

use super::dtype::{DType, FloatFormat, Numbers, Specials};

fn format(dtype: DType) -> FloatFormat {
    match dtype.numbers() {
        Numbers::Float(format) => format,
        _ => panic!("bug: {dtype} is not a float type"),
    }
}

/// The number that a code of a narrow float stands for. Bits above the type's are ignored.
pub(crate) fn decode(dtype: DType, code: u8) -> f32 {
    if let Numbers::Table(numbers) = dtype.numbers() {
        return numbers[usize::from(code & 15)];
    }
    let format = format(dtype);
    if dtype == DType::F8E8M0 {
        return match code {
            0xff => f32::NAN,
            _ => 2f32.powi(i32::from(code) - format.bias()),
        };
    }
    let code = u32::from(code);
    let mantissa = code & ((1 << format.mantissa) - 1);
    let exponent = (code >> format.mantissa) & ((1 << format.exponent) - 1);
    let negative = code >> (format.mantissa + format.exponent) & 1 == 1;
    let highest = exponent + 1 == 1 << format.exponent;
    let magnitude = match (highest, format.specials) {
        (true, Specials::Ieee) if mantissa == 0 => f32::INFINITY,
        (true, Specials::Ieee) => f32::NAN,
        (true, Specials::NanOnly) if mantissa + 1 == 1 << format.mantissa => f32::NAN,
        _ => {
            // Numbers with exponent field 0 have no implied one, and the exponent of field 1.
            let significand = if exponent == 0 {
                mantissa
            } else {
                mantissa | 1 << format.mantissa
            };
            let unit = exponent.max(1) as i32 - format.bias() - format.mantissa as i32;
            significand as f32 * 2f32.powi(unit)
        }
    };
    if negative { -magnitude } else { magnitude }
}

/// The code nearest to a number: see the module's head. NaN becomes NaN where the type has it, else the largest number,
/// as ONNX defines for `float4e2m1`. For `F8E8M0`, which has neither sign nor zero, negative numbers become NaN, zero
/// the smallest power.
pub(crate) fn encode(dtype: DType, value: f64) -> u8 {
    if let Numbers::Table(numbers) = dtype.numbers() {
        return nearest(numbers, value);
    }
    let format = format(dtype);
    if dtype == DType::F8E8M0 {
        return encode_power(value);
    }
    let sign = u32::from(value.is_sign_negative()) << (format.mantissa + format.exponent);
    let all_ones = (1u32 << (format.mantissa + format.exponent)) - 1;
    let magnitude = if value.is_nan() {
        all_ones
    } else {
        // Dividing by a power of two is exact, and the quotient, at most some bits longer than a mantissa, rounds once.
        let value = value.abs().min(format.max());
        let exponent = exponent_of(value).max(1 - format.bias());
        let unit = exponent - format.mantissa as i32;
        let significand = (value * 2f64.powi(-unit)).round_ties_even() as u32;
        // A significand that rounds up to the next power carries into the exponent field.
        (((exponent + format.bias()) as u32 - 1) << format.mantissa) + significand
    };
    (sign | magnitude) as u8
}

/// The code of the number nearest to a value, the lower code at a tie; code 0 for NaN.
fn nearest(numbers: &[f32; 16], value: f64) -> u8 {
    let distance = |code: &u8| (f64::from(numbers[usize::from(*code)]) - value).abs();
    let codes = (0..16u8).min_by(|a, b| distance(a).total_cmp(&distance(b)));
    codes.expect("there are codes")
}

fn encode_power(value: f64) -> u8 {
    let bias = format(DType::F8E8M0).bias();
    if value.is_nan() || value < 0.0 {
        return 0xff;
    }
    let value = value.clamp(2f64.powi(-bias), 2f64.powi(bias));
    let below = exponent_of(value);
    let quotient = value * 2f64.powi(-below);
    // The midpoint is 1.5; the even code is the one with an even exponent field.
    let up = quotient > 1.5 || quotient == 1.5 && (below + bias) % 2 == 1;
    (below + bias + i32::from(up)).min(0xfe) as u8
}

/// `floor(log2(value))` of a finite number; far below every type's range for zero and f64's subnormal numbers.
fn exponent_of(value: f64) -> i32 {
    ((value.to_bits() >> 52) & 0x7ff) as i32 - 1023
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [DType; 4] = [DType::F8E4M3Fn, DType::F8E5M2, DType::F4E2M1, DType::F8E8M0];

    fn codes(dtype: DType) -> impl Iterator<Item = u8> {
        0..=((1u16 << dtype.bits()) - 1) as u8
    }

    /// The formulas of ONNX's specification: sign, exponent and mantissa of one code.
    #[test]
    fn all_codes_are_what_the_specification_says() {
        for code in codes(DType::F8E4M3Fn) {
            let (s, e, m) = (f32::from(code >> 7), i32::from(code >> 3 & 15), f32::from(code & 7));
            let sign = 1.0 - 2.0 * s;
            let expected = match (e, code & 7) {
                (15, 7) => f32::NAN,
                (0, _) => sign * m / 8.0 * 2f32.powi(-6),
                _ => sign * (1.0 + m / 8.0) * 2f32.powi(e - 7),
            };
            same(DType::F8E4M3Fn, code, expected);
        }
        for code in codes(DType::F8E5M2) {
            // The upper byte of a half.
            same(DType::F8E5M2, code, half::f16::from_bits(u16::from(code) << 8).to_f32());
        }
        let fours = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        for code in codes(DType::F4E2M1) {
            let sign = if code < 8 { 1.0 } else { -1.0 };
            same(DType::F4E2M1, code, sign * fours[usize::from(code & 7)]);
        }
        for code in codes(DType::F8E8M0) {
            // The exponent field of an f32, whose 0 is a subnormal number here.
            let bits = if code == 0 { 1 << 22 } else { u32::from(code) << 23 };
            same(
                DType::F8E8M0,
                code,
                if code == 255 { f32::NAN } else { f32::from_bits(bits) },
            );
        }
        assert_eq!(decode(DType::F8E4M3Fn, 0x7e), 448.0);
        assert_eq!(decode(DType::F8E4M3Fn, 0x01), 2f32.powi(-9));
        assert_eq!(decode(DType::F8E5M2, 0x7b), 57344.0);
        assert_eq!(decode(DType::F8E5M2, 0xfc), f32::NEG_INFINITY);
    }

    fn same(dtype: DType, code: u8, expected: f32) {
        let found = decode(dtype, code);
        let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
        assert!(same, "{dtype} {code:#x}: {found} and not {expected}");
    }

    #[test]
    fn every_code_comes_back() {
        for dtype in ALL {
            for code in codes(dtype) {
                let value = decode(dtype, code);
                let back = encode(dtype, f64::from(value));
                match value {
                    v if v.is_nan() => assert!(decode(dtype, back).is_nan(), "{dtype} {code:#x}"),
                    v if v.is_infinite() => assert_eq!(f64::from(decode(dtype, back)), dtype.max().copysign(v.into())),
                    _ => assert_eq!(back, code, "{dtype} {code:#x} = {value}"),
                }
            }
        }
    }

    /// Between two neighbors: the lower one below the middle, the upper one above it, the even code at the middle.
    #[test]
    fn rounding_is_to_nearest_even() {
        for dtype in ALL {
            let mut finite: Vec<(f64, u8)> = codes(dtype)
                .map(|code| (f64::from(decode(dtype, code)), code))
                .filter(|(value, _)| value.is_finite() && value.is_sign_positive())
                .collect();
            finite.sort_by(|a, b| a.0.total_cmp(&b.0));
            for pair in finite.windows(2) {
                let [(low, low_code), (high, high_code)] = [pair[0], pair[1]];
                let middle = (low + high) / 2.0;
                let even = if low_code % 2 == 0 { low_code } else { high_code };
                let cases = [
                    (middle.next_down(), low_code),
                    (middle, even),
                    (middle.next_up(), high_code),
                ];
                for (value, expected) in cases {
                    assert_eq!(
                        encode(dtype, value),
                        expected,
                        "{dtype}: {value} between {low} and {high}"
                    );
                    if dtype != DType::F8E8M0 {
                        let sign = 1 << (dtype.bits() - 1);
                        assert_eq!(encode(dtype, -value), expected | sign, "{dtype}: {}", -value);
                    }
                }
            }
        }
    }

    #[test]
    fn beyond_the_range() {
        for dtype in [DType::F8E4M3Fn, DType::F8E5M2, DType::F4E2M1] {
            for value in [dtype.max() * 1.01, 1e30, f64::INFINITY] {
                assert_eq!(
                    f64::from(decode(dtype, encode(dtype, value))),
                    dtype.max(),
                    "{dtype} {value}"
                );
                assert_eq!(
                    f64::from(decode(dtype, encode(dtype, -value))),
                    -dtype.max(),
                    "{dtype} {value}"
                );
            }
            assert_eq!(encode(dtype, 1e-300), 0);
            assert_eq!(encode(dtype, -0.0), 1 << (dtype.bits() - 1), "a zero keeps its sign");
        }
        assert!(decode(DType::F8E4M3Fn, encode(DType::F8E4M3Fn, f64::NAN)).is_nan());
        assert!(decode(DType::F8E5M2, encode(DType::F8E5M2, f64::NAN)).is_nan());
        assert_eq!(decode(DType::F4E2M1, encode(DType::F4E2M1, f64::NAN)), 6.0);
        let scale = |value| encode(DType::F8E8M0, value);
        assert_eq!([0.0, 1.0, 1e300, -1.0, f64::NAN].map(scale), [0, 127, 254, 255, 255]);
    }
}
