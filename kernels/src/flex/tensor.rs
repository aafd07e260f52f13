//! Raw Flex tensors as contiguous f32 slices.

use burn::backend::ops::FloatTensorOps;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{DType, FloatDType, TensorData};
use burn_flex::FlexTensor;

/// The tensor in contiguous f32, without a copy where it already is.
pub(crate) fn contiguous(tensor: FlexTensor) -> FlexTensor {
    let tensor = if tensor.dtype() == DType::F32 {
        tensor
    } else {
        Flex::float_cast(tensor, FloatDType::F32)
    };
    if tensor.as_slice::<f32>().is_some() {
        tensor
    } else {
        tensor.to_contiguous()
    }
}

/// The values of a tensor that [`contiguous`] returned.
pub(crate) fn values(tensor: &FlexTensor) -> &[f32] {
    tensor
        .as_slice()
        .expect("contiguous() returned a contiguous f32 tensor")
}

/// The values of a tensor that [`contiguous`] returned, for writing: a buffer that something else
/// still holds is copied first.
pub(crate) fn values_mut(tensor: &mut FlexTensor) -> &mut [f32] {
    let (start, end) = tensor
        .layout()
        .contiguous_offsets()
        .expect("contiguous() returned a contiguous f32 tensor");
    &mut tensor.storage_mut()[start..end]
}

/// As [`values_mut`], of a contiguous i32 tensor.
pub(crate) fn words_mut(tensor: &mut FlexTensor) -> &mut [i32] {
    let (start, end) = tensor
        .layout()
        .contiguous_offsets()
        .expect("a contiguous tensor");
    &mut tensor.storage_mut()[start..end]
}

/// The values of an integer tensor as indices, whatever integer type they came in.
pub(crate) fn indices(tensor: &FlexTensor) -> Vec<usize> {
    let data = tensor.to_contiguous().into_data();
    data.iter::<i64>().map(|index| index as usize).collect()
}

/// A new tensor of `values`, in `dtype`.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Vec<usize>>, dtype: DType) -> FlexTensor {
    let shape: Vec<usize> = shape.into();
    let tensor = FlexTensor::from_data(TensorData::new(values, shape));
    if dtype == DType::F32 {
        tensor
    } else {
        Flex::float_cast(tensor, FloatDType::from(dtype))
    }
}

/// The dimensions of a tensor of rank `D`.
pub(crate) fn dims<const D: usize>(tensor: &FlexTensor) -> [usize; D] {
    tensor.shape().dims()
}
