//! The arguments of a run: inputs and outputs by role or name, and caches.

use super::error::CpuError;
use super::kv_cache::KvCaches;
use super::program::Port;
use crate::interface::Role;
use crate::tensor::DType;

/// Values of an input. Floats are f32 whatever the network's dtype.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Of every float dtype.
    F32(&'a [f32]),
    /// 32-bit integers.
    I32(&'a [i32]),
    /// 64-bit integers.
    I64(&'a [i64]),
    /// Signed bytes.
    I8(&'a [i8]),
    /// Unsigned bytes.
    U8(&'a [u8]),
    /// Booleans.
    Bool(&'a [bool]),
}

/// Memory for an output. Floats are f32 whatever the network's dtype.
#[derive(Debug)]
pub enum Output<'a> {
    /// Of every float dtype.
    F32(&'a mut [f32]),
    /// 32-bit integers.
    I32(&'a mut [i32]),
    /// 64-bit integers.
    I64(&'a mut [i64]),
    /// Signed bytes.
    I8(&'a mut [i8]),
    /// Unsigned bytes.
    U8(&'a mut [u8]),
    /// Booleans.
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

/// Identifies an input or output: by role, or by name in networks that are not a model's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PortKey<'a> {
    /// By role.
    Role(Role),
    /// By name.
    Name(&'a str),
}

impl From<Role> for PortKey<'_> {
    fn from(role: Role) -> Self {
        PortKey::Role(role)
    }
}

impl<'a> From<&'a str> for PortKey<'a> {
    fn from(name: &'a str) -> Self {
        PortKey::Name(name)
    }
}

impl<'a> From<&'a String> for PortKey<'a> {
    fn from(name: &'a String) -> Self {
        PortKey::Name(name)
    }
}

impl PortKey<'_> {
    fn is(&self, port: &Port) -> bool {
        match self {
            PortKey::Role(role) => port.role == Some(*role),
            PortKey::Name(name) => port.name == *name,
        }
    }

    fn text(&self) -> String {
        match self {
            PortKey::Role(role) => role.name(),
            PortKey::Name(name) => name.to_string(),
        }
    }
}

/// Everything one run reads and writes. Each input and output of the program is bound exactly once, and nothing else.
#[derive(Default)]
pub struct Bindings<'a> {
    inputs: Vec<(PortKey<'a>, Input<'a>)>,
    outputs: Vec<(PortKey<'a>, Output<'a>)>,
    caches: Option<&'a mut KvCaches>,
}

impl<'a> Bindings<'a> {
    /// Nothing bound yet.
    pub fn new() -> Self {
        Bindings::default()
    }
    /// Row-major values of an input.
    pub fn input(&mut self, key: impl Into<PortKey<'a>>, values: impl Into<Input<'a>>) -> &mut Self {
        self.inputs.push((key.into(), values.into()));
        self
    }
    /// Memory for an output, row-major.
    pub fn output(&mut self, key: impl Into<PortKey<'a>>, memory: impl Into<Output<'a>>) -> &mut Self {
        self.outputs.push((key.into(), memory.into()));
        self
    }
    /// The caches, updated in place.
    pub fn caches(&mut self, caches: &'a mut KvCaches) -> &mut Self {
        self.caches = Some(caches);
        self
    }

    /// Checks that every binding is one of these ports, and no port is bound twice.
    pub(super) fn check(&self, inputs: &[Port], outputs: &[Port]) -> Result<(), CpuError> {
        let keys = self.inputs.iter().map(|(key, _)| *key);
        check_side("input", keys, inputs)?;
        let keys = self.outputs.iter().map(|(key, _)| *key);
        check_side("output", keys, outputs)
    }

    pub(super) fn input_address(&self, port: &Port) -> Result<*mut u8, CpuError> {
        let input = self.inputs.iter().find(|(key, _)| key.is(port));
        let (_, input) = input.ok_or_else(|| missing("input", port))?;
        let (dtype, len, address) = input.parts();
        fits(port, dtype, len)?;
        // Nothing writes to an input's buffer.
        Ok(address.cast_mut())
    }

    pub(super) fn output_address(&mut self, port: &Port) -> Result<*mut u8, CpuError> {
        let output = self.outputs.iter_mut().find(|(key, _)| key.is(port));
        let (_, output) = output.ok_or_else(|| missing("output", port))?;
        let (dtype, len, address) = output.parts();
        fits(port, dtype, len)?;
        Ok(address)
    }

    /// The addresses of the caches for these ports. Caches and ports are in the order of the updates in their network,
    /// which is the same for all networks of a model.
    pub(super) fn cache_addresses(&mut self, ports: &[Port]) -> Result<Vec<*mut u8>, CpuError> {
        let entries = match &mut self.caches {
            Some(caches) => caches.entries.as_mut_slice(),
            None => &mut [],
        };
        if let Some(entry) = entries.get(ports.len()) {
            return Err(unknown("cache", entry.name().to_string(), ports));
        }
        let mut addresses = Vec::with_capacity(ports.len());
        for (i, port) in ports.iter().enumerate() {
            let Some(entry) = entries.get_mut(i).filter(|entry| entry.name() == port.name) else {
                return Err(missing("cache", port));
            };
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

fn check_side<'k>(
    what: &'static str,
    keys: impl Iterator<Item = PortKey<'k>> + Clone,
    ports: &[Port],
) -> Result<(), CpuError> {
    for key in keys.clone() {
        match ports.iter().filter(|port| key.is(port)).count() {
            0 => return Err(unknown(what, key.text(), ports)),
            1 => {}
            // Two threads would write the same memory at once.
            count => {
                let (name, reason) = (key.text(), format!("{count} {what}s have this role"));
                return Err(CpuError::Binding { name, reason });
            }
        }
    }
    for port in ports {
        if keys.clone().filter(|key| key.is(port)).count() > 1 {
            let name = port.name.clone();
            return Err(CpuError::BoundTwice { what, name });
        }
    }
    Ok(())
}

fn missing(what: &'static str, port: &Port) -> CpuError {
    let name = port.name.clone();
    CpuError::MissingBinding { what, name }
}

fn unknown(what: &'static str, name: String, ports: &[Port]) -> CpuError {
    CpuError::UnknownBinding {
        what,
        name,
        known: ports.iter().map(|port| port.name.clone()).collect(),
    }
}

/// The dtype with which a port is bound.
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
