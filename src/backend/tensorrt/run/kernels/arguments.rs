//! The argument of a kernel, one struct by value, as bytes.

/// A struct in the making. Fields are written at their offsets, little-endian as the device has them.
#[derive(Clone, Debug)]
pub(super) struct Arguments {
    /// In words, so that the struct is aligned to 8 bytes.
    words: Vec<u64>,
    operands: Vec<Operand>,
}

/// A field that takes an address.
#[derive(Clone, Debug)]
pub(super) struct Operand {
    /// Where the field is.
    pub at: usize,
    /// The tensor or weight.
    pub name: String,
    /// Bytes from its beginning.
    pub offset: u64,
}

impl Arguments {
    /// All zeros: no pointer, nothing wanted.
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
    /// The same, so many bytes after its beginning.
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
    /// A count, which fits 31 bits: sizes of layers do.
    pub fn int(&mut self, at: usize, value: usize) {
        let value = i32::try_from(value).expect("sizes of layers fit 31 bits");
        self.write(at, &value.to_le_bytes());
    }
    /// A number of 64 bits.
    pub fn long(&mut self, at: usize, value: usize) {
        self.write(at, &(value as u64).to_le_bytes());
    }
    /// A float.
    pub fn float(&mut self, at: usize, value: f32) {
        self.write(at, &value.to_le_bytes());
    }

    /// Where each operand's address goes.
    pub fn operands(&self) -> &[Operand] {
        &self.operands
    }

    /// The struct's bytes.
    pub fn words(&mut self) -> &mut [u64] {
        &mut self.words
    }
}
