//! What a checkpoint's own config says of the model: `config.json` of mamba_ssm and of
//! transformers, and the YAML of MambaByte's authors.
//!
//! Everything is optional: what a config leaves open follows from the tensors.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::source::unreadable;
use super::{listed, shown};
use crate::error::{Error, Result};

/// Name of the config in either form.
pub(crate) const CONFIG: &str = "config.json";
/// Largest config that is read.
const MOST_BYTES: u64 = 1 << 20;

/// Sizes and switches that a config names.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Described {
    pub(super) width: Option<usize>,
    pub(super) layers: Option<usize>,
    pub(super) vocabulary: Option<usize>,
    pub(super) vocabulary_multiple: Option<usize>,
    pub(super) state: Option<usize>,
    pub(super) taps: Option<usize>,
    pub(super) expand: Option<usize>,
    pub(super) rank: Option<usize>,
    pub(super) bias: Option<bool>,
    pub(super) conv_bias: Option<bool>,
    pub(super) rms_norm: Option<bool>,
    pub(super) tied: Option<bool>,
    pub(super) epsilon: Option<f64>,
    pub(super) residual_in_fp32: Option<bool>,
    /// The number of layers is a wish: released weights have others than the authors' YAML.
    pub(super) layers_may_differ: bool,
}

/// The config of the checkpoint at `path`, a file or a folder: beside the weights, or `given`.
pub(super) fn find(path: &Path, given: Option<&Path>) -> Result<Option<PathBuf>> {
    if let Some(given) = given {
        return Ok(Some(given.to_owned()));
    }
    let folder = match path.is_dir() {
        true => path,
        false => path.parent().unwrap_or(Path::new(".")),
    };
    let json = folder.join(CONFIG);
    if json.is_file() {
        return Ok(Some(json));
    }
    let mut found = Vec::new();
    let folder = match folder.as_os_str().is_empty() {
        true => Path::new("."),
        false => folder,
    };
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let file = entry.map_err(Error::io("read", folder))?.path();
        if is_yaml(&file) && file.is_file() {
            found.push(file);
        }
    }
    // Of several nobody knows which is meant.
    Ok((found.len() == 1).then(|| found.remove(0)))
}

fn is_yaml(path: &Path) -> bool {
    path.extension()
        .is_some_and(|ending| ending == "yml" || ending == "yaml")
}

/// That a config is one of a model that can be had here.
#[cfg(feature = "hub")]
pub(crate) fn check_config(path: &Path) -> Result<()> {
    read(path, None).map(|_| ())
}

/// Reads a config. `width` chooses among the sizes of a YAML that has several.
pub(super) fn read(path: &Path, width: Option<usize>) -> Result<Described> {
    let length = fs::metadata(path).map_err(Error::io("read", path))?.len();
    if length > MOST_BYTES {
        return Err(unreadable(
            path,
            format!("has {length} bytes, more than a config has"),
        ));
    }
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    let described = match is_yaml(path) {
        true => yaml(&bytes, width),
        false => json(&bytes),
    };
    described.map_err(|problem| unreadable(path, problem))
}

/// Reads `config.json` in either form.
pub(super) fn json(bytes: &[u8]) -> Result<Described, String> {
    let value: Value =
        serde_json::from_slice(bytes).map_err(|e| format!("is not a config in JSON: {e}"))?;
    let Value::Object(map) = value else {
        return Err("is not a config: it is no object with keys".to_owned());
    };
    if is_mamba2(&map) {
        return Err(
            "describes a Mamba-2 model, and this program has Mamba-1: the names of the \
                    supported ones begin with `mamba-`, not `mamba2-`"
                .to_owned(),
        );
    }
    let mut fields = Fields::new(&map);
    let described = match map.contains_key("hidden_size") {
        true => transformers(&mut fields),
        false => mamba_ssm(&mut fields),
    };
    fields.finish(described)
}

fn is_mamba2(map: &Map<String, Value>) -> bool {
    let two = |value: Option<&Value>| {
        value
            .and_then(Value::as_str)
            .is_some_and(|name| name.to_ascii_lowercase().contains("mamba2"))
    };
    let architectures = map.get("architectures").and_then(Value::as_array);
    two(map.get("model_type"))
        || two(map.get("ssm_cfg").and_then(|ssm| ssm.get("layer")))
        || architectures.is_some_and(|names| names.iter().any(|name| two(Some(name))))
}

/// The keys of mamba_ssm's `MambaConfig`, and in `ssm_cfg` the arguments of its `Mamba`.
fn mamba_ssm(fields: &mut Fields<'_>) -> Described {
    fields.must_be_empty("attn_layer_idx", "attention layers");
    if fields.size("d_intermediate").is_some_and(|size| size > 0) {
        fields.reject("d_intermediate", "0: blocks with an MLP are not supported");
    }
    let mut described = Described {
        width: fields.size("d_model"),
        layers: fields.size("n_layer"),
        vocabulary: fields.size("vocab_size"),
        // What mamba_ssm takes where the key is missing.
        vocabulary_multiple: fields.size("pad_vocab_size_multiple").or(Some(8)),
        rms_norm: fields.switch("rms_norm"),
        tied: fields.switch("tie_embeddings"),
        residual_in_fp32: fields.switch("residual_in_fp32"),
        ..Described::default()
    };
    if described.vocabulary.is_none() {
        described.vocabulary_multiple = None;
    }
    if let Some(ssm) = fields.section("ssm_cfg") {
        let mut inner = Fields::new(ssm);
        described.state = inner.size("d_state");
        described.taps = inner.size("d_conv");
        described.expand = inner.size("expand");
        described.rank = inner.size_or_auto("dt_rank");
        described.bias = inner.switch("bias");
        described.conv_bias = inner.switch("conv_bias");
        fields.problems.append(&mut inner.problems);
    }
    described
}

/// The keys of transformers' `MambaConfig`.
fn transformers(fields: &mut Fields<'_>) -> Described {
    match fields.map.get("hidden_act").and_then(Value::as_str) {
        None | Some("silu" | "swish") => {}
        Some(_) => fields.reject("hidden_act", "\"silu\""),
    }
    let width = fields.size("hidden_size");
    let mut expand = fields.size("expand");
    if let (Some(width @ 1..), Some(inner)) = (width, fields.size("intermediate_size")) {
        // The inner width is what the tensors have; where both are given they agree.
        match (inner % width, expand) {
            (0, None) => expand = Some(inner / width),
            (0, Some(expand)) if expand == inner / width => {}
            _ => fields.reject("intermediate_size", "`expand` times `hidden_size`"),
        }
    }
    Described {
        width,
        expand,
        layers: fields
            .size("num_hidden_layers")
            .or_else(|| fields.size("n_layer")),
        vocabulary: fields.size("vocab_size"),
        vocabulary_multiple: fields.size("pad_vocab_size_multiple").or(Some(1)),
        state: fields.size("state_size"),
        taps: fields.size("conv_kernel"),
        rank: fields.size_or_auto("time_step_rank"),
        bias: fields.switch("use_bias"),
        conv_bias: fields.switch("use_conv_bias"),
        // There is no other norm in it.
        rms_norm: None,
        tied: fields.switch("tie_word_embeddings"),
        epsilon: fields.number("layer_norm_epsilon"),
        residual_in_fp32: fields.switch("residual_in_fp32"),
        layers_may_differ: false,
    }
}

/// Typed access to the keys of an object; all problems are kept.
struct Fields<'a> {
    map: &'a Map<String, Value>,
    problems: Vec<String>,
}

impl<'a> Fields<'a> {
    fn new(map: &'a Map<String, Value>) -> Self {
        Self {
            map,
            problems: Vec::new(),
        }
    }

    fn reject(&mut self, key: &str, expected: &str) {
        let got = self.map.get(key).map_or_else(String::new, Value::to_string);
        self.problems
            .push(format!("`{key}` is {}, expected {expected}", shown(&got)));
    }

    /// A key's value through `read`; a missing key or `null` is none.
    fn value<T>(
        &mut self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Option<T> {
        let value = self.map.get(key).filter(|value| !value.is_null())?;
        let read = read(value);
        if read.is_none() {
            self.reject(key, expected);
        }
        read
    }

    fn size(&mut self, key: &str) -> Option<usize> {
        self.value(key, "an integer from 0 to 2^31", whole)
    }

    fn size_or_auto(&mut self, key: &str) -> Option<usize> {
        self.value(key, "an integer or \"auto\"", |value| match value {
            Value::String(word) if word == "auto" => Some(None),
            value => whole(value).map(Some),
        })
        .flatten()
    }

    fn switch(&mut self, key: &str) -> Option<bool> {
        self.value(key, "true or false", Value::as_bool)
    }

    fn number(&mut self, key: &str) -> Option<f64> {
        self.value(key, "a number", Value::as_f64)
    }

    fn section(&mut self, key: &str) -> Option<&'a Map<String, Value>> {
        self.value(key, "an object", Value::as_object)
    }

    fn must_be_empty(&mut self, key: &str, what: &str) {
        let list = self.value(key, "a list", Value::as_array);
        if list.is_some_and(|list| !list.is_empty()) {
            self.reject(key, &format!("[]: {what} are not supported"));
        }
    }

    fn finish(self, described: Described) -> Result<Described, String> {
        match self.problems.is_empty() {
            true => Ok(described),
            false => Err(format!("cannot be used:{}", listed(&self.problems))),
        }
    }
}

fn whole(value: &Value) -> Option<usize> {
    let number = value.as_u64().filter(|number| *number <= 1 << 31)?;
    usize::try_from(number).ok()
}

/// Reads the authors' YAML: nested keys with plain values, the sizes of a model below a key of
/// their own, and what is common to all sizes below `common`.
///
/// ```yaml
/// model:
///   common:
///     vocab_size: 256
///   353M:
///     d_model: 1024
/// ```
pub(super) fn yaml(bytes: &[u8], width: Option<usize>) -> Result<Described, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "is not UTF-8")?;
    let mut common = Map::new();
    let mut sizes: Vec<(String, Map<String, Value>)> = Vec::new();
    for (path, value) in yaml_entries(text)? {
        match path.as_slice() {
            ["model", "common", key] => {
                common.insert((*key).to_owned(), value);
            }
            ["model", size, key] => {
                if sizes.last().is_none_or(|(name, _)| name != size) {
                    sizes.push(((*size).to_owned(), Map::new()));
                }
                if let Some((_, map)) = sizes.last_mut() {
                    map.insert((*key).to_owned(), value);
                }
            }
            _ => {}
        }
    }
    let fits =
        |map: &Map<String, Value>| width.is_none() || map.get("d_model").and_then(whole) == width;
    let names: Vec<String> = sizes.iter().map(|(name, _)| shown(name)).collect();
    let chosen = sizes.into_iter().find(|(_, map)| fits(map));
    let Some((_, size)) = chosen else {
        return Err(format!(
            "has no size of the weights' width {}; it has {}",
            width.unwrap_or_default(),
            listed(&names)
        ));
    };
    common.extend(size);
    let mut fields = Fields::new(&common);
    let described = Described {
        width: fields.size("d_model"),
        layers: fields.size("num_layers"),
        vocabulary: fields.size("vocab_size"),
        vocabulary_multiple: Some(1),
        state: fields.size("d_state"),
        taps: fields.size("d_conv"),
        expand: fields.size("expand"),
        epsilon: fields.number("norm_eps"),
        layers_may_differ: true,
        ..Described::default()
    };
    fields.finish(described)
}

/// Every `key: value` of a document with the keys it is below.
fn yaml_entries(text: &str) -> Result<Vec<(Vec<&str>, Value)>, String> {
    const DEEPEST: usize = 8;
    let mut above: Vec<(usize, &str)> = Vec::new();
    let mut entries = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let content = match line.split_once('#') {
            Some((content, _)) => content.trim_end(),
            None => line.trim_end(),
        };
        let trimmed = content.trim_start();
        if trimmed.is_empty() || trimmed == "---" {
            continue;
        }
        let problem = || format!("has in line {} what is not `key: value`", number + 1);
        let (key, value) = trimmed.split_once(':').ok_or_else(problem)?;
        let indent = content.len() - trimmed.len();
        while above.last().is_some_and(|(outer, _)| *outer >= indent) {
            above.pop();
        }
        let key = key.trim().trim_matches(['"', '\'']);
        let value = value.trim();
        if !value.is_empty() {
            let path = above.iter().map(|(_, key)| *key).chain([key]).collect();
            entries.push((path, yaml_value(value)));
        } else if above.len() < DEEPEST {
            above.push((indent, key));
        } else {
            return Err(problem());
        }
    }
    Ok(entries)
}

/// A plain value: as in JSON where it is one, otherwise text.
fn yaml_value(text: &str) -> Value {
    let text = text.trim_matches(['"', '\'']);
    serde_json::from_str(text)
        .ok()
        .filter(|value: &Value| !value.is_object() && !value.is_array())
        .unwrap_or_else(|| Value::String(text.to_owned()))
}
