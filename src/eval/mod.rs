//! How well a model predicts: bits per byte of text, of noised text, by length of context; scores
//! on tasks; probabilities of every byte.
//!
//! | file | owns |
//! | --- | --- |
//! | `context` | what a byte is predicted from: windows, overlapping windows, the whole document |
//! | `lanes` | many segments through a model at once, in constant memory |
//! | `evaluate` | one measurement, every byte scored once |
//! | `positions`, `report`, `plot` | losses by position, the report, the picture |
//! | `lengths`, `noise` | longer contexts; text made worse |
//! | `sequences`, `tasks` | log-probabilities of short texts; zero-shot tasks |
//! | `npy` | arrays for NumPy |
//! | `perplexity` | bits per byte, cross-entropies and word perplexity into each other |

mod context;
mod corpus;
mod evaluate;
pub(crate) mod lanes;
pub mod lengths;
pub mod noise;
pub mod npy;
pub mod perplexity;
pub mod plot;
mod positions;
mod report;
mod score;
mod sequences;
pub mod tasks;

pub use context::{Context, Segment};
pub use corpus::{Corpus, Texts};
pub use evaluate::{
    DocumentScore, EvalOptions, Measurement, PerByte, Prediction, evaluate, evaluate_each,
};
pub use lanes::Lanes;
pub use positions::{PositionScore, Positions};
pub use report::{DocumentReport, Report};
pub use score::Score;
pub(crate) use sequences::score_sequences_while;
pub use sequences::{ByteLogProb, ByteScore, SequenceScore, score_sequences};
