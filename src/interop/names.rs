//! Names and layouts of parameters: ours, and those of mamba_ssm and its relatives.
//!
//! | here | mamba_ssm | others |
//! | --- | --- | --- |
//! | `embedding.weight` | `backbone.embedding.weight` | `backbone.embeddings.weight` (transformers), `mambabyte.token_embedding.weight` |
//! | `backbone.layers.0.mixer.a_log` | `backbone.layers.0.mixer.A_log` | |
//! | `backbone.layers.0.mixer.d` | `backbone.layers.0.mixer.D` | |
//! | `backbone.norm_f.weight` | the same | `mambabyte.final_norm.weight` |
//! | `lm_head.weight` | the same | |
//!
//! A linear layer's weight is `[in, out]` here and `[out, in]` there; a convolution's is `[E, K]`
//! here and `[E, 1, K]` there.

use super::tensor::transposed;

/// Parts of a path that wrappers add: of `torch.nn.DataParallel`, `torch.compile`, FSDP, Lightning.
const WRAPPERS: [&str; 5] = [
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_forward_module",
    "model",
];

/// Our name of the parameter that is called `foreign` elsewhere, if it is one of the model's.
pub(super) fn ours(foreign: &str) -> Option<String> {
    let mut parts: Vec<&str> = foreign
        .split('.')
        .filter(|part| !WRAPPERS.contains(part))
        .collect();
    if parts
        .first()
        .is_some_and(|first| ["backbone", "mambabyte"].contains(first))
    {
        parts.remove(0);
    }
    match parts[..] {
        ["embedding" | "embeddings" | "token_embedding", "weight"] => {
            Some("embedding.weight".to_owned())
        }
        ["norm_f" | "final_norm", part @ ("weight" | "bias")] => {
            Some(format!("backbone.norm_f.{part}"))
        }
        ["lm_head", "weight"] => Some("lm_head.weight".to_owned()),
        ["layers", layer, ref rest @ ..] => {
            let layer: usize = layer.parse().ok()?;
            let rest = match rest.join(".").as_str() {
                "mixer.A_log" => "mixer.a_log".to_owned(),
                "mixer.D" => "mixer.d".to_owned(),
                other => other.to_owned(),
            };
            Some(format!("backbone.layers.{layer}.{rest}"))
        }
        _ => None,
    }
}

/// The layer and the rest of one of our names.
pub(super) fn layer_of(ours: &str) -> Option<(usize, &str)> {
    let (layer, rest) = ours.strip_prefix("backbone.layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}

/// mamba_ssm's name of one of our parameters.
pub(super) fn mamba_ssm(ours: &str) -> String {
    match ours {
        "embedding.weight" => "backbone.embedding.weight".to_owned(),
        name => match name
            .strip_suffix("mixer.a_log")
            .map(|layer| (layer, "mixer.A_log"))
            .or_else(|| name.strip_suffix("mixer.d").map(|layer| (layer, "mixer.D")))
        {
            Some((layer, renamed)) => format!("{layer}{renamed}"),
            None => name.to_owned(),
        },
    }
}

/// transformers' name of one of our parameters.
pub(super) fn transformers(ours: &str) -> String {
    match ours {
        "embedding.weight" => "backbone.embeddings.weight".to_owned(),
        name => mamba_ssm(name),
    }
}

/// How a parameter's elements are ordered elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    Same,
    /// A linear layer's weight.
    Transposed,
    /// A convolution's weight, with a dimension more.
    Convolution,
}

fn layout(ours: &str) -> Layout {
    const LINEAR: [&str; 5] = [
        "in_proj.weight",
        "x_proj.weight",
        "dt_proj.weight",
        "out_proj.weight",
        "lm_head.weight",
    ];
    if LINEAR.iter().any(|name| ours.ends_with(name)) {
        Layout::Transposed
    } else if ours.ends_with("conv1d.weight") {
        Layout::Convolution
    } else {
        Layout::Same
    }
}

/// The shape elsewhere of our parameter `ours` of `shape`.
pub(super) fn foreign_shape(ours: &str, shape: &[usize]) -> Vec<usize> {
    match (layout(ours), shape) {
        (Layout::Transposed, [input, output]) => vec![*output, *input],
        (Layout::Convolution, [channels, taps]) => vec![*channels, 1, *taps],
        (_, shape) => shape.to_vec(),
    }
}

/// Values that have `shape` in one program, in the order of the other: the way there and the way
/// back are the same.
pub(super) fn reordered(ours: &str, shape: &[usize], values: Vec<f32>) -> Vec<f32> {
    match (layout(ours), shape) {
        (Layout::Transposed, [_, columns]) => transposed(&values, *columns),
        _ => values,
    }
}
