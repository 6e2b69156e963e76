//! What the caller gives a run: inputs, outputs and caches, by name.

use std::collections::HashMap;

use super::error::CpuError;
use super::kv_cache::KvCaches;
use super::program::Port;
use crate::tensor::DType;

/// Values of an input. Floats are f32 whatever the network's dtype.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    F32(&'a [f32]),
    I32(&'a [i32]),
    I64(&'a [i64]),
    I8(&'a [i8]),
    U8(&'a [u8]),
    Bool(&'a [bool]),
}

/// Memory for an output. Floats are f32 whatever the network's dtype.
#[derive(Debug)]
pub enum Output<'a> {
    F32(&'a mut [f32]),
    I32(&'a mut [i32]),
    I64(&'a mut [i64]),
    I8(&'a mut [i8]),
    U8(&'a mut [u8]),
    Bool(&'a mut [bool]),
}

macro_rules! from_slices {
    ($($variant:ident $type:ty),*) => {
        $(
            impl<'a> From<&'a [$type]> for Input<'a> {
                fn from(values: &'a [$type]) -> Self {
                    Input::$variant(values)
                }
            }
            impl<'a> From<&'a mut [$type]> for Output<'a> {
                fn from(values: &'a mut [$type]) -> Self {
                    Output::$variant(values)
                }
            }
        )*
        impl Input<'_> {
            fn parts(&self) -> (DType, usize, *const u8) {
                match self {
                    $(Input::$variant(v) => (DType::$variant, v.len(), v.as_ptr().cast()),)*
                }
            }
        }
        impl Output<'_> {
            fn parts(&mut self) -> (DType, usize, *mut u8) {
                match self {
                    $(Output::$variant(v) => (DType::$variant, v.len(), v.as_mut_ptr().cast()),)*
                }
            }
        }
    };
}
from_slices!(F32 f32, I32 i32, I64 i64, I8 i8, U8 u8, Bool bool);

/// Everything one run reads and writes. Names that the program does not know are ignored, so that one set of bindings
/// serves programs that need `logit_rows` and programs that do not.
#[derive(Default)]
pub struct Bindings<'a> {
    inputs: HashMap<&'a str, Input<'a>>,
    outputs: HashMap<&'a str, Output<'a>>,
    caches: Option<&'a mut KvCaches>,
}

impl<'a> Bindings<'a> {
    pub fn new() -> Self {
        Bindings::default()
    }
    /// Row-major values of the input of that name.
    pub fn input(&mut self, name: &'a str, values: impl Into<Input<'a>>) -> &mut Self {
        self.inputs.insert(name, values.into());
        self
    }
    /// Memory for the output of that name, row-major.
    pub fn output(&mut self, name: &'a str, memory: impl Into<Output<'a>>) -> &mut Self {
        self.outputs.insert(name, memory.into());
        self
    }
    /// The caches, updated in place.
    pub fn caches(&mut self, caches: &'a mut KvCaches) -> &mut Self {
        self.caches = Some(caches);
        self
    }

    pub(super) fn input_address(&self, port: &Port) -> Result<*mut u8, CpuError> {
        let input = self.inputs.get(port.name.as_str());
        let input = input.ok_or_else(|| problem(port, "the input is not bound".to_string()))?;
        let (dtype, len, address) = input.parts();
        fits(port, dtype, len)?;
        // Nothing writes to an input's buffer.
        Ok(address.cast_mut())
    }

    pub(super) fn output_address(&mut self, port: &Port) -> Result<*mut u8, CpuError> {
        let output = self.outputs.get_mut(port.name.as_str());
        let output = output.ok_or_else(|| problem(port, "the output is not bound".to_string()))?;
        let (dtype, len, address) = output.parts();
        fits(port, dtype, len)?;
        Ok(address)
    }

    /// The addresses of the caches for these ports.
    pub(super) fn cache_addresses(&mut self, ports: &[Port]) -> Result<Vec<*mut u8>, CpuError> {
        let entries = match &mut self.caches {
            Some(caches) => caches.entries.as_mut_slice(),
            None => &mut [],
        };
        let mut addresses = Vec::with_capacity(ports.len());
        for (i, port) in ports.iter().enumerate() {
            // KvCaches made for the same model come in the same order.
            let at = match entries.get(i) {
                Some(entry) if entry.name() == port.name => Some(i),
                _ => entries.iter().position(|e| e.name() == port.name),
            };
            let Some(at) = at else {
                return Err(problem(port, "the cache is not bound".to_string()));
            };
            let entry = &mut entries[at];
            if entry.dtype() != port.dtype || entry.shape().as_slice() != port.shape {
                let (dtype, shape) = (entry.dtype(), entry.shape());
                let wanted = format!("{} {:?}", port.dtype, port.shape);
                return Err(problem(
                    port,
                    format!("the program needs {wanted}, the cache is {dtype} {shape:?}"),
                ));
            }
            addresses.push(entry.bytes_mut().as_mut_ptr());
        }
        Ok(addresses)
    }
}

/// The dtype a port is bound as.
pub(super) fn bound_dtype(dtype: DType) -> DType {
    if dtype.is_float() { DType::F32 } else { dtype }
}

fn fits(port: &Port, dtype: DType, len: usize) -> Result<(), CpuError> {
    let wanted = bound_dtype(port.dtype);
    if dtype == wanted && len == port.shape.iter().product::<usize>() {
        return Ok(());
    }
    let shape = &port.shape;
    Err(problem(
        port,
        format!("needs {wanted} {shape:?}, bound to {len} elements of {dtype}"),
    ))
}

fn problem(port: &Port, reason: String) -> CpuError {
    CpuError::Binding {
        name: port.name.clone(),
        reason,
    }
}
