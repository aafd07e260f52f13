//! Parameters by name: the path of a tensor in the module tree, such as
//! `backbone.layers.0.mixer.a_log`.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor, TensorData};
use safetensors::tensor::Dtype;

use crate::error::{Error, Result};

/// Names of nested modules, joined by dots.
#[derive(Default)]
pub(super) struct Path(Vec<String>);

impl Path {
    pub(super) fn enter(&mut self, name: &str) {
        self.0.push(name.to_owned());
    }

    pub(super) fn exit(&mut self) {
        self.0.pop();
    }

    pub(super) fn join(&self) -> String {
        self.0.join(".")
    }
}

/// A parameter as a checkpoint sees it: read from the device only when it is written.
pub(super) struct Named {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    /// What the bytes that `read` gives are.
    pub(super) dtype: Dtype,
    pub(super) read: Box<dyn Fn() -> TensorData>,
}

/// A lazily read tensor called `name`.
pub(super) fn named<const D: usize>(name: String, tensor: Tensor<D>) -> Named {
    Named {
        name,
        shape: tensor.dims().to_vec(),
        dtype: Dtype::F32,
        read: Box::new(move || tensor.to_data()),
    }
}

/// All parameters of `module`, in the order of the module tree.
pub(super) fn collect<M: Module>(module: &M) -> Vec<Named> {
    #[derive(Default)]
    struct Collector {
        path: Path,
        found: Vec<Named>,
    }

    impl ModuleVisitor for Collector {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.enter(name);
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.exit();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.found
                .push(named(self.path.join(), param.val().inner()));
        }
    }

    let mut collector = Collector::default();
    module.visit(&mut collector);
    collector.found
}

/// Values in one row, on `device`.
pub(crate) fn row(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}

/// Replaces every parameter of `module` by the values that `read` gives for its name, all in one
/// row. Parameters without values yet are given none but these.
///
/// # Errors
///
/// The first of `read`.
pub(crate) fn replace<M: Module>(
    module: M,
    read: impl FnMut(&str) -> Result<Tensor<1>>,
) -> Result<M> {
    struct Replacer<F> {
        path: Path,
        read: F,
        error: Option<Error>,
    }

    impl<F: FnMut(&str) -> Result<Tensor<1>>> ModuleMapper for Replacer<F> {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.enter(name);
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.exit();
        }

        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if self.error.is_some() {
                return param;
            }
            match (self.read)(&self.path.join()) {
                Ok(values) => {
                    let tensor = values.reshape(param.lazy_shape());
                    let id = param.id;
                    param.transform_for_load(tensor, id)
                }
                Err(error) => {
                    self.error = Some(error);
                    param
                }
            }
        }
    }

    let mut replacer = Replacer {
        path: Path::default(),
        read,
        error: None,
    };
    let module = module.map(&mut replacer);
    match replacer.error {
        None => Ok(module),
        Some(error) => Err(error),
    }
}
