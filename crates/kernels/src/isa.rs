//! Which instruction set to use: found at run time, never at compile time.

/// An instruction set that this machine has.
///
/// The inner level is private: holding an `Isa` proves that detection saw its features,
/// which is what every `unsafe` call of a vector routine relies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(pub(crate) Level);

/// Ordered: each level has the features of the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// Plain Rust. On aarch64 this already compiles to NEON with fused multiply-add.
    Scalar,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX-512 with the integer dot product.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    /// AVX-512 with the integer and the BF16 dot products.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// The same with tile registers and their bf16 and 8-bit products.
    #[cfg(target_arch = "x86_64")]
    Amx,
}

impl Isa {
    /// Plain Rust: the oracle that every other level is tested against.
    pub const SCALAR: Isa = Isa(Level::Scalar);

    /// The best level that this machine has.
    pub fn detect() -> Isa {
        *Self::available()
            .last()
            .expect("the scalar level is always there")
    }

    /// Every level that this machine has, the plainest first.
    pub fn available() -> Vec<Isa> {
        #[allow(unused_mut)]
        let mut levels = vec![Isa(Level::Scalar)];
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx2") && has!("fma") && has!("f16c") {
                levels.push(Isa(Level::Avx2));
                if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
                    levels.push(Isa(Level::Avx512));
                    if has!("avx512vnni") {
                        levels.push(Isa(Level::Avx512Vnni));
                        if has!("avx512bf16") {
                            levels.push(Isa(Level::Avx512Bf16));
                            if crate::amx::available() {
                                levels.push(Isa(Level::Amx));
                            }
                        }
                    }
                }
            }
        }
        levels
    }

    /// The level called `name`, if this machine has it.
    pub fn named(name: &str) -> Option<Isa> {
        Self::available().into_iter().find(|isa| isa.name() == name)
    }

    /// `scalar`, `avx2`, `avx512`, `avx512-vnni`, `avx512-bf16` or `amx`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni => "avx512-vnni",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => "avx512-bf16",
            #[cfg(target_arch = "x86_64")]
            Level::Amx => "amx",
        }
    }
}

/// Defines a routine once and compiles its body for every level.
///
/// The body is ordinary Rust over slices, written in lanes so that the compiler vectorises
/// it; since it never depends on the vector width, every level gives the same bits.
macro_rules! for_each_isa {
    ($(#[$doc:meta])* $vis:vis fn $name:ident$(<$R:ident: Real>)?($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        #[inline]
        $vis fn $name$(<$R: $crate::Real>)?(isa: $crate::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body$(<$R: $crate::Real>)?($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2$(<$R: $crate::Real>)?($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512$(<$R: $crate::Real>)?($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            match isa.0 {
                $crate::isa::Level::Scalar => body($($arg),*),
                // SAFETY: an `Isa` of this level exists only where its features were detected.
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Level::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: as above; each level that is left has AVX-512.
                #[cfg(target_arch = "x86_64")]
                _ => unsafe { avx512($($arg),*) },
            }
        }
    };
}
pub(crate) use for_each_isa;
