//! Loss and its gradient with respect to per-sample LoRA weights, with or without recomputation.

use burn::tensor::Tensor;

use crate::lora::LoraWeights;
use crate::models::unet::blocks::Layer;
use crate::models::unet::layout::Op;
use crate::models::unet::leaves::{gradient_of, leaf, seeded};
use crate::models::unet::{UNet2DConditionModel, UnetInput, pair_of};

impl UNet2DConditionModel {
    /// Runs the UNet, passes its prediction to `loss`, and differentiates.
    ///
    /// `lora` and the results are on the plain device: the loss `[1]`, d loss / d `lora`, and the prediction. With
    /// `recompute`, only layer inputs are kept and the backward pass recomputes each layer, so that one layer's
    /// intermediate results are in memory at a time. Without it, everything is kept. Neither mode differentiates layers
    /// before the first LoRA, nor with respect to the frozen weights.
    ///
    /// # Panics
    /// If `lora` was made for another UNet or batch size, or `loss` does not depend on the prediction, which only a
    /// programming error can cause.
    pub fn loss_and_lora_gradients(
        &self,
        input: &UnetInput,
        lora: LoraWeights,
        recompute: bool,
        loss: impl FnOnce(Tensor<4>) -> Tensor<1>,
    ) -> (Tensor<1>, LoraWeights, Tensor<4>) {
        if recompute { self.layer_by_layer(input, &lora, loss) } else { self.at_once(input, lora, loss) }
    }

    fn at_once(
        &self,
        input: &UnetInput,
        lora: LoraWeights,
        loss: impl FnOnce(Tensor<4>) -> Tensor<1>,
    ) -> (Tensor<1>, LoraWeights, Tensor<4>) {
        let lora = lora.map(leaf);
        let prediction = self.forward(input, Some(&lora));
        let loss = loss(prediction.clone());
        let mut gradients = loss.backward();
        (loss.inner(), lora.map(|tensor| gradient_of(&tensor, &mut gradients)), prediction.inner())
    }

    fn layer_by_layer(
        &self,
        input: &UnetInput,
        lora: &LoraWeights,
        loss: impl FnOnce(Tensor<4>) -> Tensor<1>,
    ) -> (Tensor<1>, LoraWeights, Tensor<4>) {
        // 1. Forward without autodiff, keeping the input of every layer from the first one with a LoRA.
        let conditions = self.conditions(input);
        let mut inputs = vec![];
        let prediction = self.run(input.latents.clone(), Some(lora), |layer, x, lora| {
            if lora.is_some() || !inputs.is_empty() {
                inputs.push(x.clone());
            }
            layer.forward(x, &conditions, lora)
        });

        // 2. The loss and its gradient with respect to the prediction.
        let leaf_prediction = leaf(prediction.clone());
        let loss = loss(leaf_prediction.clone());
        let mut gradient = gradient_of(&leaf_prediction, &mut loss.backward()).cast(self.dtype);

        // 3. Backward, one layer at a time; a stack of gradients mirrors the forward pass's stack.
        let mut stack = vec![];
        let mut by_layer = vec![];
        for op in self.ops.iter().rev() {
            gradient = match op {
                Op::Layer(layer) => {
                    let Some(x) = inputs.pop() else { break };
                    let is_first = inputs.is_empty();
                    let gradient = match (layer, pair_of(lora, layer)) {
                        (Layer::Transformer { block, .. }, Some(pair)) => {
                            let context = conditions.prompt_embeds.clone();
                            let (gradient, pair) = block.backward(x, context, &pair, gradient, !is_first);
                            by_layer.push(pair);
                            gradient
                        }
                        _ => {
                            let x = leaf(x);
                            let y = layer.forward(x.clone(), &conditions, None);
                            Some(gradient_of(&x, &mut seeded(y, gradient).backward()))
                        }
                    };
                    let Some(gradient) = gradient else { break };
                    gradient
                }
                Op::Push => stack.pop().into_iter().fold(gradient, |sum, other| sum + other),
                Op::PopConcat { channels } => {
                    let [_, all, ..] = gradient.dims();
                    stack.push(gradient.clone().narrow(1, *channels, all - channels));
                    gradient.narrow(1, 0, *channels)
                }
                Op::PopAdd => {
                    stack.push(gradient.clone());
                    gradient
                }
            };
        }
        let modules = by_layer.into_iter().rev().flatten().collect();
        (loss.inner(), LoraWeights { modules }, prediction)
    }
}
