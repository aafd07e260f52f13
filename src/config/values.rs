//! Values that are neither a plain number nor a switch: choices by name, and sizes with a unit.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A value chosen by name.
pub(super) trait Choice: Copy + PartialEq + 'static {
    /// Each name with its value; a value's first name is the one it is written with.
    const NAMES: &'static [(&'static str, Self)];

    /// The value called `name`.
    fn from_name(name: &str) -> Option<Self> {
        Self::NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|&(_, value)| value)
    }
}

/// Declares an enum together with the names of its values, once, for serde, the reader of configs
/// and error messages alike.
macro_rules! choice {
    (
        $(#[$enum_doc:meta])*
        pub enum $type:ident {
            $( $(#[$doc:meta])* $variant:ident = $name:literal $(| $alias:literal)* ),+ $(,)?
        }
    ) => {
        $(#[$enum_doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum $type {
            $( $(#[$doc])* #[serde(rename = $name $(, alias = $alias)*)] $variant, )+
        }

        impl Choice for $type {
            const NAMES: &'static [(&'static str, Self)] = &[
                $( ($name, Self::$variant), $( ($alias, Self::$variant), )* )+
            ];
        }

        impl $type {
            /// The name used in a config.
            pub const fn name(self) -> &'static str {
                match self { $( Self::$variant => $name, )+ }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }

        impl FromStr for $type {
            type Err = String;

            fn from_str(name: &str) -> Result<Self, String> {
                Self::from_name(name).ok_or_else(|| {
                    format!("`{name}` is not {}", list_names::<Self>())
                })
            }
        }
    };
}

/// "one of `a`, `b`, `c`".
pub(super) fn list_names<T: Choice>() -> String {
    let names: Vec<String> = T::NAMES
        .iter()
        .map(|(name, _)| format!("\"{name}\""))
        .collect();
    match names.as_slice() {
        [only] => only.clone(),
        names => format!("one of {}", names.join(", ")),
    }
}

choice! {
    /// A named set of model sizes.
    pub enum Preset {
        /// No sizes: `dim` and `depth` must be given.
        Custom = "custom",
        /// 128 wide, 4 layers, 0.5 M parameters: a test run of seconds on a CPU.
        Tiny = "tiny",
        /// 160 wide, 6 layers, 1.1 M parameters: learns visibly in minutes on two CPU cores.
        Quickstart = "quickstart",
        /// 512 wide, 24 layers, 41 M parameters: a day-scale model for one consumer GPU.
        Small = "small",
        /// MambaByte-353M as in the paper: 1024 wide, 53 layers.
        Mambabyte353m = "mambabyte_353m",
        /// The released "353M" weights, which have 56 layers.
        Mambabyte353mReleased = "mambabyte_353m_released",
        /// MambaByte-972M: 1792 wide, 48 layers.
        Mambabyte972m = "mambabyte_972m",
        /// MambaByte-1.6B: 2304 wide, 48 layers.
        Mambabyte1_6b = "mambabyte_1_6b",
    }
}

impl Preset {
    /// Width and depth; none for [`Preset::Custom`].
    pub const fn size(self) -> Option<(usize, usize)> {
        match self {
            Self::Custom => None,
            Self::Tiny => Some((128, 4)),
            Self::Quickstart => Some((160, 6)),
            Self::Small => Some((512, 24)),
            Self::Mambabyte353m => Some((1024, 53)),
            Self::Mambabyte353mReleased => Some((1024, 56)),
            Self::Mambabyte972m => Some((1792, 48)),
            Self::Mambabyte1_6b => Some((2304, 48)),
        }
    }
}

choice! {
    /// How the weight of Δ's projection starts.
    pub enum DtInit {
        /// Uniform between -x and x, with x = `dt_scale` / √R.
        Random = "random",
        /// Every element x.
        Constant = "constant",
    }
}

choice! {
    /// Kind of normalisation.
    pub enum Norm {
        /// Mean and variance, weight and bias.
        Layer = "layer",
        /// Root mean square, weight only.
        Rms = "rms",
    }
}

choice! {
    /// Which bytes of the training split make up a step's sequences.
    pub enum Mode {
        /// Each sequence from a place of its own; states start at zero.
        Independent = "independent",
        /// Each sequence goes on where the one of the step before ended; states are carried.
        Contiguous = "contiguous",
    }
}

choice! {
    /// Number format of the computation.
    pub enum Precision {
        /// 32-bit floating point throughout.
        Fp32 = "fp32",
        /// The same, with matrix products rounded to 19 bits where the device has them (TF32).
        Tf32 = "tf32",
        /// Activations and matrix products in bfloat16; parameters, the residual stream, the
        /// recurrence and all sums in fp32.
        Bf16 = "bf16",
    }
}

choice! {
    /// How AdamW's moments are stored between steps.
    pub enum OptimizerState {
        /// 32-bit floating point, 8 bytes a parameter.
        Fp32 = "fp32",
        /// 8-bit codes in blocks with a scale each, 2 bytes a parameter.
        Int8 = "int8",
    }
}

choice! {
    /// Kind of device.
    pub enum DeviceKind {
        /// CUDA, where this program was built for it and it is there; else the CPU.
        Auto = "auto",
        /// The processor.
        Cpu = "cpu",
        /// An NVIDIA GPU.
        Cuda = "cuda",
        /// Any GPU, through Vulkan (Metal and DX12 elsewhere).
        Wgpu = "wgpu" | "vulkan",
    }
}

/// An integer, or a word with a meaning of its own.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum IntegerOrWord {
    Integer(usize),
    Word(String),
}

/// Rank of Δ's projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "IntegerOrWord", into = "IntegerOrWord")]
pub enum DtRank {
    /// ceil(D / 16).
    Auto,
    /// This rank.
    Fixed(usize),
}

impl TryFrom<IntegerOrWord> for DtRank {
    type Error = String;

    fn try_from(value: IntegerOrWord) -> Result<Self, String> {
        match value {
            IntegerOrWord::Integer(rank) => Ok(Self::Fixed(rank)),
            IntegerOrWord::Word(word) if word == "auto" => Ok(Self::Auto),
            IntegerOrWord::Word(word) => {
                Err(format!("`{word}` is neither \"auto\" nor an integer"))
            }
        }
    }
}

impl From<DtRank> for IntegerOrWord {
    fn from(rank: DtRank) -> Self {
        match rank {
            DtRank::Auto => Self::Word("auto".to_owned()),
            DtRank::Fixed(rank) => Self::Integer(rank),
        }
    }
}

/// Which layers compute their input projection again in the backward pass instead of keeping it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "IntegerOrWord", into = "IntegerOrWord")]
pub enum Recompute {
    /// As few of the first layers as fit the memory there is; none where that is not known.
    Auto,
    /// No layer: fastest, most memory.
    None,
    /// Every layer: least memory, at most a tenth more time.
    All,
    /// The first so many layers.
    First(usize),
}

impl Recompute {
    /// How many of the first layers of a model of `depth` layers are run again.
    ///
    /// [`Recompute::Auto`] counts as none: what it stands for depends on the device, and
    /// [`settle`](crate::memory::settle) puts the number in its place when a run starts.
    pub fn layers(self, depth: usize) -> usize {
        match self {
            Self::Auto | Self::None => 0,
            Self::All => depth,
            Self::First(layers) => layers.min(depth),
        }
    }
}

impl TryFrom<IntegerOrWord> for Recompute {
    type Error = String;

    fn try_from(value: IntegerOrWord) -> Result<Self, String> {
        match value {
            IntegerOrWord::Integer(layers) => Ok(Self::First(layers)),
            IntegerOrWord::Word(word) => match word.as_str() {
                "auto" => Ok(Self::Auto),
                "none" => Ok(Self::None),
                "all" => Ok(Self::All),
                _ => Err(format!(
                    "`{word}` is neither \"auto\", \"none\", \"all\" nor an integer"
                )),
            },
        }
    }
}

impl From<Recompute> for IntegerOrWord {
    fn from(recompute: Recompute) -> Self {
        match recompute {
            Recompute::Auto => Self::Word("auto".to_owned()),
            Recompute::None => Self::Word("none".to_owned()),
            Recompute::All => Self::Word("all".to_owned()),
            Recompute::First(layers) => Self::Integer(layers),
        }
    }
}

impl fmt::Display for Recompute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::None => f.write_str("none"),
            Self::All => f.write_str("all"),
            Self::First(layers) => write!(f, "{layers}"),
        }
    }
}

/// An upper bound on device memory, written as `"24GiB"`, `"24 GB"`, `"512MiB"` or `"none"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum MemoryLimit {
    /// Whatever the device has.
    None,
    /// This many bytes.
    Bytes(u64),
}

impl MemoryLimit {
    /// The bound in bytes, if there is one.
    pub fn bytes(self) -> Option<u64> {
        match self {
            Self::None => None,
            Self::Bytes(bytes) => Some(bytes),
        }
    }
}

/// Units of [`MemoryLimit`], in lower case.
const UNITS: [(&str, u64); 9] = [
    ("b", 1),
    ("kb", 1000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
];

impl FromStr for MemoryLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text == "none" {
            return Ok(Self::None);
        }
        let split = text
            .find(|c: char| !(c.is_ascii_digit() || c == '.'))
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let unit = unit.trim().to_ascii_lowercase();
        if unit.is_empty() {
            return Err("the unit is missing".to_owned());
        }
        let Some(&(_, factor)) = UNITS.iter().find(|(name, _)| *name == unit) else {
            return Err(format!("`{unit}` is not a unit"));
        };
        // Whole numbers go by integers, so that what is written is exactly what is meant.
        let bytes = match number.parse::<u64>() {
            Ok(number) => number.checked_mul(factor),
            Err(_) => match number.parse::<f64>() {
                Ok(number) => Some((number * factor as f64).round())
                    .filter(|bytes| *bytes < i64::MAX as f64)
                    .map(|bytes| bytes as u64),
                Err(_) => return Err(format!("`{number}` is not a number")),
            },
        };
        match bytes {
            Some(0) => Err("no memory at all".to_owned()),
            Some(bytes) => Ok(Self::Bytes(bytes)),
            None => Err("more than any machine has".to_owned()),
        }
    }
}

impl TryFrom<String> for MemoryLimit {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for MemoryLimit {
    /// In the largest binary unit that is exact, so that reading it back gives the same bound.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Bytes(bytes) = *self else {
            return f.write_str("none");
        };
        for (unit, factor) in [
            ("TiB", 1 << 40),
            ("GiB", 1 << 30),
            ("MiB", 1 << 20),
            ("KiB", 1 << 10),
        ] {
            if bytes % factor == 0 {
                return write!(f, "{}{unit}", bytes / factor);
            }
        }
        write!(f, "{bytes}B")
    }
}

impl From<MemoryLimit> for String {
    fn from(limit: MemoryLimit) -> Self {
        limit.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_limits_are_read_with_their_unit() {
        for (text, bytes) in [
            ("24GiB", 24 << 30),
            ("24 GiB", 24 << 30),
            ("24gb", 24_000_000_000),
            ("1.5GiB", 3 << 29),
            ("512MiB", 512 << 20),
            ("7B", 7),
        ] {
            assert_eq!(text.parse(), Ok(MemoryLimit::Bytes(bytes)), "{text}");
        }
        assert_eq!("none".parse(), Ok(MemoryLimit::None));
    }

    #[test]
    fn memory_limits_that_make_no_sense_are_refused() {
        for text in [
            "",
            "24",
            "GiB",
            "24XB",
            "-1GiB",
            "0GiB",
            "0.0GiB",
            "1.2.3GiB",
            "99999999999TiB",
            "NaNGiB",
            ".",
            "1e3GiB",
        ] {
            assert!(text.parse::<MemoryLimit>().is_err(), "{text}");
        }
    }

    #[test]
    fn memory_limits_are_written_exactly() {
        for bytes in [1, 1000, 1024, 24 << 30, (24 << 30) + 1, 24_000_000_000] {
            let limit = MemoryLimit::Bytes(bytes);
            assert_eq!(limit.to_string().parse(), Ok(limit));
        }
        assert_eq!(MemoryLimit::Bytes(24 << 30).to_string(), "24GiB");
    }

    #[test]
    fn aliases_name_the_same_value() {
        assert_eq!("vulkan".parse(), Ok(DeviceKind::Wgpu));
        assert_eq!(DeviceKind::Wgpu.to_string(), "wgpu");
        assert!("gpu".parse::<DeviceKind>().is_err());
    }

    #[test]
    fn recompute_counts_layers() {
        assert_eq!(Recompute::None.layers(4), 0);
        assert_eq!(Recompute::All.layers(4), 4);
        assert_eq!(Recompute::First(3).layers(4), 3);
        assert_eq!(Recompute::First(9).layers(4), 4);
        assert_eq!(Recompute::Auto.layers(4), 0);
    }
}
