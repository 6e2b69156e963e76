//! What runs or compiles a [`Network`](crate::network::Network). The two back ends do not use each other.

pub mod cpu;
pub mod tensorrt;
