//! Tile registers (AMX): eight registers of sixteen rows by 64 bytes, and products of two of
//! them added to a third.
//!
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter
//! "Programming with Intel AMX". The compiler has no stable intrinsics for them, so each
//! instruction is one line of assembly here. Sums are registers 0 to 2, right operands 3 to 5, the
//! left operand is register 6: a register that is loaded while a product still reads it makes the
//! load wait, so each sum has a right operand of its own.

use std::arch::asm;
use std::cell::Cell;
use std::sync::OnceLock;

/// Rows of a register, and 32-bit words of a row.
pub(crate) const TILE: usize = 16;
/// Sums at a time, and right operands: sum `i` takes the product with right operand `i`.
pub(crate) const SUMS: usize = 3;

/// Whether the processor has tiles with their bf16 and int8 products, and the system lets this
/// process use them.
pub(crate) fn available() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    *GRANTED.get_or_init(|| has_tiles() && granted())
}

fn has_tiles() -> bool {
    const BF16: u32 = 1 << 22;
    const TILES: u32 = 1 << 24;
    const INT8: u32 = 1 << 25;
    let all = BF16 | TILES | INT8;
    let leaf = std::arch::x86_64::__cpuid_count(7, 0);
    leaf.edx & all == all
}

/// Asks the system for the tiles' state, which it keeps for each thread once a process wants it.
#[cfg(target_os = "linux")]
fn granted() -> bool {
    const ARCH_PRCTL: u64 = 158;
    const REQUEST: u64 = 0x1023;
    const TILE_DATA: u64 = 18;
    let status: i64;
    // SAFETY: the call takes two numbers and touches no memory of ours; `syscall` overwrites rcx
    // and r11. Without the feature the kernel answers with an error.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => status,
            in("rdi") REQUEST,
            in("rsi") TILE_DATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    status == 0
}

#[cfg(not(target_os = "linux"))]
fn granted() -> bool {
    false
}

#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

thread_local! {
    /// What this thread's registers are shaped for: shaping them takes as long as a dozen products.
    static SHAPE: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

/// Shapes this thread's registers, unless they are so already: sums are `[rows, 16]` words, the left operand
/// `[rows, words]`, right ones `[words, 16]`.
///
/// # Safety
/// [`available`] said yes.
///
/// Panics unless both are 1 to 16.
#[inline]
pub(crate) unsafe fn shape(rows: usize, words: usize) {
    if SHAPE.get() != (rows, words) {
        // SAFETY: passed on to the caller.
        unsafe { reshape(rows, words) };
    }
}

/// # Safety
/// As [`shape`].
#[cold]
unsafe fn reshape(rows: usize, words: usize) {
    assert!((1..=TILE).contains(&rows) && (1..=TILE).contains(&words));
    let mut config = Config {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [0; 16],
        rows: [0; 16],
    };
    config.row_bytes[..2 * SUMS].fill(64);
    config.rows[..SUMS].fill(rows as u8);
    config.rows[SUMS..2 * SUMS].fill(words as u8);
    config.row_bytes[2 * SUMS] = 4 * words as u16;
    config.rows[2 * SUMS] = rows as u8;
    // SAFETY: 64 bytes that describe palette 1 within its bounds.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
    SHAPE.set((rows, words));
}

/// One instruction of a sum and its right operand: the number of a register is part of its name.
macro_rules! on {
    ($i:expr, $zero:literal, $one:literal, $two:literal $(, $arg:tt = $value:expr)*) => {
        match $i {
            0 => asm!($zero, $($arg = in(reg) $value,)* options(nostack)),
            1 => asm!($one, $($arg = in(reg) $value,)* options(nostack)),
            _ => asm!($two, $($arg = in(reg) $value,)* options(nostack)),
        }
    };
}

/// # Safety
/// [`shape`] was called on this thread, `i < SUMS`.
#[inline(always)]
pub(crate) unsafe fn zero(i: usize) {
    // SAFETY: the caller vouches for it.
    unsafe { on!(i, "tilezero tmm0", "tilezero tmm1", "tilezero tmm2") };
}

/// # Safety
/// As [`zero`]; `from` points to the rows of a sum, `stride` bytes apart.
#[inline(always)]
pub(crate) unsafe fn load(i: usize, from: *const f32, stride: usize) {
    // SAFETY: the caller vouches for it.
    unsafe {
        on!(
            i,
            "tileloadd tmm0, [{at} + {by}*1]",
            "tileloadd tmm1, [{at} + {by}*1]",
            "tileloadd tmm2, [{at} + {by}*1]",
            at = from,
            by = stride
        );
    }
}

/// # Safety
/// As [`load`]; the rows may be written.
#[inline(always)]
pub(crate) unsafe fn store(i: usize, to: *mut f32, stride: usize) {
    // SAFETY: the caller vouches for it.
    unsafe {
        on!(
            i,
            "tilestored [{at} + {by}*1], tmm0",
            "tilestored [{at} + {by}*1], tmm1",
            "tilestored [{at} + {by}*1], tmm2",
            at = to,
            by = stride
        );
    }
}

/// # Safety
/// [`shape`] was called on this thread; `from` points to the rows of a left operand, `stride` bytes
/// apart.
#[inline(always)]
pub(crate) unsafe fn left(from: *const u32, stride: usize) {
    // SAFETY: the caller vouches for it.
    unsafe {
        asm!("tileloadd tmm6, [{at} + {by}*1]", at = in(reg) from, by = in(reg) stride, options(nostack, readonly));
    }
}

/// # Safety
/// As [`left`], of right operand `i`.
#[inline(always)]
pub(crate) unsafe fn right(i: usize, from: *const u32, stride: usize) {
    // SAFETY: the caller vouches for it.
    unsafe {
        on!(
            i,
            "tileloadd tmm3, [{at} + {by}*1]",
            "tileloadd tmm4, [{at} + {by}*1]",
            "tileloadd tmm5, [{at} + {by}*1]",
            at = from,
            by = stride
        );
    }
}

/// Adds the product of the left operand and right operand `i`, pairs of bf16, to sum `i`.
///
/// # Safety
/// As [`zero`].
#[inline(always)]
pub(crate) unsafe fn add_bf16(i: usize) {
    // SAFETY: the caller vouches for it.
    unsafe {
        on!(
            i,
            "tdpbf16ps tmm0, tmm6, tmm3",
            "tdpbf16ps tmm1, tmm6, tmm4",
            "tdpbf16ps tmm2, tmm6, tmm5"
        );
    }
}

/// The same of fours of signed bytes, to a sum of `i32`.
///
/// # Safety
/// As [`zero`].
#[inline(always)]
pub(crate) unsafe fn add_int8(i: usize) {
    // SAFETY: the caller vouches for it.
    unsafe {
        on!(
            i,
            "tdpbssd tmm0, tmm6, tmm3",
            "tdpbssd tmm1, tmm6, tmm4",
            "tdpbssd tmm2, tmm6, tmm5"
        );
    }
}
