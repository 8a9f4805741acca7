//! Flat gradients by parameter path, summed over the micro-batches of this rank.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::{Gradients, Tensor};

use crate::parameters::{self, ParameterVisitor};

/// Gradients of a module's trainable parameters, keyed by the parameter's path in the module.
///
/// Each gradient is flat and lies on the plain device. The order is that of the paths, so sums over all gradients are
/// the same in every run.
#[derive(Debug, Clone, Default)]
pub struct GradientMap {
    by_path: BTreeMap<String, Tensor<1>>,
}

impl GradientMap {
    /// Takes the gradients of `module`'s trainable parameters. A parameter that the backward pass did not reach gets a
    /// zero gradient, so the set of paths does not depend on the batch.
    pub fn take<M: Module>(module: &M, gradients: &mut Gradients) -> Self {
        let mut taker = Taker { gradients, taken: Self::default() };
        parameters::visit(module, &mut taker);
        taker.taken
    }

    /// Sets the flat gradient of one parameter.
    pub fn insert(&mut self, path: impl Into<String>, gradient: Tensor<1>) {
        self.by_path.insert(path.into(), gradient);
    }

    /// Removes and returns one parameter's gradient.
    pub fn remove(&mut self, path: &str) -> Option<Tensor<1>> {
        self.by_path.remove(path)
    }

    /// Iterates over all gradients in path order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor<1>)> {
        self.by_path.iter().map(|(path, gradient)| (path.as_str(), gradient))
    }
}

struct Taker<'a> {
    gradients: &'a mut Gradients,
    taken: GradientMap,
}

impl ParameterVisitor for Taker<'_> {
    fn visit<const D: usize>(&mut self, path: &str, parameter: &Param<Tensor<D>>) {
        if !parameter.is_require_grad() {
            return;
        }
        let value = parameter.val();
        let gradient = value.grad_remove(self.gradients).unwrap_or_else(|| Tensor::zeros_like(&value.clone().inner()));
        self.taken.insert(path, gradient.flatten(0, -1));
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::LinearConfig;
    use burn::tensor::Device;

    use super::*;

    fn values(map: &GradientMap) -> Vec<f32> {
        map.iter().flat_map(|(_, gradient)| gradient.to_data().iter::<f32>().collect::<Vec<_>>()).collect()
    }

    #[test]
    fn trainable_parameters_always_have_a_gradient_and_frozen_ones_never() {
        let device = Device::flex().autodiff();
        let mut linear = LinearConfig::new(2, 3).init(&device);
        let input = Tensor::<2>::ones([1, 2], &device);
        // The bias is trainable, but this loss does not use it.
        let mut backward = input.clone().matmul(linear.weight.val()).sum().backward();
        let taken = GradientMap::take(&linear, &mut backward);
        assert_eq!(taken.iter().map(|(path, _)| path).collect::<Vec<_>>(), ["bias", "weight"]);
        assert_eq!(values(&taken), [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);

        linear.weight = linear.weight.set_require_grad(false);
        let mut backward = linear.forward(input).sum().backward();
        let taken = GradientMap::take(&linear, &mut backward);
        assert_eq!(taken.iter().map(|(path, _)| path).collect::<Vec<_>>(), ["bias"]);
    }
}
