//! Parameters by name. Released files, checkpoints and optimisers share these names.

use burn::module::Param;
use burn::tensor::Tensor;

use super::hyper_lora::HyperLora;
use crate::parameters::{self, ParameterMapper, ParameterVisitor};

/// Module path fragments that differ in the files. A name is `{file}.{key in that file}`.
const RENAMED: [(&str, &str); 7] = [
    (".gamma", ".weight"),
    (".beta", ".bias"),
    (".to_out.weight", ".to_out.0.weight"),
    (".ff.proj.", ".ff.net.0.proj."),
    (".ff.out.", ".ff.net.2."),
    ("id_projector.linear.", "id_projector.0."),
    ("id_projector.norm.", "id_projector.2."),
];

impl HyperLora {
    /// Passes every parameter with its name to `visitor`. Linear weights are `[in, out]` here but `[out, in]` in the
    /// files.
    pub fn visit_parameters(&self, visitor: &mut impl ParameterVisitor) {
        parameters::visit(self, &mut Named(visitor));
    }

    /// Maps every parameter with `mapper`, which gets its name.
    #[must_use]
    pub fn map_parameters(self, mapper: &mut impl ParameterMapper) -> Self {
        parameters::map(self, &mut Named(mapper))
    }

    /// Lists the names of all parameters.
    pub fn parameter_names(&self) -> Vec<String> {
        struct Names(Vec<String>);
        impl ParameterVisitor for Names {
            fn visit<const D: usize>(&mut self, name: &str, _parameter: &Param<Tensor<D>>) {
                self.0.push(name.into());
            }
        }
        let mut names = Names(Vec::new());
        self.visit_parameters(&mut names);
        names.0
    }
}

/// Passes names on in place of paths.
struct Named<'a, T>(&'a mut T);

impl<T: ParameterVisitor> ParameterVisitor for Named<'_, T> {
    fn visit<const D: usize>(&mut self, path: &str, parameter: &Param<Tensor<D>>) {
        self.0.visit(&name(path), parameter);
    }
}

impl<T: ParameterMapper> ParameterMapper for Named<'_, T> {
    fn map<const D: usize>(&mut self, path: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        self.0.map(&name(path), parameter)
    }
}

/// Name of the parameter at a module path.
fn name(path: &str) -> String {
    RENAMED.iter().fold(path.to_owned(), |name, (here, there)| name.replace(here, there))
}
