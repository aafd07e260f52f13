//! Training: one step ([`Learner`]), and what happens between steps ([`run`]).
//!
//! The loop is step-based and our own. `burn-train`'s `Learner` was weighed and not taken: its
//! optimizer's record can be reached only through its per-epoch checkpointers, which panic on a
//! failed write; each update clones the model, so that weights exist twice; its clipping is per
//! tensor where the recipe's is the global norm; and a training step returns nothing through which
//! a state could be carried to the next. Burn's modules, autodiff and gradient accumulator are used
//! as they are.

pub mod checkpoint;
pub mod fit;
mod interrupt;
pub mod learner;
pub mod metrics;
mod optimizer;
pub(crate) mod parameters;
mod progress;
mod recompute;
pub mod run;
pub mod run_dir;
mod schedule;

pub use checkpoint::Checkpoint;
pub use learner::Learner;
pub use run_dir::RunDir;
pub use schedule::learning_rate;
