//! The fixed hash functions behind splits and sampling.
//!
//! Their outputs are part of what makes runs repeatable: changing one changes which documents
//! are held out and which bytes a step sees.

/// Finaliser of SplitMix64: a bijection of `u64` whose output bits all depend on all input bits.
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Hash of a seed, a counter and a purpose; different purposes give unrelated streams.
pub(crate) fn keyed(seed: u64, counter: u64, purpose: u64) -> u64 {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let a = mix(seed.wrapping_add(STEP));
    let b = mix(a ^ counter.wrapping_add(STEP));
    mix(b ^ purpose.wrapping_mul(STEP))
}

/// Maps a hash to `0..n` (`n` > 0) by the high half of a wide product.
///
/// The bias is below `n / 2^64`.
pub(crate) fn below(hash: u64, n: u64) -> u64 {
    ((u128::from(hash) * u128::from(n)) >> 64) as u64
}

/// Lower-case hexadecimal digits of bytes.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_fixed() {
        assert_eq!(mix(1), 0x5692_161d_100b_05e5);
        assert_eq!(hex(&[0x00, 0xaf, 0x10]), "00af10");
        assert_eq!(below(u64::MAX, 10), 9);
        assert_eq!(below(0, 10), 0);
        assert_ne!(keyed(1, 2, 3), keyed(1, 3, 2));
        assert_ne!(keyed(1, 2, 3), keyed(2, 1, 3));
    }
}
