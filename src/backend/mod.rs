//! The back ends: they execute or compile a [`Network`](crate::network::Network), and do not use each other.

pub mod cpu;
pub mod tensorrt;
