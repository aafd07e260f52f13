//! Byte shards: a split on disk as checked files.
//!
//! [`prepare`] writes them, [`Shards`] reads them. See the `format` module's table for the
//! layout of a file.

mod file;
pub(crate) mod format;
mod info;
mod prepare;
mod reader;
mod words;
mod writer;

pub use info::{DocumentInfo, ShardInfo, ShardsInfo, VerifyReport};
pub use prepare::{PrepareOptions, SplitSummary, Summary, prepare};
pub use reader::{OpenOptions, Shards};
pub use words::{WordCounter, count_words};

#[cfg(test)]
mod tests;
