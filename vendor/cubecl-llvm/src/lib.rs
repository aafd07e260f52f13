//! Stand-in for CubeCL's LLVM compiler: the items that `cubecl-cuda` names, and a compiler that
//! refuses every kernel.
//!
//! The original's build script downloads a prebuilt LLVM. CubeCL's CUDA backend has another
//! compiler, C++ through NVRTC, which its feature `cpp` makes the default; with it, nothing in here is
//! ever called. See this crate's README for how to get the original back.

use core::ffi::c_char;
use core::fmt;

use cubecl_core::environment::backtrace::BackTrace;
use cubecl_core::ir::DeviceProperties;
use cubecl_core::prelude::KernelDefinition;
use cubecl_runtime::compiler::{CompilationError, Compiler};
use cubecl_runtime::kernel::BufferIOAttr;

pub use cubecl_core::ir::nvidia::SmArch;

use nvptx::ptx_version::PtxVersion;

/// What the compiler writes code for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LlvmTarget {
    /// The processor.
    #[default]
    Cpu,
    /// NVIDIA GPUs.
    Nvptx,
}

/// The compiler, which refuses every kernel.
#[derive(Clone, Debug, Default)]
pub struct PlironCompiler {
    /// What it would write code for.
    pub target: LlvmTarget,
}

/// Options of [`PlironCompiler`], none of which is read.
#[derive(Clone, Debug, Default)]
pub struct PlironOptions {
    /// AMD's architecture in the original; always none.
    pub arch: Option<()>,
    /// NVIDIA's architecture.
    pub sm_arch: Option<SmArch>,
    /// The newest PTX that the driver loads.
    pub ptx_version: Option<PtxVersion>,
    /// Whether launch parameters are passed as grid constants.
    pub grid_constants: bool,
}

/// A compiled CUDA kernel. There is never one.
#[derive(Clone, Debug)]
pub struct NvptxModule {
    /// The PTX, ending with a zero.
    pub ptx: Vec<c_char>,
    /// Name of the kernel in it.
    pub entrypoint: String,
    /// What it was made from, for display.
    pub ir: String,
    /// Shared memory of a launch, in bytes.
    pub shared_memory_size: usize,
    /// How the kernel uses each buffer.
    pub io: Vec<BufferIOAttr>,
}

/// What the compiler gives. There is never one.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum PlironArtifact {
    /// A CUDA kernel.
    NvptxCode(NvptxModule),
}

impl fmt::Display for PlironArtifact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NvptxCode(module) => f.write_str(&module.ir),
        }
    }
}

impl Compiler for PlironCompiler {
    type Representation = PlironArtifact;
    type CompilationOptions = PlironOptions;

    fn compile(
        &mut self,
        _kernel: KernelDefinition,
        _options: &PlironOptions,
    ) -> Result<PlironArtifact, CompilationError> {
        Err(CompilationError::Generic {
            reason: "this program was built without CubeCL's LLVM compiler; enable the feature \
                     `cuda-cpp` of `cubecl`, or delete the line `cubecl-llvm` below \
                     `[patch.crates-io]` in the workspace's Cargo.toml"
                .to_owned(),
            backtrace: BackTrace::capture(),
        })
    }

    fn extension(&self) -> &'static str {
        "ll"
    }

    fn lang_tag(&self) -> &'static str {
        "llvm"
    }
}

/// NVIDIA's part.
pub mod nvptx {
    /// Versions of PTX.
    pub mod ptx_version {
        use core::fmt;

        /// A version of PTX; 8.7 is 87.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct PtxVersion(u32);

        impl PtxVersion {
            /// The newest version that a driver loads: none, because no PTX is written. It only
            /// goes into the name of a cache.
            pub fn for_driver(_driver: i32) -> Option<Self> {
                None
            }
        }

        impl fmt::Display for PtxVersion {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "ptx{}", self.0)
            }
        }
    }
}

/// What the targets share.
pub mod shared {
    /// What the compiler can do of what a device can.
    pub mod lowered_features {
        use crate::DeviceProperties;

        /// A GPU target.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum GpuTarget {
            /// NVIDIA GPUs.
            Nvptx,
        }

        /// Takes from `properties` what the compiler cannot do: here nothing, because it is only
        /// called where this compiler is the default.
        pub fn restrict_features(_properties: &mut DeviceProperties, _target: GpuTarget) {}
    }
}
