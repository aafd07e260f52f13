//! Training: one step ([`Learner`]), what happens between steps (`run`), and how
//! a run begins ([`launch`]).
//!
//! The loop is step-based and our own. `burn-train`'s `Learner` was weighed and not taken: its
//! optimizer's record can be reached only through its per-epoch checkpointers, which panic on a
//! failed write; each update clones the model, so that weights exist twice; its clipping is per
//! tensor where the recipe's is the global norm; and a training step returns nothing through which
//! a state could be carried to the next. Burn's modules and autodiff are used as they are.

pub mod checkpoint;
pub mod fit;
pub mod guard;
pub mod inspect;
mod interrupt;
pub mod launch;
pub mod learner;
mod lock;
pub mod metrics;
mod optimizer;
pub(crate) mod parameters;
mod progress;
mod recompute;
mod run;
pub mod run_dir;
mod saver;
mod schedule;
mod sum;
pub mod telemetry;
pub mod tensorboard;

pub use checkpoint::Checkpoint;
pub use launch::{resume, start};
pub use learner::Learner;
pub use run_dir::RunDir;
pub use schedule::learning_rate;
