//! Buffers of numbers that are read and written as vectors of several widths.

use cubecl::prelude::*;

/// A number of such a buffer.
pub(crate) type One = Vector<f32, Const<1>>;

/// The vector number `at` of a buffer.
#[cube]
pub(crate) fn wide_at<V: Size>(
    buffer: &mut [One],
    at: usize,
    #[comptime] ptx: bool,
) -> Vector<f32, V> {
    let mut value = Vector::<f32, V>::new(0.0f32);
    if ptx {
        value = buffer.with_vector_size::<V>()[at];
    } else {
        // Not every target can see a buffer as one of wider vectors.
        #[unroll]
        for i in 0..V::value() {
            value.insert(i, buffer[at * V::value() + i].extract(0usize));
        }
    }
    value
}

/// Puts the vector number `at` of a buffer.
#[cube]
pub(crate) fn put_wide_at<V: Size>(
    buffer: &mut [One],
    at: usize,
    value: Vector<f32, V>,
    #[comptime] ptx: bool,
) {
    if ptx {
        buffer.with_vector_size_mut::<V>()[at] = value;
    } else {
        #[unroll]
        for i in 0..V::value() {
            buffer[at * V::value() + i] = One::new(value.extract(i));
        }
    }
}
