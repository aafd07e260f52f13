//! Numbers read as words of 32 bits: one f32 or two bf16 each.
//!
//! They are kept as words and turned into numbers where they are used: a compiler that sees numbers
//! of 16 bits takes words apart as soon as they come, which means waiting for them.

use cubecl::prelude::*;

/// Some neighbouring words.
pub(crate) type Words<P> = Vector<u32, P>;

/// The first number of a word.
#[cube]
fn first_number(word: u32, #[comptime] halves: bool) -> f32 {
    let mut bits = word;
    if halves {
        bits = word << 16u32;
    }
    f32::reinterpret(bits)
}

/// The second number of a word of two.
#[cube]
fn second_number(word: u32) -> f32 {
    f32::reinterpret(word & 0xffff_0000u32)
}

/// Number `i` of some words.
#[cube]
pub(crate) fn number<P: Size>(
    words: Words<P>,
    #[comptime] i: usize,
    #[comptime] halves: bool,
) -> f32 {
    if comptime!(!halves) {
        first_number(words.extract(i), false)
    } else {
        let word = words.extract(comptime!(i / 2));
        if comptime!(i % 2 == 0) {
            first_number(word, true)
        } else {
            second_number(word)
        }
    }
}

/// How PTX calls a vector of so many numbers.
const fn width_name(size: usize) -> &'static str {
    match size {
        4 => ".v4",
        2 => ".v2",
        _ => "",
    }
}

/// `from[at]`, loaded between the barriers that it stands between. A compiler that knows that nobody
/// writes to a buffer moves loads from it over barriers: before one, which then waits for them, or to
/// where there are registers, which is too late.
#[cube]
pub(crate) fn load_now<E: Scalar, N: Size>(
    from: &[Vector<E, N>],
    at: usize,
    #[comptime] ptx: bool,
) -> Vector<E, N> {
    if comptime!(ptx) {
        let place = from[at..at + 1].as_ptr();
        let size = N::value();
        let name = comptime!(width_name(size));
        let it: Vector<E, N>;
        gpu_asm!("ld.global{name}.b32 {}, [{}];", out(_) it, in(_) place);
        it
    } else {
        from[at]
    }
}
