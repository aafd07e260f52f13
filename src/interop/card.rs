//! The card of an exported checkpoint: what the hub shows of it where it is published.

use std::fmt::Write as _;

use super::export::Format;
use crate::config::MambaConfig;

/// What training says of a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Learnt {
    /// Bytes learnt from; 0 where it is not known.
    pub bytes: u64,
    /// Bits per byte on held-out text.
    pub valid_bpb: Option<f64>,
}

/// `README.md` with the hub's header. What only its author knows, licence and data, is left to them.
pub(super) fn card(config: &MambaConfig, format: Format, learnt: Learnt) -> String {
    let of_bytes = config.vocab_size == 256;
    let (library, class) = match format {
        Format::MambaSsm => (
            "mamba-ssm",
            "from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel as Model",
        ),
        Format::Transformers => (
            "transformers",
            "from transformers import MambaForCausalLM as Model",
        ),
    };
    let mut tags = "- mamba\n".to_owned();
    if of_bytes {
        tags += "- byte-level\n";
    }
    let mut text = format!(
        "---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n{tags}---\n\n\
         # Mamba language model{}\n\n",
        if of_bytes { " over bytes" } else { "" }
    );
    if of_bytes {
        text += "Its tokens are the bytes of UTF-8 text, 0 to 255: there is no tokenizer.\n\n";
    }
    let rows = [
        ("parameters", config.num_params().to_string()),
        ("width, layers", format!("{}, {}", config.dim, config.depth)),
        (
            "state, convolution, expansion",
            format!(
                "{}, {}, {}",
                config.d_state, config.d_conv, config.expand_factor
            ),
        ),
        ("norm", config.norm.to_string()),
        ("vocabulary", config.vocab_size.to_string()),
    ];
    text += "| | |\n| --- | --- |\n";
    for (name, value) in rows {
        let _ = writeln!(text, "| {name} | {value} |");
    }
    if learnt.bytes > 0 {
        let _ = writeln!(text, "| bytes learnt from | {} |", learnt.bytes);
    }
    if let Some(bpb) = learnt.valid_bpb {
        let _ = writeln!(text, "| bits per byte, held-out | {bpb:.4} |");
    }
    let _ = write!(
        text,
        "\n```python\n{class}\n\nmodel = Model.from_pretrained(\"OWNER/NAME\")\n```\n"
    );
    text
}
