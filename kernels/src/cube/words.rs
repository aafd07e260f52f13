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
