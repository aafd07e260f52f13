//! A checkpoint of ours as one of another program.

use std::fs;
use std::path::Path;
use std::str::FromStr;

use serde_json::{Value, json};

use super::card::{Learnt, card};
use super::config::CONFIG;
use super::names::{foreign_shape, mamba_ssm, reordered, transformers};
use super::safetensors::{self, Outgoing};
use super::torch_writer;
use super::weights::WeightsFile;
use crate::config::{MambaConfig, Norm};
use crate::error::{Error, Result};

/// The program that a checkpoint is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel`
    MambaSsm,
    /// `transformers.MambaForCausalLM`
    Transformers,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "mamba-ssm" => Ok(Self::MambaSsm),
            "transformers" => Ok(Self::Transformers),
            _ => Err("expected mamba-ssm or transformers".to_owned()),
        }
    }
}

/// Fills `folder` with `config.json`, the weights, and a card that says what they are.
///
/// mamba_ssm's own loader reads `pytorch_model.bin`, so that this format has the weights in both
/// files; transformers reads `model.safetensors`.
///
/// # Errors
///
/// [`Error::Usage`] if the format has no such model.
pub fn export(
    config: &MambaConfig,
    weights: &WeightsFile,
    learnt: Learnt,
    format: Format,
    folder: &Path,
) -> Result<()> {
    check(config, format)?;
    let path = folder.join("README.md");
    let text = card(config, format, learnt);
    fs::write(&path, text).map_err(Error::io("write", &path))?;
    let settings = match format {
        Format::MambaSsm => mamba_ssm_config(config),
        Format::Transformers => transformers_config(config),
    };
    let path = folder.join(CONFIG);
    let text = serde_json::to_string_pretty(&settings).map_err(anyhow::Error::from)?;
    fs::write(&path, text + "\n").map_err(Error::io("write", &path))?;
    let tensors = outgoing(config, weights, format);
    if format == Format::MambaSsm {
        torch_writer::write(&folder.join("pytorch_model.bin"), &tensors)?;
    }
    safetensors::write(&folder.join("model.safetensors"), &tensors)
}

/// That the format has such a model.
fn check(config: &MambaConfig, format: Format) -> Result<()> {
    let problem = if !config.final_norm {
        "a model without a final norm (`model.final_norm`)"
    } else if format == Format::Transformers && config.norm == Norm::Layer {
        "a model with LayerNorm, only with RMSNorm"
    } else if format == Format::MambaSsm && config.norm_eps != 1e-5 {
        "another `norm_eps` than 1e-5"
    } else {
        return Ok(());
    };
    let (name, other) = match format {
        Format::MambaSsm => ("mamba-ssm", "transformers"),
        Format::Transformers => ("transformers", "mamba-ssm"),
    };
    Err(Error::Usage {
        message: format!("the format `{name}` does not have {problem}"),
        hint: format!("try `--format {other}`"),
    })
}

/// All tensors with their names, layouts and order there.
fn outgoing<'a>(
    config: &MambaConfig,
    weights: &'a WeightsFile,
    format: Format,
) -> Vec<Outgoing<'a>> {
    let table = config.parameter_table();
    // mamba_ssm names the head also where it is the embedding.
    let head = (config.tie_embeddings && format == Format::MambaSsm).then(|| {
        let embedding = &table[0];
        ("lm_head.weight".to_owned(), embedding.clone())
    });
    let named = table.iter().map(|parameter| {
        let name = match format {
            Format::MambaSsm => mamba_ssm(&parameter.name),
            Format::Transformers => transformers(&parameter.name),
        };
        (name, parameter.clone())
    });
    named
        .chain(head)
        .map(|(name, parameter)| Outgoing {
            name,
            shape: foreign_shape(&parameter.name, &parameter.shape),
            values: Box::new(move || {
                let values = weights.read(&parameter.name)?;
                Ok(reordered(&parameter.name, &parameter.shape, values))
            }),
        })
        .collect()
}

/// `config.json` with the keys of the released checkpoints: mamba_ssm refuses those that its
/// version does not know.
fn mamba_ssm_config(config: &MambaConfig) -> Value {
    let mut ssm = json!({"expand": config.expand_factor});
    let usual = MambaConfig::new(config.dim, config.depth);
    if config.d_state != usual.d_state {
        ssm["d_state"] = config.d_state.into();
    }
    if config.d_conv != usual.d_conv {
        ssm["d_conv"] = config.d_conv.into();
    }
    if config.dt_rank() != usual.dt_rank() {
        ssm["dt_rank"] = config.dt_rank().into();
    }
    if config.bias != usual.bias {
        ssm["bias"] = config.bias.into();
    }
    if config.conv_bias != usual.conv_bias {
        ssm["conv_bias"] = config.conv_bias.into();
    }
    json!({
        "d_model": config.dim,
        "n_layer": config.depth,
        "vocab_size": config.vocab_size,
        "ssm_cfg": ssm,
        "rms_norm": config.norm == Norm::Rms,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": config.fused_add_norm,
        "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
        "tie_embeddings": config.tie_embeddings,
    })
}

fn transformers_config(config: &MambaConfig) -> Value {
    json!({
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        // It has no padding: every row is a token.
        "vocab_size": config.padded_vocab(),
        "state_size": config.d_state,
        "conv_kernel": config.d_conv,
        "expand": config.expand_factor,
        "intermediate_size": config.d_inner(),
        "time_step_rank": config.dt_rank(),
        "time_step_min": config.dt_min,
        "time_step_max": config.dt_max,
        "time_step_scale": config.dt_scale,
        "time_step_floor": config.dt_init_floor,
        "time_step_init_scheme": config.dt_init.name(),
        "use_bias": config.bias,
        "use_conv_bias": config.conv_bias,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": config.residual_in_fp32,
        // Of initial weights; transformers 5 divides those of a checkpoint once more where it is set.
        "rescale_prenorm_residual": false,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        // Bytes have no special tokens; 0 is what a text does not contain.
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "use_cache": true,
        "torch_dtype": "float32",
    })
}
