//! The embedding on the CPU: rows in parallel, backward one byte value a task.

use burn::tensor::DType;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::flex::tensor::{contiguous, dims, indices, tensor, values};

/// See [`MambaKernels::byte_embedding`](crate::MambaKernels::byte_embedding).
pub(crate) fn forward(weight: FlexTensor, bytes: FlexTensor) -> FlexTensor {
    let [_, width] = dims(&weight);
    let weight = contiguous(weight);
    let weight = values(&weight);
    let bytes = indices(&bytes);
    let mut y = vec![0.0; bytes.len() * width];
    y.par_chunks_mut(width).zip(&bytes).for_each(|(y, byte)| {
        y.copy_from_slice(&weight[byte * width..(byte + 1) * width]);
    });
    tensor(y, [bytes.len(), width], DType::F32)
}

/// See [`MambaKernels::byte_embedding_backward`](crate::MambaKernels::byte_embedding_backward).
pub(crate) fn backward(bytes: FlexTensor, dy: FlexTensor, rows: usize) -> FlexTensor {
    let [_, width] = dims(&dy);
    let dy = contiguous(dy);
    let dy = values(&dy);
    let mut places = vec![Vec::new(); rows];
    for (place, byte) in indices(&bytes).into_iter().enumerate() {
        places[byte].push(place);
    }
    let mut dweight = vec![0.0; rows * width];
    dweight
        .par_chunks_mut(width)
        .zip(places)
        .for_each(|(total, places)| {
            for place in places {
                let dy = &dy[place * width..(place + 1) * width];
                for (total, dy) in total.iter_mut().zip(dy) {
                    *total += dy;
                }
            }
        });
    tensor(dweight, [rows, width], DType::F32)
}
