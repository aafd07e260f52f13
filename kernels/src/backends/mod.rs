//! The operations of each backend, collected into [`MambaKernels`](crate::MambaKernels).

mod autodiff;
#[cfg(feature = "cube")]
mod cube;
#[cfg(feature = "flex")]
mod flex;
