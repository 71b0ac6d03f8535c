//! Arithmetic: a scalar oracle and its SIMD twins, block quantisation, the thread pool.

pub mod quant;
