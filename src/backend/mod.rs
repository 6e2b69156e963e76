//! What runs or compiles a [`Network`](crate::network::Network). Each back end is a room that looks into no other.

pub mod cpu;
pub mod tensorrt;
