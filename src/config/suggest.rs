//! "Did you mean" for keys and names.

/// Names of settings in other programs, and what they are called here.
const ALIASES: [(&str, &str); 22] = [
    ("accumulation_steps", "train.accumulation"),
    ("batch_size", "train.batch"),
    ("checkpoint_every", "checkpoint.every_steps"),
    ("context_length", "train.length"),
    ("d_model", "model.dim"),
    ("dtype", "train.precision"),
    ("expand", "model.expand_factor"),
    ("grad_clip", "optimizer.clip"),
    ("gradient_accumulation_steps", "train.accumulation"),
    ("gradient_checkpointing", "train.recompute"),
    ("learning_rate", "optimizer.lr"),
    ("max_grad_norm", "optimizer.clip"),
    ("max_lr", "optimizer.lr"),
    ("max_steps", "train.steps"),
    ("n_layer", "model.depth"),
    ("n_layers", "model.depth"),
    ("num_layers", "model.depth"),
    ("save_every", "checkpoint.every_steps"),
    ("seq_len", "train.length"),
    ("sequence_length", "train.length"),
    ("warmup", "optimizer.warmup_steps"),
    ("wd", "optimizer.weight_decay"),
];

/// The candidate that `name` is most likely a misspelling of.
pub(super) fn nearest<'a>(
    name: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let tolerated = match name.chars().count() {
        // One letter of so few says too much: "gpu" is not meant as "cpu".
        ..4 => 0,
        count => count / 3,
    };
    candidates
        .into_iter()
        .map(|candidate| (distance(name, candidate), candidate))
        .filter(|&(distance, _)| distance <= tolerated)
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, candidate)| candidate)
}

/// Advice for a section that does not exist.
pub(super) fn section(name: &str, sections: &[&str]) -> String {
    match nearest(name, sections.iter().copied()) {
        Some(section) => format!("did you mean `[{section}]`?"),
        None => format!("the sections are {}", sections.join(", ")),
    }
}

/// Advice for a key that its section does not have.
pub(super) fn key(section: &str, key: &str, known: &[(&str, &str)]) -> String {
    let here = known.iter().filter(|(its, _)| *its == section);
    if let Some(elsewhere) = known.iter().find(|(_, its)| *its == key) {
        return format!("it belongs to `[{}]`", elsewhere.0);
    }
    if let Some(key) = nearest(key, here.clone().map(|(_, key)| *key)) {
        return format!("did you mean `{section}.{key}`?");
    }
    if let Some(path) = alias(key) {
        return format!("did you mean `{path}`?");
    }
    let keys: Vec<&str> = here.map(|(_, key)| *key).collect();
    format!("the keys of `[{section}]` are {}", keys.join(", "))
}

/// Advice for a key that stands above the first section.
pub(super) fn place_of_key(key: &str) -> String {
    match alias(key) {
        Some(path) => format!("did you mean `{path}`?"),
        None => "every key belongs to a section, for instance `[train]`".to_owned(),
    }
}

fn alias(key: &str) -> Option<&'static str> {
    ALIASES
        .iter()
        .find(|(alias, _)| *alias == key)
        .map(|&(_, path)| path)
}

/// Insertions, deletions, replacements and swaps of neighbours that turn `a` into `b`.
fn distance(a: &str, b: &str) -> usize {
    // Whatever is longer than any key is no misspelling of one.
    const LONGEST: usize = 64;
    let a: Vec<char> = a.chars().take(LONGEST).collect();
    let b: Vec<char> = b.chars().take(LONGEST).collect();
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut least = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_edits() {
        for (a, b, edits) in [
            ("steps", "steps", 0),
            ("stpes", "steps", 1),
            ("", "abc", 3),
            ("lenght", "length", 1),
        ] {
            assert_eq!(distance(a, b), edits, "{a} {b}");
            assert_eq!(distance(b, a), edits, "{b} {a}");
        }
    }

    #[test]
    fn nearest_needs_a_resemblance() {
        assert_eq!(nearest("lenth", ["length", "batch"]), Some("length"));
        assert_eq!(nearest("colour", ["length", "batch"]), None);
        assert_eq!(nearest("gpu", ["cpu", "cuda"]), None);
    }
}
