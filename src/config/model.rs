//! The model's shape: sizes, presets, and what follows from them by arithmetic.
//!
//! Letters: V vocabulary, D model width, E inner width, N state size, R rank of Δ, K taps of the
//! convolution.

use serde::{Deserialize, Serialize};

use super::report::ConfigErrors;
use super::section::{Bounds, Section};
use super::values::{DtInit, DtRank, Norm, Preset};

/// Shape, initialisation and numerics of a byte-level Mamba language model.
///
/// The names `dim`, `depth`, `dt_rank`, `d_state`, `expand_factor`, `d_conv`, `dt_min`, `dt_max`,
/// `dt_init`, `dt_scale`, `dt_init_floor`, `bias`, `conv_bias` and `pscan` are those of the
/// well-known Python ports, with the same defaults.
///
/// Fields are public, so a value made by hand can be out of range: [`MambaConfig::validate`] says
/// so with every problem at once. A value from [`Config`](super::Config) has been validated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MambaConfig {
    /// Named set of sizes that fills the keys which are not set; `"custom"` fills none.
    pub preset: Preset,
    /// Width of the model, D. From 1 to 65536. Required unless a preset gives it.
    pub dim: usize,
    /// Number of layers. From 1 to 4096. Required unless a preset gives it.
    pub depth: usize,
    /// Rank R of the projection that makes Δ: `"auto"` is ceil(D / 16), or an integer.
    pub dt_rank: DtRank,
    /// State elements a channel, N. From 1 to 256, default 16.
    pub d_state: usize,
    /// Inner width over model width, E / D. From 1 to 16, default 2.
    pub expand_factor: usize,
    /// Taps of the causal convolution, K. From 2 to 16, default 4.
    pub d_conv: usize,
    /// Smallest Δ at the start of training. Above 0, default 0.001.
    pub dt_min: f64,
    /// Largest Δ at the start of training. Above `dt_min`, up to 1000, default 0.1.
    pub dt_max: f64,
    /// How the weight of Δ's projection starts: `"random"` (uniform) or `"constant"`.
    pub dt_init: DtInit,
    /// Factor on that start value. Above 0, default 1.
    pub dt_scale: f64,
    /// Initial Δ is not below this, whatever was drawn. Above 0, default 0.0001.
    pub dt_init_floor: f64,
    /// Whether the input and output projections have a bias. Default false.
    pub bias: bool,
    /// Whether the convolution has a bias. Default true.
    pub conv_bias: bool,
    /// Parallel scan; false is the sequential reference, with the same numbers, slowly.
    pub pscan: bool,
    /// Different tokens, V. From 256 (every byte value must have a row), default 256.
    pub vocab_size: usize,
    /// The embedding's rows are rounded up to a multiple of this. From 1, default 1 (no padding).
    pub pad_vocab_size_multiple: usize,
    /// `"layer"` (mean and variance, with bias, as in MambaByte) or `"rms"`.
    pub norm: Norm,
    /// Added to the variance before its root. Above 0, up to 1, default 1e-5.
    pub norm_eps: f64,
    /// Whether the head is the embedding transposed. Default false.
    pub tie_embeddings: bool,
    /// Whether a norm stands before the head. Default true.
    pub final_norm: bool,
    /// Keep the residual stream in fp32 whatever the compute precision. Default true. False is
    /// accepted for other programs' configs and changes nothing: what backward keeps of the stream
    /// is its normalised form in the compute precision, so a stream in bf16 would save no memory.
    pub residual_in_fp32: bool,
    /// Norm, mixer and residual sum in one operation; false uses separate ones. Default true.
    pub fused_add_norm: bool,
    /// Fused kernels inside the mixer; false exposes every intermediate value, slowly.
    pub use_fast_path: bool,
    /// Divide the initial output projections by the root of the depth. Default true.
    pub rescale_prenorm_residual: bool,
    /// Standard deviation of the initial embedding. Above 0, up to 10, default 0.02.
    pub initializer_range: f64,
}

/// Name, shape and size of one parameter tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ParameterSpec {
    /// Path in the module tree, for instance `backbone.layers.0.mixer.a_log`.
    pub name: String,
    /// Length of each dimension.
    pub shape: Vec<usize>,
    /// Number of elements.
    pub count: u64,
}

impl MambaConfig {
    /// A model of width `dim` and `depth` layers, everything else at its default.
    pub fn new(dim: usize, depth: usize) -> Self {
        Self {
            preset: Preset::Custom,
            dim,
            depth,
            dt_rank: DtRank::Auto,
            d_state: 16,
            expand_factor: 2,
            d_conv: 4,
            dt_min: 1e-3,
            dt_max: 0.1,
            dt_init: DtInit::Random,
            dt_scale: 1.0,
            dt_init_floor: 1e-4,
            bias: false,
            conv_bias: true,
            pscan: true,
            vocab_size: 256,
            pad_vocab_size_multiple: 1,
            norm: Norm::Layer,
            norm_eps: 1e-5,
            tie_embeddings: false,
            final_norm: true,
            residual_in_fp32: true,
            fused_add_norm: true,
            use_fast_path: true,
            rescale_prenorm_residual: true,
            initializer_range: 0.02,
        }
    }

    /// The sizes of `preset`; none for [`Preset::Custom`], which has none.
    pub fn from_preset(preset: Preset) -> Option<Self> {
        let (dim, depth) = preset.size()?;
        Some(Self {
            preset,
            ..Self::new(dim, depth)
        })
    }

    /// Whether a residual block runs as one operation; otherwise one after the other, in f32.
    pub fn is_fused(&self) -> bool {
        self.pscan && self.use_fast_path && self.fused_add_norm
    }

    /// Inner width E.
    pub fn d_inner(&self) -> usize {
        self.expand_factor * self.dim
    }

    /// Rank R of Δ's projection, `"auto"` resolved.
    pub fn dt_rank(&self) -> usize {
        match self.dt_rank {
            DtRank::Auto => self.dim.div_ceil(16),
            DtRank::Fixed(rank) => rank,
        }
    }

    /// Rows of the embedding: V rounded up to `pad_vocab_size_multiple`.
    pub fn padded_vocab(&self) -> usize {
        self.vocab_size
            .next_multiple_of(self.pad_vocab_size_multiple.max(1))
    }

    /// Every parameter tensor in the order of the module tree.
    pub fn parameter_table(&self) -> Vec<ParameterSpec> {
        let mut table = vec![spec(
            "embedding.weight".to_owned(),
            &[self.padded_vocab(), self.dim],
        )];
        for layer in 0..self.depth {
            table.extend(
                self.layer_parameters()
                    .into_iter()
                    .map(|(name, shape)| spec(format!("backbone.layers.{layer}.{name}"), &shape)),
            );
        }
        table.extend(
            self.tail_parameters()
                .into_iter()
                .map(|(name, shape)| spec(name.to_owned(), &shape)),
        );
        table
    }

    /// Name and shape of the parameters of one layer.
    fn layer_parameters(&self) -> Vec<(&'static str, Vec<usize>)> {
        let (d, e, n) = (self.dim, self.d_inner(), self.d_state);
        let (r, k) = (self.dt_rank(), self.d_conv);
        let mut parameters = vec![("norm.weight", vec![d])];
        if self.norm == Norm::Layer {
            parameters.push(("norm.bias", vec![d]));
        }
        parameters.push(("mixer.in_proj.weight", vec![d, 2 * e]));
        if self.bias {
            parameters.push(("mixer.in_proj.bias", vec![2 * e]));
        }
        parameters.push(("mixer.conv1d.weight", vec![e, k]));
        if self.conv_bias {
            parameters.push(("mixer.conv1d.bias", vec![e]));
        }
        parameters.push(("mixer.x_proj.weight", vec![e, r + 2 * n]));
        parameters.push(("mixer.dt_proj.weight", vec![r, e]));
        parameters.push(("mixer.dt_proj.bias", vec![e]));
        parameters.push(("mixer.a_log", vec![e, n]));
        parameters.push(("mixer.d", vec![e]));
        parameters.push(("mixer.out_proj.weight", vec![e, d]));
        if self.bias {
            parameters.push(("mixer.out_proj.bias", vec![d]));
        }
        parameters
    }

    /// Name and shape of the parameters behind the last layer.
    fn tail_parameters(&self) -> Vec<(&'static str, Vec<usize>)> {
        let mut parameters = Vec::new();
        if self.final_norm {
            parameters.push(("backbone.norm_f.weight", vec![self.dim]));
            if self.norm == Norm::Layer {
                parameters.push(("backbone.norm_f.bias", vec![self.dim]));
            }
        }
        if !self.tie_embeddings {
            parameters.push(("lm_head.weight", vec![self.dim, self.padded_vocab()]));
        }
        parameters
    }

    /// Number of parameters.
    pub fn num_params(&self) -> u64 {
        let sum = |parameters: Vec<(&str, Vec<usize>)>| -> u64 {
            parameters.iter().map(|(_, shape)| elements(shape)).sum()
        };
        elements(&[self.padded_vocab(), self.dim])
            + self.depth as u64 * sum(self.layer_parameters())
            + sum(self.tail_parameters())
    }

    /// Floating-point operations of a forward pass for one byte; training takes three times as many.
    ///
    /// Two for each parameter that a position meets (the embedding is only looked up, but as a
    /// tied head it is multiplied), and nine for each state element of the scan.
    pub fn flops_per_byte(&self) -> u64 {
        let lookup = if self.tie_embeddings {
            0
        } else {
            elements(&[self.padded_vocab(), self.dim])
        };
        let scan = 9 * elements(&[self.depth, self.d_inner(), self.d_state]);
        2 * (self.num_params() - lookup) + scan
    }

    /// Bytes of the recurrent state of one sequence in fp32: `[E, N]` of the scan and the last K-1
    /// inputs of the convolution, in every layer.
    pub fn state_bytes(&self) -> u64 {
        4 * elements(&[self.depth, self.d_inner(), self.d_state + self.d_conv - 1])
    }

    /// Whether both configs describe the same set of parameter tensors, so that weights of one can
    /// be loaded into the other.
    pub fn same_shapes(&self, other: &Self) -> bool {
        self.depth == other.depth
            && self.dim == other.dim
            && self.padded_vocab() == other.padded_vocab()
            && self.layer_parameters() == other.layer_parameters()
            && self.tail_parameters() == other.tail_parameters()
    }

    /// Checks every field, for a config that was made by hand or read from another format.
    pub fn validate(&self) -> Result<(), ConfigErrors> {
        super::validate_model(self)
    }

    /// Reads the section `[model]`.
    pub(super) fn read(section: &mut Section<'_>) -> Self {
        let preset: Preset = section.choice("preset", Some(Preset::Custom), "");
        let base = match Self::from_preset(preset) {
            // A misspelt preset is one error, not three.
            None if !section.sound(&["preset"]) => Self::from_preset(Preset::Tiny),
            base => base,
        };
        let required = base.as_ref().map(|base| (base.dim, base.depth));
        // The zeros never leave the caller: a missing key is an error.
        let base = base.unwrap_or_else(|| Self::new(0, 0));
        let missing = match required {
            Some(_) => "",
            None => "or choose a set of sizes with `model.preset`, for instance \"tiny\"",
        };
        let config = Self {
            preset,
            dim: section.size("dim", 1, 65_536, required.map(|it| it.0), missing),
            depth: section.size("depth", 1, 4096, required.map(|it| it.1), missing),
            dt_rank: section.dt_rank("dt_rank", base.dt_rank),
            d_state: section.size("d_state", 1, 256, Some(base.d_state), ""),
            expand_factor: section.size("expand_factor", 1, 16, Some(base.expand_factor), ""),
            d_conv: section.size("d_conv", 2, 16, Some(base.d_conv), ""),
            dt_min: section.float("dt_min", Bounds::above(0.0).up_to(1000.0), base.dt_min),
            dt_max: section.float("dt_max", Bounds::above(0.0).up_to(1000.0), base.dt_max),
            dt_init: section.choice("dt_init", Some(base.dt_init), ""),
            dt_scale: section.float("dt_scale", Bounds::above(0.0).up_to(1000.0), base.dt_scale),
            dt_init_floor: section.float(
                "dt_init_floor",
                Bounds::above(0.0).up_to(1000.0),
                base.dt_init_floor,
            ),
            bias: section.boolean("bias", base.bias),
            conv_bias: section.boolean("conv_bias", base.conv_bias),
            pscan: section.boolean("pscan", base.pscan),
            vocab_size: section.size(
                "vocab_size",
                256,
                1 << 20,
                Some(base.vocab_size),
                "a byte model needs one row for each of the 256 byte values",
            ),
            pad_vocab_size_multiple: section.size(
                "pad_vocab_size_multiple",
                1,
                65_536,
                Some(base.pad_vocab_size_multiple),
                "1 means no padding",
            ),
            norm: section.choice("norm", Some(base.norm), ""),
            norm_eps: section.float("norm_eps", Bounds::above(0.0).up_to(1.0), base.norm_eps),
            tie_embeddings: section.boolean("tie_embeddings", base.tie_embeddings),
            final_norm: section.boolean("final_norm", base.final_norm),
            residual_in_fp32: section.boolean("residual_in_fp32", base.residual_in_fp32),
            fused_add_norm: section.boolean("fused_add_norm", base.fused_add_norm),
            use_fast_path: section.boolean("use_fast_path", base.use_fast_path),
            rescale_prenorm_residual: section
                .boolean("rescale_prenorm_residual", base.rescale_prenorm_residual),
            initializer_range: section.float(
                "initializer_range",
                Bounds::above(0.0).up_to(10.0),
                base.initializer_range,
            ),
        };
        config.check_together(section);
        config
    }

    /// Checks that need more than one key.
    fn check_together(&self, section: &mut Section<'_>) {
        if section.sound(&["dt_min", "dt_max"]) && self.dt_min >= self.dt_max {
            section.reject(
                "dt_min",
                self.dt_min.to_string(),
                format!("a number below `model.dt_max`, which is {}", self.dt_max),
                "swap the two, or leave both out for 0.001 and 0.1",
            );
        }
        if section.sound(&["dt_init_floor", "dt_max"]) && self.dt_init_floor >= self.dt_max {
            section.reject(
                "dt_init_floor",
                self.dt_init_floor.to_string(),
                format!("a number below `model.dt_max`, which is {}", self.dt_max),
                "at or above it every channel would start with the same Δ",
            );
        }
        if section.sound(&["dim", "expand_factor", "dt_rank"]) && self.dt_rank() > self.d_inner() {
            section.reject(
                "dt_rank",
                self.dt_rank().to_string(),
                format!("at most the inner width, which is {}", self.d_inner()),
                "\"auto\" takes ceil(dim / 16)",
            );
        }
    }
}

fn elements(shape: &[usize]) -> u64 {
    shape.iter().map(|&length| length as u64).product()
}

fn spec(name: String, shape: &[usize]) -> ParameterSpec {
    ParameterSpec {
        name,
        shape: shape.to_vec(),
        count: elements(shape),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn preset(preset: Preset) -> MambaConfig {
        MambaConfig::from_preset(preset).expect("a preset with sizes")
    }

    #[test]
    fn published_models_have_their_exact_parameter_counts() {
        for (name, count) in [
            (Preset::Mambabyte353m, 353_945_600),
            (Preset::Mambabyte353mReleased, 373_950_464),
            (Preset::Mambabyte972m, 973_934_080),
            (Preset::Mambabyte1_6b, 1_606_095_360),
        ] {
            let config = preset(name);
            assert_eq!(config.num_params(), count, "{name}");
            let listed: u64 = config.parameter_table().iter().map(|it| it.count).sum();
            assert_eq!(listed, count, "{name}: sum of the table");
        }
    }

    #[test]
    fn flops_and_state_are_those_of_the_reference() {
        for (name, mflop, state_mb) in [
            (Preset::Mambabyte353m, 723.0, 8.7),
            (Preset::Mambabyte972m, 1972.0, 13.8),
            (Preset::Mambabyte1_6b, 3243.0, 17.7),
        ] {
            let config = preset(name);
            let got = config.flops_per_byte() as f64 / 1e6;
            assert!((got / mflop - 1.0).abs() < 0.01, "{name}: {got} MFLOP");
            // The reference keeps K inputs of the convolution, this program the K-1 it needs.
            let extra = (4 * config.depth * config.d_inner()) as f64;
            let got = (config.state_bytes() as f64 + extra) / 1e6;
            assert!((got / state_mb - 1.0).abs() < 0.01, "{name}: {got} MB");
        }
    }

    #[test]
    fn flops_do_not_depend_on_tying_the_head() {
        let untied = preset(Preset::Tiny);
        let tied = MambaConfig {
            tie_embeddings: true,
            ..untied.clone()
        };
        assert_eq!(untied.flops_per_byte(), tied.flops_per_byte());
        assert_eq!(untied.num_params() - tied.num_params(), 256 * 128);
    }

    #[test]
    fn every_optional_tensor_follows_its_switch() {
        let mut config = MambaConfig::new(32, 2);
        config.bias = true;
        config.norm = Norm::Rms;
        config.conv_bias = false;
        config.tie_embeddings = true;
        config.final_norm = false;
        config.pad_vocab_size_multiple = 100;
        let table = config.parameter_table();
        let names: Vec<&str> = table.iter().map(|it| it.name.as_str()).collect();
        assert!(names.contains(&"backbone.layers.1.mixer.in_proj.bias"));
        assert!(names.contains(&"backbone.layers.0.mixer.out_proj.bias"));
        assert!(!names.iter().any(|it| it.ends_with("norm.bias")));
        assert!(!names.contains(&"backbone.layers.0.mixer.conv1d.bias"));
        assert!(!names.contains(&"lm_head.weight"));
        assert!(!names.contains(&"backbone.norm_f.weight"));
        assert_eq!(table[0].shape, [300, 32]);
        assert_eq!(
            table.iter().map(|it| it.count).sum::<u64>(),
            config.num_params()
        );
    }

    #[test]
    fn same_shapes_ignores_what_has_no_tensor() {
        let one = preset(Preset::Tiny);
        let mut other = MambaConfig::new(one.dim, one.depth);
        other.dt_rank = DtRank::Fixed(8);
        other.pscan = false;
        assert!(one.same_shapes(&other));
        other.dt_rank = DtRank::Fixed(9);
        assert!(!one.same_shapes(&other));
    }

    #[test]
    fn validate_reports_every_bad_field() {
        let mut config = MambaConfig::new(0, 2);
        config.dt_min = f64::NAN;
        config.norm_eps = -1.0;
        let errors = config.validate().expect_err("three bad fields").errors;
        let keys: Vec<&str> = errors.iter().map(|it| it.key.as_str()).collect();
        assert_eq!(keys, ["model.dim", "model.dt_min", "model.norm_eps"]);
        assert!(MambaConfig::new(8, 1).validate().is_ok());
    }
}
