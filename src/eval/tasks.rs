//! Zero-shot tasks scored by likelihood, as lm-evaluation-harness scores them.
//!
//! A task is a file of JSON lines in one of the three layouts of llm-foundry's in-context tasks:
//!
//! | keys of a line | kind | what is compared |
//! | --- | --- | --- |
//! | `query`, `choices`, `gold` | multiple choice | log P(choice \| query) over the choices |
//! | `context_options`, `continuation`, `gold` | schema | log P(continuation \| context) over the contexts |
//! | `context`, `continuation` | last word | log P(continuation \| context), and whether it is what greedy decoding gives |
//!
//! What follows is joined with one space; a query that begins with `Question: ` is first answered
//! for with a line `Answer:`, as the harness does for ARC and PIQA.

use std::path::Path;

use burn::tensor::Device;
use mambabyte_datasets::Progress;
use serde::Serialize;
use serde_json::{Map, Value};

use super::lanes::Lanes;
use super::sequences::{SequenceScore, score_sequences};
use crate::error::{Error, Result};
use crate::model::MambaLm;

/// Sequences scored in one go; between them progress is shown.
const BATCH: usize = 256;

/// One line of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// One of several answers.
    Choice {
        /// What is asked.
        query: String,
        /// The answers.
        choices: Vec<String>,
        /// Index of the right one.
        gold: usize,
    },
    /// One of several beginnings of the same end.
    Schema {
        /// The beginnings.
        context_options: Vec<String>,
        /// The end.
        continuation: String,
        /// Index of the right one.
        gold: usize,
    },
    /// The last word of a text.
    LastWord {
        /// The text before it.
        context: String,
        /// The word.
        continuation: String,
    },
}

/// A text to score: what comes after `context`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pair {
    context: String,
    continuation: String,
}

impl Pair {
    /// Spaces at the end of a context belong to what follows, as in the harness.
    fn new(context: &str, continuation: &str) -> Self {
        let kept = context.trim_end().len();
        Self {
            context: context[..kept].to_owned(),
            continuation: format!("{}{continuation}", &context[kept..]),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        format!("{}{}", self.context, self.continuation).into_bytes()
    }
}

/// The keys of each kind of item; a line is of the first kind that it has all keys of.
const LAYOUTS: [&[&str]; 3] = [
    &["query", "choices", "gold"],
    &["context_options", "continuation", "gold"],
    &["context", "continuation"],
];

impl Item {
    /// The item in a line of JSON; an error says what is wrong with the line.
    fn parse(line: &str) -> Result<Self, String> {
        let value = serde_json::from_str(line);
        let value: Value = value.map_err(|error| format!("is not JSON: {error}"))?;
        let Value::Object(fields) = value else {
            return Err(format!("is {}, expected an object", shortened(&value)));
        };
        let has = |key: &&&str| fields.contains_key(**key);
        // The kind that is meant: of equals the first.
        let keys = LAYOUTS
            .iter()
            .rev()
            .max_by_key(|keys| {
                let there = keys.iter().filter(has).count();
                (there == keys.len(), there)
            })
            .copied()
            .unwrap_or_default();
        let (there, missing): (Vec<&str>, Vec<&str>) = keys.iter().partition(|key| has(key));
        if there.is_empty() {
            return Err("has none of the keys of an item".to_owned());
        }
        if !missing.is_empty() {
            let (there, missing) = (there.join("` and `"), missing.join("` and `"));
            return Err(format!("has `{there}`, and no `{missing}`"));
        }
        Ok(match keys[0] {
            "query" => Self::Choice {
                query: text(&fields, "query")?,
                choices: texts(&fields, "choices")?,
                gold: index(&fields, "gold")?,
            },
            "context_options" => Self::Schema {
                context_options: texts(&fields, "context_options")?,
                continuation: text(&fields, "continuation")?,
                gold: index(&fields, "gold")?,
            },
            _ => Self::LastWord {
                context: text(&fields, "context")?,
                continuation: text(&fields, "continuation")?,
            },
        })
    }

    /// The texts whose likelihoods decide.
    fn pairs(&self) -> Vec<Pair> {
        match self {
            Self::Choice { query, choices, .. } => {
                let context = match query.starts_with("Question: ") {
                    true => format!("{query}\nAnswer:"),
                    false => query.clone(),
                };
                let pair = |choice: &String| Pair::new(&context, &format!(" {choice}"));
                choices.iter().map(pair).collect()
            }
            Self::Schema {
                context_options,
                continuation,
                ..
            } => {
                let pair = |context: &String| Pair::new(context, &format!(" {continuation}"));
                context_options.iter().map(pair).collect()
            }
            Self::LastWord {
                context,
                continuation,
            } => vec![Pair::new(context, &format!(" {continuation}"))],
        }
    }

    /// Whether the item can be scored at all.
    fn check(&self) -> Result<(), String> {
        let (options, gold) = match self {
            Self::Choice { choices, gold, .. } => (choices.len(), *gold),
            Self::Schema {
                context_options,
                gold,
                ..
            } => (context_options.len(), *gold),
            Self::LastWord { .. } => (1, 0),
        };
        if gold >= options {
            return Err(format!("`gold` is {gold}, and there are {options} options"));
        }
        match self.pairs().iter().any(|pair| pair.context.is_empty()) {
            true => Err("a context is empty".to_owned()),
            false => Ok(()),
        }
    }
}

fn text(fields: &Map<String, Value>, key: &str) -> Result<String, String> {
    let text = fields[key].as_str().map(str::to_owned);
    text.ok_or_else(|| unlike(fields, key, "a text"))
}

fn texts(fields: &Map<String, Value>, key: &str) -> Result<Vec<String>, String> {
    let list = fields[key].as_array();
    list.and_then(|list| {
        list.iter()
            .map(|it| it.as_str().map(str::to_owned))
            .collect()
    })
    .ok_or_else(|| unlike(fields, key, "a list of texts"))
}

fn index(fields: &Map<String, Value>, key: &str) -> Result<usize, String> {
    let number = fields[key].as_u64().and_then(|it| it.try_into().ok());
    number.ok_or_else(|| unlike(fields, key, "an index from 0"))
}

fn unlike(fields: &Map<String, Value>, key: &str, expected: &str) -> String {
    format!(
        "`{key}` is {}, expected {expected}",
        shortened(&fields[key])
    )
}

/// The beginning of a value's JSON.
fn shortened(value: &Value) -> String {
    const MOST: usize = 40;
    let text = value.to_string();
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// A named list of items of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// The file's name without its ending.
    pub name: String,
    /// The items.
    pub items: Vec<Item>,
}

impl Task {
    /// Reads a file of JSON lines.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] where it does not exist, [`Error::Io`] where it cannot be read,
    /// [`Error::Usage`] naming the first line that is no item, or not of the kind of the first.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::unreadable(path))?;
        let mut items: Vec<Item> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            let problem = |what: String| Error::Usage {
                message: format!("`{}`, line {}: {what}", path.display(), index + 1),
                hint: "a line has `query`, `choices` and `gold`, or `context_options`, \
                       `continuation` and `gold`, or `context` and `continuation`"
                    .to_owned(),
            };
            let item = Item::parse(line).map_err(problem)?;
            item.check().map_err(problem)?;
            if let Some(first) = items.first()
                && std::mem::discriminant(first) != std::mem::discriminant(&item)
            {
                return Err(problem("another layout than the lines before".to_owned()));
            }
            items.push(item);
        }
        if items.is_empty() {
            return Err(Error::Usage {
                message: format!("`{}` has no items", path.display()),
                hint: "give a file of JSON lines".to_owned(),
            });
        }
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        Ok(Self {
            name: name.into_owned(),
            items,
        })
    }
}

/// A share of items, and how far it may be off.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Share {
    /// The share, 0 to 1.
    pub value: f64,
    /// Its standard error.
    pub stderr: f64,
}

impl Share {
    /// Of so many items, so many.
    fn of(hits: usize, count: usize) -> Self {
        let value = hits as f64 / count.max(1) as f64;
        // Of a sample, as the harness computes it.
        let variance = value * (1.0 - value) / (count.saturating_sub(1)).max(1) as f64;
        Self {
            value,
            stderr: variance.sqrt(),
        }
    }
}

/// The scores of a task.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskScore {
    /// The task.
    pub name: String,
    /// Items scored.
    pub items: usize,
    /// Share of items whose likeliest option is the right one; for last words, of those that greedy
    /// decoding gives.
    pub acc: Share,
    /// The same with log-probabilities divided by the option's length in characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acc_norm: Option<Share>,
    /// `exp` of the mean negative log-likelihood of the last words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// For each item the summed log-probability of each option.
    #[serde(skip)]
    pub log_probs: Vec<Vec<f64>>,
}

/// Scores the first `limit` items of a task, or all.
pub fn score_task(
    model: &MambaLm,
    device: &Device,
    lanes: Lanes,
    task: &Task,
    limit: Option<usize>,
    progress: &dyn Progress,
) -> Result<TaskScore> {
    let items = &task.items[..task.items.len().min(limit.unwrap_or(usize::MAX))];
    let pairs: Vec<Pair> = items.iter().flat_map(Item::pairs).collect();
    let texts: Vec<Vec<u8>> = pairs.iter().map(Pair::bytes).collect();
    progress.start(&task.name, texts.iter().map(|it| it.len() as u64).sum());
    // Long ones first: those beside each other then end together.
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.sort_by_key(|index| std::cmp::Reverse(texts[*index].len()));
    let mut likelihoods = vec![(0.0, false); texts.len()];
    for part in order.chunks(BATCH) {
        let sequences: Vec<&[u8]> = part.iter().map(|index| texts[*index].as_slice()).collect();
        let scores = score_sequences(model, device, lanes, &sequences, 1)?;
        for (index, score) in part.iter().zip(&scores) {
            let (sum, greedy) = likelihood(&pairs[*index], score);
            if sum.is_nan() {
                // It is larger than no other number, nor smaller: any option would be the likeliest.
                let text = String::from_utf8_lossy(&texts[*index]);
                return Err(Error::NotNumbers {
                    text: format!("`{}`, {text:?}", task.name),
                });
            }
            likelihoods[*index] = (sum, greedy);
            progress.advance(texts[*index].len() as u64);
        }
    }
    progress.finish();
    Ok(judge(task, items, &likelihoods))
}

/// Summed log-probability of a continuation, and whether each of its bytes is the likeliest.
fn likelihood(pair: &Pair, score: &SequenceScore) -> (f64, bool) {
    let bytes = &score.bytes[pair.context.len() - 1..];
    let sum = bytes.iter().map(|it| f64::from(it.log_prob)).sum();
    let greedy = bytes.iter().all(|it| it.log_prob == it.top[0].1);
    (sum, greedy)
}

/// The scores that follow from the likelihoods of all items' options, in order.
fn judge(task: &Task, items: &[Item], likelihoods: &[(f64, bool)]) -> TaskScore {
    let (mut hits, mut hits_norm, mut nats) = (0, 0, 0.0);
    let mut log_probs = Vec::with_capacity(items.len());
    let mut rest = likelihoods;
    for item in items {
        let (own, next) = rest.split_at(item.pairs().len());
        rest = next;
        let sums: Vec<f64> = own.iter().map(|(sum, _)| *sum).collect();
        match item {
            Item::Choice { choices, gold, .. } => {
                let characters =
                    |(sum, choice): (&f64, &String)| sum / choice.chars().count() as f64;
                let normed: Vec<f64> = sums.iter().zip(choices).map(characters).collect();
                hits += usize::from(best(&sums) == *gold);
                hits_norm += usize::from(best(&normed) == *gold);
            }
            Item::Schema { gold, .. } => hits += usize::from(best(&sums) == *gold),
            Item::LastWord { .. } => {
                hits += usize::from(own[0].1);
                nats -= sums[0];
            }
        }
        log_probs.push(sums);
    }
    let count = items.len();
    let kind = items.first();
    TaskScore {
        name: task.name.clone(),
        items: count,
        acc: Share::of(hits, count),
        acc_norm: matches!(kind, Some(Item::Choice { .. })).then(|| Share::of(hits_norm, count)),
        perplexity: matches!(kind, Some(Item::LastWord { .. }))
            .then(|| (nats / count as f64).exp()),
        log_probs,
    }
}

/// Index of the largest number; of equal ones the first.
fn best(numbers: &[f64]) -> usize {
    let mut best = 0;
    for (index, number) in numbers.iter().enumerate() {
        if *number > numbers[best] {
            best = index;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(lines: &str) -> Result<Task> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("some_task.jsonl");
        std::fs::write(&path, lines).expect("written");
        Task::read(&path)
    }

    #[test]
    fn contexts_and_continuations_are_joined_as_the_harness_does() {
        let pairs = |line: &str| -> Vec<(String, String)> {
            let task = task(line).expect("a task");
            let pair = |it: Pair| (it.context, it.continuation);
            task.items[0].pairs().into_iter().map(pair).collect()
        };
        let own = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(
            pairs(r#"{"query": "Question: q?", "choices": ["a", "b"], "gold": 1}"#),
            [
                own("Question: q?\nAnswer:", " a"),
                own("Question: q?\nAnswer:", " b")
            ]
        );
        assert_eq!(
            pairs(r#"{"query": "He ", "choices": ["goes."], "gold": 0}"#),
            [own("He", "  goes.")]
        );
        assert_eq!(
            pairs(r#"{"context_options": ["A", "B"], "continuation": "c", "gold": 0}"#),
            [own("A", " c"), own("B", " c")]
        );
        assert_eq!(
            pairs(r#"{"context": "the last", "continuation": "word"}"#),
            [own("the last", " word")]
        );
    }

    #[test]
    #[cfg(feature = "flex")]
    fn likelihoods_that_are_no_numbers_are_an_error() {
        let device = Device::flex();
        let mut config = crate::config::MambaConfig::new(8, 1);
        config.initializer_range = f64::NAN;
        let model = config.init_lm(1, &device);
        let task = task(r#"{"query": "q?", "choices": ["a", "b"], "gold": 1}"#).expect("a task");
        let lanes = Lanes {
            count: 2,
            positions: 64,
        };
        let progress = mambabyte_datasets::progress::Silent;
        let error = score_task(&model, &device, lanes, &task, None, &progress)
            .expect_err("no numbers")
            .to_string();
        assert!(error.contains("are not numbers"), "{error}");
    }

    #[test]
    fn bad_lines_are_named() {
        let good = r#"{"context": "a", "continuation": "b"}"#;
        for (lines, words) in [
            ("".to_owned(), "no items"),
            (format!("{good}\n{{\"context\": 1}}"), "line 2"),
            (
                format!("{good}\n{{\"context\": \"\", \"continuation\": \"b\"}}"),
                "context is empty",
            ),
            (
                r#"{"query": "q", "choices": ["a"], "gold": 1}"#.to_owned(),
                "`gold` is 1",
            ),
            (
                format!(
                    "{good}\n{}",
                    r#"{"query": "q", "choices": ["a"], "gold": 0}"#
                ),
                "another layout",
            ),
            ("[1".to_owned(), "line 1: is not JSON: EOF while parsing"),
            ("[1]".to_owned(), "line 1: is [1], expected an object"),
            ("{\"question\": 1}".to_owned(), "none of the keys"),
            (
                r#"{"query": "x"}"#.to_owned(),
                "has `query`, and no `choices` and `gold`",
            ),
            (
                r#"{"continuation": "c", "gold": 0}"#.to_owned(),
                "has `continuation` and `gold`, and no `context_options`",
            ),
            (
                r#"{"query": "q", "choices": ["a", 1], "gold": 0}"#.to_owned(),
                "`choices` is [\"a\",1], expected a list of texts",
            ),
            (
                r#"{"query": "q", "choices": ["a"], "gold": -1}"#.to_owned(),
                "`gold` is -1, expected an index from 0",
            ),
        ] {
            let error = task(&lines).expect_err(&lines);
            assert!(error.to_string().contains(words), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }

    #[test]
    fn scores_follow_from_likelihoods() {
        let lines = r#"{"query": "q", "choices": ["long answer", "no"], "gold": 0}
{"query": "q", "choices": ["x", "y"], "gold": 1}"#;
        let choice = task(lines).expect("a task");
        // Summed, the short answer of the first item wins; by the character the long one does.
        let likelihoods = [(-6.0, false), (-4.0, false), (-3.0, false), (-2.0, true)];
        let score = judge(&choice, &choice.items, &likelihoods);
        assert_eq!(score.acc.value, 0.5);
        assert_eq!(score.acc_norm.expect("of choices").value, 1.0);
        assert_eq!(score.perplexity, None);
        assert!((score.acc.stderr - 0.5).abs() < 1e-12);
        assert_eq!(score.log_probs, [[-6.0, -4.0], [-3.0, -2.0]]);

        let words = task(
            "{\"context\": \"a\", \"continuation\": \"b\"}\n{\"context\": \"c\", \"continuation\": \"d\"}",
        )
        .expect("a task");
        let score = judge(&words, &words.items, &[(-1.0, true), (-3.0, false)]);
        assert_eq!(score.acc.value, 0.5);
        assert!((score.perplexity.expect("of words") - 2f64.exp()).abs() < 1e-12);
        assert_eq!(best(&[-1.0, -1.0]), 0);
    }
}
