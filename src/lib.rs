//! MambaByte: train, evaluate and run byte-level Mamba language models on one GPU, on
//! [Burn](https://burn.dev).
//!
//! A Mamba-1 stack over raw bytes (arXiv 2401.13660): no tokenizer, constant memory and time a byte.
//!
//! | module | owns |
//! | --- | --- |
//! | [`config`] | the TOML schema, presets, all errors of a file at once |
//! | [`model`] | the block, the stack, the language model, the carried state |
//! | [`memory`] | how much device memory training takes |
//! | [`train`] | one step, the loop around it, checkpoints, metrics |
//! | [`eval`] | bits per byte, tasks, probabilities of every byte |
//! | [`generate`] | prefill, step, sampling |
//! | [`server`] | a model behind HTTP |
//! | [`interop`] | checkpoints of other programs |
//! | [`hub`] | checkpoints by name, from Hugging Face |
//! | [`dashboard`] | runs in a browser |
//! | [`commands`] | one file a command |
//!
//! The operations are in [`mambabyte_kernels`], the data in [`mambabyte_datasets`].

#![warn(clippy::print_stderr)]

mod clock;
pub mod commands;
pub mod config;
mod connections;
pub mod dashboard;
pub mod device;
pub mod error;
pub mod eval;
pub mod generate;
mod heap;
pub mod hub;
pub mod interop;
mod library;
mod loopback;
pub mod memory;
pub mod model;
mod new_file;
mod nvidia;
pub mod server;
mod terminal;
pub mod train;

pub use config::{Config, MambaConfig};
pub use model::{Mamba, MambaBlock, MambaLm, State};
