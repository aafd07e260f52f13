//! Numbers that the cubes of one kernel hand to each other while it runs.
//!
//! A number is written together with a tag, in one access of eight bytes (which is one on every NVIDIA
//! GPU, as NCCL's low-latency protocol relies on), and whoever needs it looks at it until the tag is
//! the expected one. So it arrives as soon as it can: nobody has to know that
//! everybody has come, no fence waits for what else is on the way, and the number is there with the
//! answer. Every number has one place and one writer. It may be written again once all who read it
//! have handed on something that the writer has waited for.
//!
//! Without PTX there is only one cube, which has all numbers as soon as its units have met.

use cubecl::prelude::*;

/// The bits of a number, and its tag.
pub(super) type Tagged = Vector<u32, Const<2>>;

/// Hands on a number.
#[cube]
pub(super) fn give(to: &mut [Tagged], at: usize, number: f32, tag: u32, #[comptime] ptx: bool) {
    let bits = u32::reinterpret(number);
    if ptx {
        let place = to[at..at + 1].as_ptr();
        // One access of the hardware, as the loads below.
        gpu_asm!(
            "st.relaxed.gpu.global.v2.b32 [{}], {{{}, {}}};",
            in(_) place, in(_) bits, in(_) tag,
        );
    } else {
        let mut it = Tagged::new(tag);
        it.insert(0usize, bits);
        to[at] = it;
    }
}

#[cube]
fn look(from: &mut [Tagged], at: usize, #[comptime] ptx: bool) -> Tagged {
    if comptime!(ptx) {
        let place = from[at..at + 1].as_ptr();
        let it: Tagged;
        gpu_asm!("ld.relaxed.gpu.global.v2.b32 {}, [{}];", out(_) it, in(_) place);
        it
    } else {
        from[at]
    }
}

/// A number that is there: this unit, or one it has synchronised with since, took it before.
#[cube]
pub(super) fn again(from: &mut [Tagged], at: usize, #[comptime] ptx: bool) -> f32 {
    f32::reinterpret(look(from, at, ptx).extract(0usize))
}

/// Two neighbours; `at` is even.
#[cube]
fn look_at_two(from: &mut [Tagged], at: usize) -> Vector<u32, Const<4>> {
    let place = from[at..at + 1].as_ptr();
    let it: Vector<u32, Const<4>>;
    gpu_asm!("ld.relaxed.gpu.global.v4.b32 {}, [{}];", out(_) it, in(_) place);
    it
}

/// Before numbers are taken; all units of the cube come here.
#[cube]
pub(super) fn settle(#[comptime] ptx: bool) {
    if !ptx {
        sync_storage();
    }
}

/// Which numbers a unit takes: of each of `rows` rows, `count` groups of `each` neighbours. Groups are
/// `stride` groups apart, rows `row` numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Pattern {
    pub rows: usize,
    pub row: usize,
    pub count: usize,
    pub stride: usize,
    pub each: usize,
}

impl Pattern {
    pub const fn numbers(&self) -> usize {
        self.rows * self.count * self.each
    }
}

/// Waits until numbers have the tag; all units of a plane come here. The first group is `first`;
/// groups beyond `last` are that one, rows beyond `last_row` are that one.
#[cube]
pub(super) fn take(
    from: &mut [Tagged],
    first: usize,
    last: usize,
    last_row: usize,
    tag: u32,
    #[comptime] pattern: Pattern,
    #[comptime] ptx: bool,
) -> Array<f32> {
    let mut numbers = Array::<f32>::new(comptime!(pattern.numbers()));
    let mut wrong = look_at_all(from, &mut numbers, first, last, last_row, tag, pattern, ptx);
    if ptx {
        // The plane stays together.
        while plane_any(wrong != 0u32) {
            wrong = look_at_all(from, &mut numbers, first, last, last_row, tag, pattern, ptx);
        }
    }
    numbers
}

/// Looks at all numbers once; the answer is zero if all have the tag.
#[cube]
fn look_at_all(
    from: &mut [Tagged],
    numbers: &mut Array<f32>,
    first: usize,
    last: usize,
    last_row: usize,
    tag: u32,
    #[comptime] pattern: Pattern,
    #[comptime] ptx: bool,
) -> u32 {
    let pairs = comptime!(ptx && pattern.each.is_multiple_of(2) && pattern.row.is_multiple_of(2));
    // All loads before the first use.
    let mut tags = Array::<u32>::new(comptime!(pattern.numbers()));
    #[unroll]
    for row in 0..comptime!(pattern.rows) {
        let start = min(row, last_row) * comptime!(pattern.row);
        #[unroll]
        for i in 0..comptime!(pattern.count) {
            let group = min(first + comptime!(i * pattern.stride), last);
            let place = start + group * comptime!(pattern.each);
            let to = comptime!((row * pattern.count + i) * pattern.each);
            if comptime!(pairs) {
                #[unroll]
                for k in 0..comptime!(pattern.each / 2) {
                    let two = look_at_two(from, place + comptime!(2 * k));
                    numbers[comptime!(to + 2 * k)] = f32::reinterpret(two.extract(0usize));
                    tags[comptime!(to + 2 * k)] = two.extract(1usize);
                    numbers[comptime!(to + 2 * k + 1)] = f32::reinterpret(two.extract(2usize));
                    tags[comptime!(to + 2 * k + 1)] = two.extract(3usize);
                }
            } else {
                #[unroll]
                for k in 0..comptime!(pattern.each) {
                    let one = look(from, place + k, ptx);
                    numbers[comptime!(to + k)] = f32::reinterpret(one.extract(0usize));
                    tags[comptime!(to + k)] = one.extract(1usize);
                }
            }
        }
    }
    let mut wrong = 0u32;
    #[unroll]
    for i in 0..comptime!(pattern.numbers()) {
        wrong |= tags[i] ^ tag;
    }
    wrong
}
