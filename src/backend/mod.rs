//! The back ends: they execute or compile a [`Network`](crate::network::Network), and are independent of each other.

pub mod cpu;
pub mod tensorrt;
