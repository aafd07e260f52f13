//! Products by cuBLASLt, loaded at run time, beside CubeCL's kernels on the same device.
//!
//! Products are issued on CubeCL's own stream, so that nothing has to be waited for before and after
//! one. A stream of ours, ordered by events against CubeCL's, left the device idle for 2 to 3 µs on
//! either side of every product.
//!
//! cuBLASLt's heuristic proposes algorithms in microseconds, once for every shape, and the fastest of
//! those that give the same bits is kept ([`choice`]). Nothing is compiled at run time. A product of a
//! shape that was there before can be recorded as part of a graph, if it needs no workspace.

mod choice;

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::OnceLock;

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::RuntimeId;
use cubecl::cuda::CudaRuntime;
use cubecl::device_handle::DeviceHandle;
use cubecl::server::Handle;
use cubecl_environment::stream::StreamId;
use cubecl_runtime::server::ServerStorage;
use cubecl_server::stream::WriteScoped;
use cudarc::cublaslt::{result as lt, sys as lts};
use cudarc::driver::{result as driver, sys as cu};

use super::Product;
use super::cube::Matrix;
use crate::cube::row_stride;

type Server = <CudaRuntime as cubecl_runtime::runtime::Runtime>::Server;

/// Memory that algorithms may use, in bytes: what NVIDIA recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// Whether cuBLASLt is there.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        preload();
        // SAFETY: both calls load libraries by name.
        unsafe { lts::is_culib_present() && cu::is_culib_present() }
    })
}

/// Whether it multiplies on the device of `tensor`.
pub(super) fn serves(tensor: &CubeTensor) -> bool {
    tensor.device.runtime() == RuntimeId::Cuda && available()
}

/// Loads the library from the toolkit's folder, where the loader does not search by itself.
fn preload() {
    let root = std::env::var_os("CUDA_PATH").unwrap_or_else(|| "/usr/local/cuda".into());
    let path = std::path::Path::new(&root).join("lib64/libcublasLt.so");
    // SAFETY: loading NVIDIA's library runs its initialisers and nothing else.
    if let Ok(library) = unsafe { libloading::Library::new(path) } {
        // It stays loaded, so that loading it by name finds it.
        std::mem::forget(library);
    }
}

/// Why a product was not done.
enum Refusal {
    /// The library has no algorithm for the shape, or could not be set up.
    Unsupported,
    /// An operand's buffer is not to be had: an allocation failed earlier.
    Memory(String),
}

/// `out = op(a) · op(b) (+ add)`; false, with nothing done, where cuBLASLt cannot.
///
/// # Panics
///
/// If an operand's memory was never allocated, with the runtime's words for it.
pub(super) fn product(
    a: &Matrix,
    b: &Matrix,
    how: Product,
    add: Option<&CubeTensor>,
    out: &CubeTensor,
) -> bool {
    let client = &a.tensor.client;
    if !serves(&a.tensor) {
        return false;
    }
    let Some(types) = [a.tensor.dtype, b.tensor.dtype, out.dtype]
        .map(data_type)
        .into_iter()
        .collect::<Option<Vec<_>>>()
    else {
        return false;
    };
    if add.is_some_and(|add| add.dtype != out.dtype) || a.tensor.dtype != b.tensor.dtype {
        return false;
    }
    let [Some(a_stride), Some(b_stride), Some(out_stride)] =
        [&a.tensor, &b.tensor, out].map(row_stride)
    else {
        return false;
    };
    let shape = Shape {
        a: [a.rows, a.columns, a_stride],
        b: [b.rows, b.columns, b_stride],
        out_stride,
        types: [types[0], types[1], types[2]],
        how,
        adds: add.is_some(),
        alignments: [0; 4],
    };
    let handles = Handles {
        a: a.tensor.handle.clone(),
        b: b.tensor.handle.clone(),
        add: add.map_or_else(|| out.handle.clone(), |add| add.handle.clone()),
        out: out.handle.clone(),
    };
    // All CUDA calls are made on the device's own thread, where its context is current. The stream is
    // that of this thread, which is made to wait for other threads' buffers when their addresses are
    // asked for. A graph is under way from when CubeCL prepares for it, which is not recording yet.
    let under_way = client.is_capturing();
    let id = StreamId::current();
    let device = DeviceHandle::<Server>::new(client.service_id().device);
    let done = device.submit_blocking(move |server| {
        let mut address = |handle: Handle| {
            server
                .get_resource(handle.binding(), id)
                .map(|resource| resource.resource().ptr)
                .map_err(|error| Refusal::Memory(format!("{error}")))
        };
        let pointers = [
            address(handles.a)?,
            address(handles.b)?,
            address(handles.add)?,
            address(handles.out)?,
        ];
        let stream = server.write_streams().try_stream_mut(&id);
        let stream = stream.ok_or(Refusal::Unsupported)?.sys;
        let recording = under_way && is_recording(stream).ok_or(Refusal::Unsupported)?;
        LIBRARIES.with_borrow_mut(|libraries| {
            let context = driver::ctx::get_current()
                .ok()
                .flatten()
                .ok_or(Refusal::Unsupported)?;
            let library = match libraries.entry(context as usize) {
                std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::hash_map::Entry::Vacant(entry) => {
                    entry.insert(Library::new().ok_or(Refusal::Unsupported)?)
                }
            };
            library
                .run(shape, pointers, stream, recording)
                .ok_or(Refusal::Unsupported)
        })
    });
    match done {
        Ok(Ok(())) => true,
        // The portable kernels have an algorithm for every shape.
        Ok(Err(Refusal::Unsupported)) => false,
        Ok(Err(Refusal::Memory(reason))) => panic!("product: {reason}"),
        Err(error) => panic!("product: the device's thread is gone: {error:?}"),
    }
}

/// Whether what is issued on the stream becomes part of a graph.
fn is_recording(stream: cu::CUstream) -> Option<bool> {
    // SAFETY: the stream is CubeCL's and alive.
    let status = unsafe { driver::stream::is_capturing(stream) }.ok()?;
    Some(status != cu::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

struct Handles {
    a: Handle,
    b: Handle,
    add: Handle,
    out: Handle,
}

fn data_type(dtype: DType) -> Option<lts::cudaDataType> {
    match dtype {
        DType::F32 | DType::Flex32 => Some(lts::cudaDataType::CUDA_R_32F),
        DType::F16 => Some(lts::cudaDataType::CUDA_R_16F),
        DType::BF16 => Some(lts::cudaDataType::CUDA_R_16BF),
        _ => None,
    }
}

/// Everything that decides the algorithm.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    /// Rows, columns and row stride, as stored.
    a: [usize; 3],
    b: [usize; 3],
    out_stride: usize,
    types: [lts::cudaDataType; 3],
    how: Product,
    adds: bool,
    /// Of a, b, add and out, in bytes.
    alignments: [u32; 4],
}

impl Shape {
    /// Rows and columns of the result.
    fn result(&self) -> [usize; 2] {
        [
            self.a[usize::from(self.how.transposed[0])],
            self.b[usize::from(!self.how.transposed[1])],
        ]
    }

    /// Bytes beside the operands that its algorithm may use.
    fn workspace_bytes(&self) -> usize {
        if self.how.workspace {
            WORKSPACE_BYTES
        } else {
            0
        }
    }

    /// The length of the sums.
    fn depth(&self) -> usize {
        self.a[usize::from(!self.how.transposed[0])]
    }
}

/// Descriptors and algorithm of one shape. They live as long as the process: a program has a few
/// dozen shapes.
#[derive(Clone, Copy)]
struct Plan {
    description: lts::cublasLtMatmulDesc_t,
    a: lts::cublasLtMatrixLayout_t,
    b: lts::cublasLtMatrixLayout_t,
    out: lts::cublasLtMatrixLayout_t,
    algorithm: lts::cublasLtMatmulAlgo_t,
}

/// A product of buffers, to be issued on a stream.
#[derive(Clone, Copy)]
struct Call {
    handle: lts::cublasLtHandle_t,
    stream: cu::CUstream,
    workspace: cu::CUdeviceptr,
    workspace_bytes: usize,
    plan: Plan,
    adds: bool,
    /// Addresses of a, b, what is added, and the result.
    pointers: [cu::CUdeviceptr; 4],
}

impl Call {
    /// Issues it.
    ///
    /// # Safety
    ///
    /// The buffers must live until the stream has come there, and no other work may be writing to
    /// them.
    unsafe fn issue(&self) -> Option<()> {
        let (one, zero) = (1.0f32, 0.0f32);
        let beta = if self.adds { &one } else { &zero };
        let [a, b, add, out] = self.pointers;
        // SAFETY: descriptors and stream are alive; the caller answers for the buffers. Row-major
        // operands are transposed column-major ones, so `b` comes first.
        unsafe {
            lt::matmul(
                self.handle,
                self.plan.description,
                (&raw const one).cast(),
                std::ptr::from_ref(beta).cast(),
                b as *const c_void,
                self.plan.b,
                a as *const c_void,
                self.plan.a,
                add as *const c_void,
                self.plan.out,
                out as *mut c_void,
                self.plan.out,
                &raw const self.plan.algorithm,
                self.workspace as *mut c_void,
                self.workspace_bytes,
                self.stream.cast(),
            )
            .ok()
        }
    }
}

/// cuBLASLt in one context.
struct Library {
    handle: lts::cublasLtHandle_t,
    workspace: cu::CUdeviceptr,
    /// The stream of the last product, which has the workspace; null before the first.
    last: cu::CUstream,
    /// Where the last product of a stream ends, for the first of another.
    handed_on: cu::CUevent,
    /// `None` for a shape that the library has no algorithm for.
    plans: HashMap<Shape, Option<Plan>>,
}

thread_local! {
    /// By context. Only the device's own thread has any.
    static LIBRARIES: RefCell<HashMap<usize, Library>> = RefCell::new(HashMap::new());
}

impl Library {
    fn new() -> Option<Self> {
        // SAFETY: the context is current on this thread; the memory is never freed, and lives as
        // long as the context.
        let workspace = unsafe { driver::malloc_sync(WORKSPACE_BYTES) };
        Some(Self {
            handle: lt::create_handle().ok()?,
            workspace: workspace.ok()?,
            last: std::ptr::null_mut(),
            handed_on: driver::event::create(cu::CUevent_flags::CU_EVENT_DISABLE_TIMING).ok()?,
            plans: HashMap::new(),
        })
    }

    /// Issues the product of the buffers `[a, b, add, out]` on `stream`. While a graph is `recording`
    /// only shapes seen before can be, and only without workspace: nothing can be tried out then.
    fn run(
        &mut self,
        mut shape: Shape,
        pointers: [u64; 4],
        stream: cu::CUstream,
        recording: bool,
    ) -> Option<()> {
        shape.alignments = pointers.map(|pointer| 1 << pointer.trailing_zeros().min(8));
        if recording && (shape.how.workspace || !self.plans.contains_key(&shape)) {
            return None;
        }
        if shape.how.workspace {
            self.take_workspace(stream)?;
        }
        let call = |plan| Call {
            handle: self.handle,
            stream,
            workspace: self.workspace,
            workspace_bytes: shape.workspace_bytes(),
            plan,
            adds: shape.adds,
            pointers,
        };
        let plan = *self.plans.entry(shape).or_insert_with(|| {
            let (plan, algorithms) = plan(self.handle, &shape).ok()?;
            Some(Plan {
                algorithm: choice::fastest(call(plan), &shape, &algorithms),
                ..plan
            })
        });
        // SAFETY: the caller holds the buffers until the call is issued, and CubeCL reuses them only
        // for work that comes after it on the stream, or waits for that.
        unsafe { call(plan?).issue() }
    }

    /// Has `stream` wait until the last product of another one no longer needs the workspace.
    fn take_workspace(&mut self, stream: cu::CUstream) -> Option<()> {
        if self.last != stream && !self.last.is_null() {
            let flags = cu::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            // SAFETY: CubeCL's streams live as long as its context, and the event as long as this.
            unsafe {
                driver::event::record(self.handed_on, self.last).ok()?;
                driver::stream::wait_event(stream, self.handed_on, flags).ok()?;
            }
        }
        self.last = stream;
        Some(())
    }
}

/// Algorithms that the heuristic is asked for.
const ALGORITHMS: usize = 8;

/// Asks the heuristic for algorithms: a plan with the first, and all of them.
fn plan(
    handle: lts::cublasLtHandle_t,
    shape: &Shape,
) -> Result<(Plan, Vec<lts::cublasLtMatmulAlgo_t>), lt::CublasError> {
    use lts::cublasLtMatmulDescAttributes_t as Desc;
    use lts::cublasLtMatmulPreferenceAttributes_t as Pref;
    let tf32 = shape.how.tf32 && shape.types[0] == lts::cudaDataType::CUDA_R_32F;
    let compute = if tf32 {
        lts::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
    } else {
        lts::cublasComputeType_t::CUBLAS_COMPUTE_32F
    };
    let description = lt::create_matmul_desc(compute, lts::cudaDataType::CUDA_R_32F)?;
    let turn = |attribute, transposed: bool| {
        let op = i32::from(transposed);
        // SAFETY: the attribute is a 32-bit number, copied by the call.
        unsafe { lt::set_matmul_desc_attribute(description, attribute, (&raw const op).cast(), 4) }
    };
    turn(Desc::CUBLASLT_MATMUL_DESC_TRANSA, shape.how.transposed[1])?;
    turn(Desc::CUBLASLT_MATMUL_DESC_TRANSB, shape.how.transposed[0])?;
    let layout = |kind, [rows, columns, stride]: [usize; 3]| {
        lt::create_matrix_layout(kind, columns as u64, rows as u64, stride as i64)
    };
    let [rows, columns] = shape.result();
    let a = layout(shape.types[0], shape.a)?;
    let b = layout(shape.types[1], shape.b)?;
    let out = layout(shape.types[2], [rows, columns, shape.out_stride])?;
    let preference = lt::create_matmul_pref()?;
    let prefer = |attribute, value: *const c_void, bytes| {
        // SAFETY: the value is alive and of the attribute's size; the call copies it.
        unsafe { lt::set_matmul_pref_attribute(preference, attribute, value, bytes) }
    };
    let workspace = shape.workspace_bytes();
    prefer(
        Pref::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
        (&raw const workspace).cast(),
        8,
    )?;
    let [of_a, of_b, of_add, of_out] = &shape.alignments;
    for (attribute, alignment) in [
        (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, of_b),
        (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, of_a),
        (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, of_add),
        (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, of_out),
    ] {
        prefer(attribute, std::ptr::from_ref(alignment).cast(), 4)?;
    }
    // SAFETY: all descriptors were made above and none is freed; the preference is freed once. The
    // results are plain numbers, written by the call up to the count that it returns.
    let found = unsafe {
        let mut found: [lts::cublasLtMatmulHeuristicResult_t; ALGORITHMS] = std::mem::zeroed();
        let mut count = 0;
        let outcome = lts::cublasLtMatmulAlgoGetHeuristic(
            handle,
            description,
            b,
            a,
            out,
            out,
            preference,
            ALGORITHMS as i32,
            found.as_mut_ptr(),
            &mut count,
        )
        .result();
        lt::destroy_matmul_pref(preference)?;
        outcome?;
        found.into_iter().take(count as usize)
    };
    let algorithms: Vec<_> = found.map(|result| result.algo).collect();
    let Some(&algorithm) = algorithms.first() else {
        return Err(lt::CublasError(
            lts::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
        ));
    };
    let plan = Plan {
        description,
        a,
        b,
        out,
        algorithm,
    };
    Ok((plan, algorithms))
}
