//! Products on the CPU: Burn's, which runs on a SIMD matrix library.

use burn::backend::Flex;
use burn::backend::TensorMetadata;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Shape};

use super::{Product, Target};

type Raw = FloatTensor<Flex>;

/// See [`MambaKernels::product`](crate::MambaKernels::product).
pub(crate) fn product(a: Raw, b: Raw, how: Product, target: Target<Raw>) -> Raw {
    let outer = a.shape();
    let [a, b] = [matrix(a), matrix(b)];
    let wide = |t: Raw| match t.dtype() {
        DType::F32 => t,
        _ => Flex::float_cast(t, burn::tensor::FloatDType::F32),
    };
    let turned = |t: Raw, turn: bool| {
        if turn {
            Flex::float_swap_dims(t, 0, 1)
        } else {
            t
        }
    };
    let out = Flex::float_matmul(
        turned(wide(a), how.transposed[0]),
        turned(wide(b), how.transposed[1]),
    );
    let out = match target {
        Target::Add(add) => {
            let shape = out.shape();
            Flex::float_add(out, Flex::float_reshape(wide(add), shape))
        }
        Target::New | Target::Into(_) => out,
    };
    let out = if how.dtype == DType::F32 {
        out
    } else {
        Flex::float_cast(out, how.dtype.into())
    };
    let [_, columns] = out.shape().dims();
    if how.transposed[0] {
        return out;
    }
    let mut dims: Vec<usize> = outer.to_vec();
    let last = dims.len() - 1;
    dims[last] = columns;
    Flex::float_reshape(out, Shape::from(dims))
}

/// The tensor with all axes before the last as rows.
fn matrix(tensor: Raw) -> Raw {
    let dims = tensor.shape().to_vec();
    let columns = dims[dims.len() - 1];
    let rows = dims[..dims.len() - 1].iter().product::<usize>();
    Flex::float_reshape(tensor, Shape::new([rows, columns]))
}
