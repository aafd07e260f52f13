//! Checkpoints of other programs: reading theirs and writing ours as theirs.
//!
//! Read are `pytorch_model.bin` (and `.pt`) as `torch.save` writes it, and safetensors, in one file
//! or several, with names, layouts and configs of mamba_ssm, transformers and MambaByte. No code
//! in a file is ever executed: `pickle.rs` says what a pickle may contain.
//!
//! Tensors are read and written one at a time: memory is what the largest takes, not the model.
//! Whatever a file says of lengths and places is compared with the file before memory is taken.

mod card;
mod config;
mod export;
mod file;
mod import;
mod names;
mod pickle;
mod safetensors;
mod source;
mod tensor;
#[cfg(test)]
mod tests;
mod torch;
mod torch_writer;
mod weights;
mod zip;

pub use card::Learnt;
pub use export::{Format as ExportFormat, export};
pub use import::Import;
pub use weights::WeightsFile;

#[cfg(feature = "hub")]
pub(crate) use config::{CONFIG, check_config};
#[cfg(feature = "hub")]
pub(crate) use source::{files, indexed, weights_among};

/// Problems that a message lists.
const SHOWN: usize = 20;

/// A name out of a file, for a message: of bounded length, and on one line.
fn shown(name: &str) -> String {
    let printable = |c: char| if c.is_control() { '?' } else { c };
    let mut text: String = name.chars().map(printable).take(100).collect();
    if text.len() < name.len() {
        text.push('…');
    }
    text
}

/// Several problems as lines of a message.
fn listed(problems: &[String]) -> String {
    let mut text = String::new();
    for problem in problems.iter().take(SHOWN) {
        text += "\n  ";
        text += problem;
    }
    if problems.len() > SHOWN {
        text += &format!("\n  and {} more", problems.len() - SHOWN);
    }
    text
}
