//! Parameters by name. Released files, checkpoints and optimisers share these names.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;

use super::hyper_lora::HyperLora;

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

/// Visits every parameter once, in a fixed order.
pub trait ParameterVisitor {
    /// Visits one parameter. Linear weights are `[in, out]` here but `[out, in]` in the files.
    fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>);
}

/// Replaces parameters, in the order of [`ParameterVisitor`].
pub trait ParameterMapper {
    /// Returns the replacement of `parameter`, with the same shape.
    fn map<const D: usize>(&mut self, name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>>;
}

impl HyperLora {
    /// Passes every parameter to `visitor`.
    pub fn visit_parameters(&self, visitor: &mut impl ParameterVisitor) {
        self.visit(&mut Named { path: Path::default(), inner: visitor });
    }

    /// Maps every parameter with `mapper`.
    #[must_use]
    pub fn map_parameters(self, mapper: &mut impl ParameterMapper) -> Self {
        self.map(&mut Named { path: Path::default(), inner: mapper })
    }

    /// Lists the names of all parameters.
    ///
    /// # Examples
    /// ```
    /// use burn_hyperlora::hypernet::{HyperLora, ParameterGroup};
    /// # use burn::tensor::Device;
    /// # use burn_hyperlora::hypernet::{HyperLoraConfig, ResamplerConfig};
    /// # use hyperlora_sdxl::lora::AttentionSite;
    /// # fn example() -> HyperLora {
    /// #     let config = HyperLoraConfig {
    /// #         basis: 4,
    /// #         id_tokens: 2,
    /// #         clip_dim: 16,
    /// #         resampler: ResamplerConfig { dim: 16, depth: 1, heads: 2, head_dim: 8, ff_mult: 2 },
    /// #         ..HyperLoraConfig::default()
    /// #     };
    /// #     let path = "mid_block.attentions.0.transformer_blocks.0.attn1".to_string();
    /// #     let sites = [AttentionSite { path, hidden_size: 8, cross_attention_dim: None }];
    /// #     HyperLora::new(&config, &sites, 7, &Device::flex())
    /// # }
    ///
    /// # let hyper_lora = example();
    /// let names = hyper_lora.parameter_names();
    /// assert!(names.iter().all(|name| ParameterGroup::of(name).is_some()));
    /// assert!(names.iter().any(|name| name.starts_with("id_projector.")));
    /// ```
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

/// Current path of a walk through the module tree.
#[derive(Default)]
struct Path(Vec<String>);

impl Path {
    fn enter(&mut self, name: &str) {
        self.0.push(name.into());
    }

    fn exit(&mut self) {
        self.0.pop();
    }

    fn name(&self) -> String {
        RENAMED.iter().fold(self.0.join("."), |name, (here, there)| name.replace(here, there))
    }
}

struct Named<'a, T> {
    path: Path,
    inner: &'a mut T,
}

impl<T: ParameterVisitor> ModuleVisitor for Named<'_, T> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, parameter: &Param<Tensor<D>>) {
        self.inner.visit(&self.path.name(), parameter);
    }
}

impl<T: ParameterMapper> ModuleMapper for Named<'_, T> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        self.inner.map(&self.path.name(), parameter)
    }
}
