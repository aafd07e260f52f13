//! A checkpoint of another program as one of ours.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Device;
use mambabyte_datasets::Progress;

use super::config::{self, Described};
use super::names::{foreign_shape, layer_of, ours, reordered};
use super::safetensors::{self, Outgoing};
use super::source::{Source, unreadable};
use super::tensor::{Format, Stored};
use super::{listed, shown};
use crate::config::{DtRank, MambaConfig, Norm};
use crate::error::Result;
use crate::model::MambaLm;
use crate::train::parameters;

/// A checkpoint that was found to be a Mamba-1 language model, and is not read yet.
#[derive(Debug)]
pub struct Import {
    /// The model that the tensors make up.
    pub config: MambaConfig,
    /// What config and tensors do not agree about, and was decided by the tensors.
    pub warnings: Vec<String>,
    source: Source,
    /// By our name.
    tensors: BTreeMap<String, usize>,
}

impl Import {
    /// Opens the checkpoint at `path`, a file or a folder, with the config beside it or `given`.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`](crate::error::Error::Checkpoint); where tensors are missing, surplus or of another shape, one that lists
    /// all of them.
    pub fn open(path: &Path, given: Option<&Path>) -> Result<Self> {
        let source = Source::open(path)?;
        let problem = |reason: String| unreadable(&source.path, reason);
        let (mut tensors, mut problems) = by_our_names(&source);
        if tensors.keys().any(|name| is_mamba2(name)) {
            return Err(problem(
                "has the tensors of a Mamba-2 model, and this program has Mamba-1".to_owned(),
            ));
        }
        let shape = |name: &str| {
            tensors
                .get(name)
                .map(|i| source.tensors[*i].shape.as_slice())
        };
        let width = match shape("embedding.weight") {
            Some([_, width]) => Some(*width),
            _ => None,
        };
        let described = match config::find(path, given)? {
            Some(file) => config::read(&file, width)?,
            None => Described::default(),
        };
        let mut warnings = Vec::new();
        let found = Found::new(&tensors, &source.tensors);
        let config = found
            .model(&described, &mut warnings)
            .map_err(|reason| problem(reason + &listed(&problems)))?;
        config.validate().map_err(|errors| {
            problem(format!(
                "is of a model that this program cannot have: {errors}"
            ))
        })?;
        if config.tie_embeddings {
            // The head is stored once more where the program that wrote it shares it.
            tensors.remove("lm_head.weight");
        }
        problems.extend(compare(&config, &tensors, &source.tensors));
        if !problems.is_empty() {
            let reason = format!("does not fit the model:{}", listed(&problems));
            return Err(problem(reason));
        }
        let import = Self {
            config,
            warnings,
            source,
            tensors,
        };
        import.check_size()?;
        import.check_tied()?;
        Ok(import)
    }

    /// Bytes of the checkpoint's files.
    pub fn bytes(&self) -> u64 {
        self.source.bytes()
    }

    /// The model with the checkpoint's weights, on `device`.
    ///
    /// # Errors
    ///
    /// Where a file cannot be read any more.
    pub fn model(&self, device: &Device) -> Result<MambaLm> {
        let model = self.config.empty_lm(device);
        // Weights stay, so they do not belong between activations.
        device.memory_persistent_allocations(model, |model| {
            parameters::replace(model, |name| {
                Ok(parameters::row(self.values(name)?, device))
            })
        })
    }

    /// The values of one of our parameters, in our order.
    fn values(&self, name: &str) -> Result<Vec<f32>> {
        let stored = &self.source.tensors[self.tensors[name]];
        let values = self.source.values(stored)?;
        Ok(reordered(name, &stored.shape, values))
    }

    /// Writes the weights as a file of ours, one tensor at a time. `progress` is in bytes of it.
    pub fn write(&self, path: &Path, progress: &dyn Progress) -> Result<()> {
        let table = self.config.parameter_table();
        let outgoing: Vec<Outgoing<'_>> = table
            .into_iter()
            .map(|parameter| {
                let name = parameter.name.clone();
                Outgoing {
                    name: parameter.name,
                    shape: parameter.shape,
                    values: Box::new(move || {
                        let values = self.values(&name)?;
                        progress.advance(4 * values.len() as u64);
                        Ok(values)
                    }),
                }
            })
            .collect();
        progress.start("import", outgoing.iter().map(Outgoing::bytes).sum());
        let result = safetensors::write(path, &outgoing);
        progress.finish();
        result
    }

    /// That a small file does not stand for a huge model by naming the same bytes many times.
    fn check_size(&self) -> Result<()> {
        let sum: u64 = self
            .tensors
            .values()
            .map(|i| self.source.tensors[*i].bytes())
            .fold(0, u64::saturating_add);
        match sum > 2 * self.source.bytes() {
            true => Err(unreadable(
                &self.source.path,
                format!(
                    "has tensors of {sum} bytes in {} bytes",
                    self.source.bytes()
                ),
            )),
            false => Ok(()),
        }
    }

    /// That a head which is stored although it is tied is the embedding.
    fn check_tied(&self) -> Result<()> {
        if !self.config.tie_embeddings {
            return Ok(());
        }
        let tensor = |wanted: &str| {
            let found = |it: &&Stored| ours(&it.name).as_deref() == Some(wanted);
            self.source.tensors.iter().find(found)
        };
        let (Some(head), Some(embedding)) = (tensor("lm_head.weight"), tensor("embedding.weight"))
        else {
            return Ok(());
        };
        let place = |it: &Stored| (it.file, it.offset, it.shape.clone(), it.format);
        if place(head) == place(embedding)
            || head.shape == embedding.shape
                && self.source.values(head)? == self.source.values(embedding)?
        {
            return Ok(());
        }
        Err(unreadable(
            &self.source.path,
            "has a head that is not the embedding, and its config says that they are one: set \
             `tie_embeddings` to false in `config.json` to keep both",
        ))
    }
}

/// Which tensor has which of our names, and what is wrong with the others.
fn by_our_names(source: &Source) -> (BTreeMap<String, usize>, Vec<String>) {
    let mut tensors: BTreeMap<String, usize> = BTreeMap::new();
    let mut problems = Vec::new();
    for (i, tensor) in source.tensors.iter().enumerate() {
        match ours(&tensor.name) {
            None => problems.push(format!(
                "`{}` is not part of the model",
                shown(&tensor.name)
            )),
            Some(name) => {
                if let Some(first) = tensors.insert(name, i) {
                    problems.push(format!(
                        "`{}` and `{}` are the same parameter",
                        shown(&source.tensors[first].name),
                        shown(&tensor.name)
                    ));
                }
            }
        }
    }
    (tensors, problems)
}

/// Names that only Mamba-2's mixer has.
fn is_mamba2(name: &str) -> bool {
    layer_of(name).is_some_and(|(_, rest)| ["mixer.dt_bias", "mixer.norm.weight"].contains(&rest))
}

/// Every tensor that `config` has and the checkpoint has not, or otherwise; and the other way round.
fn compare(
    config: &MambaConfig,
    tensors: &BTreeMap<String, usize>,
    stored: &[Stored],
) -> Vec<String> {
    let table = config.parameter_table();
    let mut problems = Vec::new();
    let mut left: BTreeMap<&str, usize> = tensors
        .iter()
        .map(|(name, i)| (name.as_str(), *i))
        .collect();
    for parameter in &table {
        let Some(i) = left.remove(parameter.name.as_str()) else {
            problems.push(format!(
                "`{}` is missing",
                super::names::mamba_ssm(&parameter.name)
            ));
            continue;
        };
        let found = &stored[i];
        let expected = foreign_shape(&parameter.name, &parameter.shape);
        let name = shown(&found.name);
        if found.shape != expected {
            let shape = &found.shape[..found.shape.len().min(8)];
            problems.push(format!(
                "`{name}` has the shape {shape:?}, expected {expected:?}"
            ));
        } else if let Format::Other(format) = found.format {
            problems.push(format!(
                "`{name}` is {format}, expected float32, float16 or bfloat16"
            ));
        }
    }
    problems.extend(
        left.values()
            .map(|i| format!("`{}` is not part of the model", shown(&stored[*i].name))),
    );
    problems
}

/// What the tensors say of the model.
struct Found<'a> {
    tensors: &'a BTreeMap<String, usize>,
    stored: &'a [Stored],
}

impl<'a> Found<'a> {
    fn new(tensors: &'a BTreeMap<String, usize>, stored: &'a [Stored]) -> Self {
        Self { tensors, stored }
    }

    /// Shape of a parameter of the first layer that has it.
    fn shape(&self, name: &str) -> Option<&'a [usize]> {
        let direct = self.tensors.get(name);
        let found = direct.or_else(|| {
            self.tensors
                .iter()
                .find(|(it, _)| layer_of(it).is_some_and(|(_, rest)| rest == name))
                .map(|(_, i)| i)
        });
        found.map(|i| self.stored[*i].shape.as_slice())
    }

    fn has(&self, name: &str) -> bool {
        self.shape(name).is_some()
    }

    /// Layers, counted by the highest.
    fn layers(&self) -> usize {
        let highest = self
            .tensors
            .keys()
            .filter_map(|name| layer_of(name))
            .map(|(i, _)| i)
            .max();
        highest.map_or(0, |highest| highest.saturating_add(1))
    }

    /// The model: what `described` says, and what it leaves open, by the tensors; the norm in any
    /// case by the tensors.
    fn model(
        &self,
        described: &Described,
        warnings: &mut Vec<String>,
    ) -> std::result::Result<MambaConfig, String> {
        let (rows, embedding_width) = match self.shape("embedding.weight") {
            Some([rows, width]) => (Some(*rows), Some(*width)),
            _ => (None, None),
        };
        let width = described.width.or(embedding_width);
        let layers = self.depth(described, warnings);
        let (Some(width @ 1..=65_536), Some(layers @ 1..=4096)) = (width, layers) else {
            return Err(
                "has neither an embedding and layers nor a config that gives the model's \
                        width and depth (from 1 to 65536, and 1 to 4096)"
                    .to_owned(),
            );
        };
        let mut config = MambaConfig::new(width, layers);
        let second = |name: &str, rank: usize| {
            let shape = self.shape(name).filter(|shape| shape.len() == rank);
            shape.and_then(|shape| shape.last().copied())
        };
        let inner = self.shape("mixer.d");
        let expand = inner
            .and_then(|shape| shape.first())
            .map(|inner| inner / width);
        set(
            &mut config.d_state,
            described.state.or(second("mixer.a_log", 2)),
        );
        set(
            &mut config.d_conv,
            described.taps.or(second("mixer.conv1d.weight", 3)),
        );
        set(&mut config.expand_factor, described.expand.or(expand));
        if let Some(rank) = described.rank.or(second("mixer.dt_proj.weight", 2))
            && rank != config.dt_rank()
        {
            config.dt_rank = DtRank::Fixed(rank);
        }
        config.bias = described.bias.unwrap_or(self.has("mixer.in_proj.bias"));
        config.conv_bias = described.conv_bias.unwrap_or(self.has("mixer.conv1d.bias"));
        config.norm = self.norm(described, warnings);
        config.norm_eps = described.epsilon.unwrap_or(config.norm_eps);
        config.residual_in_fp32 = described.residual_in_fp32.unwrap_or(true);
        set(&mut config.vocab_size, described.vocabulary.or(rows));
        set(
            &mut config.pad_vocab_size_multiple,
            described.vocabulary_multiple,
        );
        // Padding that adds nothing is no padding.
        if config
            .vocab_size
            .is_multiple_of(config.pad_vocab_size_multiple.max(1))
        {
            config.pad_vocab_size_multiple = 1;
        }
        config.tie_embeddings = described.tied.unwrap_or(!self.has("lm_head.weight"));
        Ok(config)
    }

    fn depth(&self, described: &Described, warnings: &mut Vec<String>) -> Option<usize> {
        let found = self.layers();
        match described.layers {
            Some(layers) if described.layers_may_differ && found > 0 && layers != found => {
                warnings.push(format!(
                    "the config has {layers} layers and the weights have {found}: {found} it is"
                ));
                Some(found)
            }
            Some(layers) => Some(layers),
            None => Some(found),
        }
    }

    fn norm(&self, described: &Described, warnings: &mut Vec<String>) -> Norm {
        let layer = self.has("norm.bias") || self.has("backbone.norm_f.bias");
        if described.rms_norm == Some(layer) {
            warnings.push(format!(
                "the config says `rms_norm` = {layer}, and the weights are those of {}",
                if layer { "a LayerNorm" } else { "an RMSNorm" }
            ));
        }
        if layer { Norm::Layer } else { Norm::Rms }
    }
}

fn set(field: &mut usize, value: Option<usize>) {
    if let Some(value) = value {
        *field = value;
    }
}
