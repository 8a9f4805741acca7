//! Walks over the parameters of a module, each with its path in the module.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;

/// Visits every parameter once, in a fixed order.
pub trait ParameterVisitor {
    /// Visits one parameter; `path` joins the names of its fields by dots.
    fn visit<const D: usize>(&mut self, path: &str, parameter: &Param<Tensor<D>>);
}

/// Replaces parameters, in the order of [`ParameterVisitor`].
pub trait ParameterMapper {
    /// Returns the replacement of `parameter`, with the same shape.
    fn map<const D: usize>(&mut self, path: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>>;
}

/// Passes every parameter of `module` to `visitor`.
pub fn visit<M: Module>(module: &M, visitor: &mut impl ParameterVisitor) {
    module.visit(&mut Walk { path: Vec::new(), inner: visitor });
}

/// Maps every parameter of `module` with `mapper`.
#[must_use]
pub fn map<M: Module>(module: M, mapper: &mut impl ParameterMapper) -> M {
    module.map(&mut Walk { path: Vec::new(), inner: mapper })
}

/// Walk through the module tree, at its current path.
struct Walk<'a, T> {
    path: Vec<String>,
    inner: &'a mut T,
}

impl<T: ParameterVisitor> ModuleVisitor for Walk<'_, T> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, parameter: &Param<Tensor<D>>) {
        self.inner.visit(&self.path.join("."), parameter);
    }
}

impl<T: ParameterMapper> ModuleMapper for Walk<'_, T> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        self.inner.map(&self.path.join("."), parameter)
    }
}
