//! Text on disk, turned into byte shards and deterministic byte windows.
//!
//! The path of a byte from disk to a training step:
//!
//! 1. A [`sources::Source`] lists the documents of a [`Split`]: a local PG-19 copy (see
//!    [`download`] for fetching one), a folder or file of text, or the Rust sources that cargo
//!    has unpacked on this machine.
//! 2. [`shards::prepare`] writes those documents to shard files: one checked
//!    byte stream per split.
//! 3. [`shards::Shards`] opens a split as one byte stream with document boundaries.
//! 4. [`sampling::Sampler`] cuts the stream into batches. A batch is a pure function of the
//!    seed and the step number, so a resumed run needs to store nothing but its step.
//! 5. [`loader::Loader`] produces those batches ahead of time on a background thread.
//!
//! Nothing here knows about tensors or models. Bytes are the tokens: values 0 to 255, no
//! begin or end marks, nothing inserted between documents.

#![warn(clippy::print_stderr)]

pub mod download;
pub mod error;
pub mod fetch;
pub mod loader;
pub mod progress;
pub mod sampling;
pub mod shards;
pub mod sources;
pub mod text;

mod document;
mod fsutil;
mod hashing;

pub use document::{Document, Split};
pub use error::{DataError, Result};
pub use loader::Loader;
pub use progress::Progress;
pub use sampling::{Batch, Coordinates, Sampler, SamplerConfig, SamplingMode};
pub use shards::{DocumentInfo, PrepareOptions, Shards, ShardsInfo, Summary, prepare};
