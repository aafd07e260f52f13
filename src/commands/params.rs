//! The command `params`: what a config's model consists of, and what it costs.

use std::fmt::Write as _;

use serde::Serialize;

use super::{ConfigArgs, ParamsArgs, checkpoint_folder, grouped, print, print_json, scaled};
use crate::config::{Config, MambaConfig, ParameterSpec};
use crate::error::Result;
use crate::train::Checkpoint;
use crate::train::telemetry::TRAINING_OVER_FORWARD;

/// Bytes a parameter takes in training, in fp32: weight, gradient, and AdamW's two moments.
const TRAINING_BYTES: u64 = 16;

/// Runs the command.
pub fn run(args: &ParamsArgs) -> Result<()> {
    let config = load(args)?;
    if args.json {
        print_json(&Summary::new(&config))
    } else {
        print(&table(&config))
    }
}

/// The config that was named, or that of the checkpoint.
fn load(args: &ParamsArgs) -> Result<Config> {
    match (&args.checkpoint, &args.config) {
        (Some(checkpoint), _) => {
            let folder = checkpoint_folder(checkpoint)?;
            Ok(Checkpoint::open_for_model(&folder)?.config().clone())
        }
        (None, config) => ConfigArgs {
            config: config.clone().unwrap_or_default(),
            overrides: args.overrides.clone(),
        }
        .load(),
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Summary<'a> {
    model: &'a MambaConfig,
    parameters: u64,
    weight_bytes_fp32: u64,
    training_bytes_fp32: u64,
    forward_flops_per_byte: u64,
    training_flops_per_byte: u64,
    bytes_per_step: u64,
    state_bytes: u64,
    tensors: Vec<ParameterSpec>,
}

impl<'a> Summary<'a> {
    fn new(config: &'a Config) -> Self {
        let model = &config.model;
        let (parameters, forward) = (model.num_params(), model.flops_per_byte());
        Self {
            model,
            parameters,
            weight_bytes_fp32: 4 * parameters,
            training_bytes_fp32: TRAINING_BYTES * parameters,
            forward_flops_per_byte: forward,
            training_flops_per_byte: TRAINING_OVER_FORWARD * forward,
            bytes_per_step: config.train.bytes_per_step(),
            state_bytes: model.state_bytes(),
            tensors: model.parameter_table(),
        }
    }
}

fn table(config: &Config) -> String {
    let summary = Summary::new(config);
    let model = summary.model;
    let header = ["parameter", "shape", "each", "layers", "total"];
    let mut rows = vec![header.map(str::to_owned)];
    for tensor in &summary.tensors {
        let shape = format!("{:?}", tensor.shape);
        match tensor.name.strip_prefix("backbone.layers.") {
            // All layers have the same tensors: the first stands for them.
            Some(rest) => {
                if let Some(name) = rest.strip_prefix("0.") {
                    rows.push([
                        format!("backbone.layers.*.{name}"),
                        shape,
                        grouped(tensor.count),
                        model.depth.to_string(),
                        grouped(tensor.count * model.depth as u64),
                    ]);
                }
            }
            None => rows.push([
                tensor.name.clone(),
                shape,
                grouped(tensor.count),
                String::new(),
                grouped(tensor.count),
            ]),
        }
    }
    let mut total = <[String; 5]>::default();
    total[0] = "total".to_owned();
    total[4] = grouped(summary.parameters);
    rows.push(total);

    let mut text = align(&rows);
    let step = summary.training_flops_per_byte as f64 * summary.bytes_per_step as f64;
    let _ = write!(
        text,
        "\n\
         model        {preset}: D {dim}, E {inner}, N {state}, R {rank}, K {taps}, {depth} layers\n\
         weights      {weights} in fp32, {training} with gradients and AdamW's moments\n\
         forward      {forward} a byte\n\
         training     {backward} a byte, {step} a step of {bytes} bytes\n\
         state        {carried} a sequence in fp32, however long\n",
        preset = model.preset,
        dim = model.dim,
        inner = model.d_inner(),
        state = model.d_state,
        rank = model.dt_rank(),
        taps = model.d_conv,
        depth = model.depth,
        weights = scaled(summary.weight_bytes_fp32 as f64, "B"),
        training = scaled(summary.training_bytes_fp32 as f64, "B"),
        forward = scaled(summary.forward_flops_per_byte as f64, "FLOP"),
        backward = scaled(summary.training_flops_per_byte as f64, "FLOP"),
        step = scaled(step, "FLOP"),
        bytes = grouped(summary.bytes_per_step),
        carried = scaled(summary.state_bytes as f64, "B"),
    );
    text
}

/// Rows in columns: text to the left, numbers to the right.
fn align(rows: &[[String; 5]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: [usize; 5] = std::array::from_fn(width);
    let mut text = String::new();
    for [name, shape, each, layers, total] in rows {
        let [a, b, c, d, e] = widths;
        let _ = writeln!(
            text,
            "{name:a$}  {shape:b$}  {each:>c$}  {layers:>d$}  {total:>e$}"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        "model.preset = \"mambabyte_353m\"\ntrain.steps = 1000\ndata.path = \"x\""
            .parse()
            .expect("a valid config")
    }

    #[test]
    fn the_table_adds_up() {
        let text = table(&config());
        let totals: Vec<u64> = text
            .lines()
            .take_while(|line| !line.is_empty())
            .filter_map(|line| {
                line.split_whitespace()
                    .last()?
                    .replace(',', "")
                    .parse()
                    .ok()
            })
            .collect();
        let (total, parts) = totals.split_last().expect("rows");
        assert_eq!(parts.iter().sum::<u64>(), *total);
        assert_eq!(*total, 353_945_600);
        assert!(
            text.contains("backbone.layers.*.mixer.in_proj.weight"),
            "{text}"
        );
        assert!(text.contains("723.00 MFLOP a byte"), "{text}");
    }

    #[test]
    fn json_has_every_tensor() {
        let config = config();
        let json = serde_json::to_value(Summary::new(&config)).expect("json");
        assert_eq!(json["parameters"], 353_945_600);
        assert_eq!(
            json["tensors"].as_array().map(Vec::len),
            Some(1 + 53 * 11 + 3)
        );
    }
}
