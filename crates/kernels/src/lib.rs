//! Arithmetic on slices: dense and bf16 matrix products, the row operations of a
//! transformer, block quantisation, and the thread pool they run on.
//!
//! This is the only crate that may contain `unsafe`. Every routine takes an [`Isa`] (or a
//! [`Compute`], which carries one) and has a scalar twin with the same name.
//!
//! # Same bits
//!
//! Two rules make every result independent of the thread count, of the batch a row shares
//! and of how work is cut:
//!
//! 1. An output element of a product is **one chain** of fused multiply-adds, in ascending
//!    order of the summed index. Tiles, tails and threads choose *which* elements to compute
//!    together, never the order inside one. (On tile registers a link of the chain of a bf16
//!    product is the sum of sixteen pairs.)
//! 2. Reductions over a row use sixteen interleaved chains and one fixed tree
//!    ([`ops::dot`]), whatever the vector width of the machine.
//!
//! ```
//! use bantam_kernels::Compute;
//! let compute = Compute::new(2);
//! let mut out = vec![0.0f32; 1000];
//! compute.pool().chunks_mut(&mut out, 64, |chunk_idx, chunk| {
//!     chunk.iter_mut().for_each(|x| *x = chunk_idx as f32);
//! });
//! assert_eq!(out[999], 15.0);
//! ```
#![allow(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

#[cfg(target_arch = "x86_64")]
mod amx;
pub mod attention;
pub mod bf16;
pub mod encoder;
pub mod gemm;
mod huge;
mod isa;
pub mod kv;
#[cfg(test)]
mod noise;
pub mod ops;
pub mod optim;
mod par;
pub mod peak;
pub mod qmm;
pub mod quant;
mod real;

pub use isa::Isa;
pub use par::Pool;
pub use real::Real;

/// The instruction set and the threads that a computation may use; cheap to clone.
#[derive(Clone, Debug)]
pub struct Compute {
    isa: Isa,
    pool: Pool,
}

impl Compute {
    /// The best instruction set of this machine on `threads` threads (at least one).
    pub fn new(threads: usize) -> Self {
        Self::with_isa(threads, Isa::detect())
    }

    /// `threads` threads with a given instruction set, for parity tests and overrides.
    pub fn with_isa(threads: usize, isa: Isa) -> Self {
        Self {
            isa,
            pool: Pool::new(threads),
        }
    }

    /// One thread per available core.
    pub fn detect() -> Self {
        Self::new(std::thread::available_parallelism().map_or(1, usize::from))
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The threads in use.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// How many threads take part in a parallel region.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }
}
