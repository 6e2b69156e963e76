//! Unpacks and packs elements of less than a byte, in the order that [`super::dtype`] defines.

/// One code per byte, in the low bits.
pub(crate) fn unpack(bytes: &[u8], bits: usize, len: usize) -> Vec<u8> {
    let mut codes = Vec::with_capacity(len.next_multiple_of(8 / bits));
    let mask = ((1u16 << bits) - 1) as u8;
    for byte in bytes {
        codes.extend((0..8 / bits).map(|i| byte >> (i * bits) & mask));
    }
    codes.truncate(len);
    codes
}

/// Packs codes from the low bits of their bytes; higher bits are dropped.
pub(crate) fn pack(codes: &[u8], bits: usize) -> Vec<u8> {
    let mask = ((1u16 << bits) - 1) as u8;
    let byte = |codes: &[u8]| {
        let placed = codes.iter().enumerate().map(|(i, code)| (code & mask) << (i * bits));
        placed.fold(0, |byte, code| byte | code)
    };
    codes.chunks(8 / bits).map(byte).collect()
}

/// The integer of a code in two's complement of this many bits.
pub(crate) fn sign_extend(code: u8, bits: usize) -> i64 {
    i64::from((code << (8 - bits)) as i8 >> (8 - bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_element_is_in_the_low_bits_and_the_last_byte_is_padded() {
        assert_eq!(pack(&[1, 2, 15], 4), [0x21, 0x0f]);
        assert_eq!(unpack(&[0x21, 0xff], 4, 3), [1, 2, 15]);
        assert_eq!(pack(&[1, 2, 3, 0, 2], 2), [0b00_11_10_01, 0b10]);
        assert_eq!(unpack(&[0b00_11_10_01, 0b10], 2, 5), [1, 2, 3, 0, 2]);
        assert!(unpack(&[], 4, 0).is_empty());
    }

    #[test]
    fn two_s_complement() {
        let fours: Vec<i64> = (0..16).map(|code| sign_extend(code, 4)).collect();
        assert_eq!(fours, [0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1]);
        assert_eq!([0, 1, 2, 3].map(|code| sign_extend(code, 2)), [0, 1, -2, -1]);
    }
}
