//! The argument of a kernel, one struct by value, as bytes.

/// A struct under construction. Fields are written at their offsets, little-endian as on the device.
#[derive(Clone, Debug)]
pub(super) struct Arguments {
    /// In words, so that the struct is aligned to 8 bytes.
    words: Vec<u64>,
    operands: Vec<Operand>,
}

/// A field for an address.
#[derive(Clone, Debug)]
pub(super) struct Operand {
    /// Offset of the field.
    pub at: usize,
    /// The tensor or weight.
    pub name: String,
    /// Offset in the tensor or weight, in bytes.
    pub offset: u64,
}

impl Arguments {
    /// All zeros: null pointers, features off.
    pub fn new(bytes: usize) -> Self {
        Arguments {
            words: vec![0; bytes.div_ceil(8)],
            operands: Vec::new(),
        }
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        bytemuck::cast_slice_mut::<u64, u8>(&mut self.words)[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// The address of the tensor or weight of that name, once it is bound.
    pub fn operand(&mut self, at: usize, name: &str) {
        self.operand_from(at, name, 0);
    }
    /// The same, at an offset in bytes.
    pub fn operand_from(&mut self, at: usize, name: &str, offset: usize) {
        self.operands.push(Operand {
            at,
            name: name.to_string(),
            offset: offset as u64,
        });
    }
    /// An address.
    pub fn address(&mut self, at: usize, address: u64) {
        self.write(at, &address.to_le_bytes());
    }
    /// A count of at most 31 bits; sizes of layers fit.
    pub fn int(&mut self, at: usize, value: usize) {
        let value = i32::try_from(value).expect("sizes of layers fit 31 bits");
        self.write(at, &value.to_le_bytes());
    }
    /// A 64-bit number.
    pub fn long(&mut self, at: usize, value: usize) {
        self.write(at, &(value as u64).to_le_bytes());
    }
    /// A float.
    pub fn float(&mut self, at: usize, value: f32) {
        self.write(at, &value.to_le_bytes());
    }

    /// The fields for operand addresses.
    pub fn operands(&self) -> &[Operand] {
        &self.operands
    }

    /// The struct's bytes.
    pub fn words(&mut self) -> &mut [u64] {
        &mut self.words
    }
}
